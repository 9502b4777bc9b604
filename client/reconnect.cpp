// What a connection does when its daemon went away: it finds the next one, and says what this process has.
#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "client/connection.hpp"

namespace cowmgr::detail {
namespace {

// Between two tries to find a daemon.
constexpr auto kFirstReconnect = std::chrono::microseconds(2'000);
constexpr auto kLongestReconnect = std::chrono::microseconds(500'000);

}  // namespace

// Called with the mutex held, which it gives up meanwhile. One thread looks for the next daemon, the others
// wait.
Result<void> Connection::reconnect(std::unique_lock<std::mutex>& lock) {
  if (is_reconnecting_) {
    channel_free_->wait(lock, [&] { return !is_reconnecting_; });
    return {};
  }
  // Channels of the daemon that is gone.
  std::vector<std::unique_ptr<Channel>> old;
  old.reserve(idle_.size() + late_.size());
  is_reconnecting_ = true;
  const std::uint64_t epoch = ++epoch_;
  const std::uint64_t session = session_;
  for (auto& channel : idle_) old.push_back(std::move(channel));
  for (Late& late : late_) old.push_back(std::move(late.channel));
  idle_.clear();
  late_.clear();
  for (const Channel* channel : busy_) channel->shutdown();
  channel_free_->wait(lock, [&] { return busy_.empty() || epoch != epoch_; });
  lock.unlock();
  old.clear();
  auto channel = find_daemon(session, epoch, reconnect_);
  lock.lock();
  // What was given up since is not told in any other way.
  bool is_told = true;
  while (channel && is_told && session != 0 && epoch == epoch_ && told_ends_ != ends_) {
    lock.unlock();
    is_told = say_what_is_held(**channel, limit_of_wait(reconnect_)).has_value();
    lock.lock();
  }
  if (epoch != epoch_) return {};  // in a child that was forked meanwhile, or it began once more
  is_reconnecting_ = false;
  channel_free_->notify_all();
  if (!is_told) return {};  // that daemon went away, too: whoever asked looks for the next one
  if (!channel) {
    // A program that had a daemon asks why it has none.
    Error error = std::move(channel).error();
    if (error.code == Errc::no_daemon) error.code = Errc::disconnected;
    return tl::unexpected(std::move(error));
  }
  begin_with(*std::move(channel));
  is_lost_ = false;
  if (!releases_.empty()) wake_flusher();  // of what was given up since the daemon was told of it
  return {};
}

Result<std::unique_ptr<Channel>> Connection::find_daemon(std::uint64_t session, std::uint64_t epoch,
                                                         Milliseconds patience) {
  const Limit end = Limit::after(patience);
  const Limit limit = limit_of_wait(patience).or_earlier(Limit::after(std::max(patience, answer_)));
  Tries tries;
  std::minstd_rand random(std::random_device{}());
  for (auto pause = kFirstReconnect;; pause = std::min(pause * 2, kLongestReconnect)) {
    auto channel = try_daemon(session, epoch, limit, tries);
    if (channel || patience.count() == 0) return channel;
    const Errc code = channel.error().code;
    if (code != Errc::no_daemon && code != Errc::disconnected && !tries.was_kept_out) return channel;
    if (tries.deaths >= kMostDeaths)
      return fail(
          Errc::disconnected,
          fmt::format("the daemon at {} went away, and so did the next, when this process said who it is "
                      "and what it has; it is not said a third time",
                      socket_));
    if (end.is_over())
      return fail(code, fmt::format("{}; none came within {} ms", channel.error().message, patience.count()));
    // With jitter: of many clients that lost the same daemon, each comes at a time of its own.
    const auto jitter = std::uniform_int_distribution<std::int64_t>(pause.count() / 2, pause.count())(random);
    const auto next = Limit::Clock::now() + std::chrono::microseconds(jitter);
    std::unique_lock lock(pool_mutex());
    if (is_closing_) return channel;
    channel_free_->wait_until(lock, std::min(next, end.end()));
  }
}

Result<std::unique_ptr<Channel>> Connection::try_daemon(std::uint64_t session, std::uint64_t epoch,
                                                        const Limit& limit, Tries& tries) {
  tries.was_kept_out = false;
  auto channel = open_channel(session, session != 0, epoch, limit, tries);
  if (!channel || session == 0) return channel;
  const auto said = say_what_is_held(**channel, limit);
  if (said) return channel;
  if (said.error().code != Errc::disconnected) return error_of(said);
  if ((*channel)->was_read()) ++tries.deaths;
  return fail(Errc::disconnected, fmt::format("the daemon at {} went away again", socket_));
}

// Nobody is between a reply and what it brings: what is held now is all that there is.
Result<void> Connection::say_what_is_held(Channel& channel, const Limit& limit) {
  try {
    return say_all(channel, limit);
  } catch (const std::bad_alloc&) {
    return fail(Errc::out_of_memory, "this process has no memory left");
  }
}

Result<void> Connection::say_all(Channel& channel, const Limit& limit) {
  Holdings held;
  {
    const std::lock_guard lock(pool_mutex());
    releases_.clear();  // this daemon does not hear of them in the first place
    held = holdings_;
    told_ends_ = ends_;
  }
  return held.tell([&]() -> Builder& { return channel.builder(); },
                   [&](Offset<wire::Hold> table) -> Result<void> {
                     channel.finish(table);
                     const auto reply = channel.exchange(limit);
                     if (!reply) return error_of(reply);
                     if (const auto* failure = (*reply)->body_as_Failure())
                       return tl::unexpected(error_of_failure(*failure));
                     return {};
                   });
}

}  // namespace cowmgr::detail
