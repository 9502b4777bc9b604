#include "client/resumption.hpp"

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {
namespace {

// Between two tries to find a daemon. With jitter: of many clients that lost the same daemon, each comes at a
// time of its own.
class Pauses {
 public:
  std::chrono::microseconds next() {
    const auto pause = std::uniform_int_distribution<std::int64_t>(longest_ / 2, longest_)(random_);
    longest_ = std::min<std::int64_t>(longest_ * 2, 500'000);
    return std::chrono::microseconds(pause);
  }

 private:
  std::int64_t longest_ = 2'000;  // microseconds
  std::minstd_rand random_{std::random_device{}()};
};

}  // namespace

// While an object of this lives, its thread is the one that looks.
class Resumption::UnderWay {
 public:
  UnderWay(Resumption& resumption, std::unique_lock<std::mutex>& lock)
      : resumption_(resumption), lock_(lock) {
    resumption_.is_under_way_ = true;
  }
  UnderWay(const UnderWay&) = delete;
  UnderWay& operator=(const UnderWay&) = delete;
  ~UnderWay() {
    if (!lock_.owns_lock()) lock_.lock();
    ++resumption_.searches_;
    resumption_.is_under_way_ = false;
    resumption_.change_.notify_all();
  }

 private:
  Resumption& resumption_;
  std::unique_lock<std::mutex>& lock_;
};

Result<void> Resumption::begin(Milliseconds wait) {
  std::unique_lock lock(pool_mutex());
  const Greeter::Hello hello{.epoch = pool_.epoch()};
  lock.unlock();
  auto opened = find_daemon(hello, wait);
  if (!opened) return error_of(std::move(opened));
  lock.lock();
  pool_.begin_session(std::move(opened->channel), opened->session);
  return {};
}

Result<void> Resumption::resume(std::unique_lock<std::mutex>& lock) {
  if (is_under_way_) {
    const std::uint64_t search = searches_;
    change_.wait(lock, [&] { return searches_ != search; });
    if (last_failure_) return tl::unexpected(*last_failure_);
    return {};
  }
  const UnderWay under_way(*this, lock);
  last_failure_.reset();
  auto old = pool_.end_session(lock);
  const Greeter::Hello hello{
      .session = pool_.session(), .resumes = pool_.session() != 0, .epoch = pool_.epoch()};
  lock.unlock();
  old.clear();
  auto opened = find_daemon(hello, options_.reconnect);
  lock.lock();
  if (!opened) {
    // A program that had a daemon asks why it has none.
    Error error = std::move(opened).error();
    if (error.code == Errc::no_daemon) error.code = Errc::disconnected;
    last_failure_ = error;
    return tl::unexpected(std::move(error));
  }
  // What was given up since is not told in any other way.
  while (hello.resumes && told_ends_ != holdings_.ends()) {
    lock.unlock();
    const auto said = say_what_is_held(*opened->channel, limit_of_wait(options_.reconnect));
    lock.lock();
    if (!said) return {};  // that daemon went away, too: whoever asked looks for the next one
  }
  pool_.begin_session(std::move(opened->channel), opened->session);
  releases_.wake();  // for what was given up since the daemon was told of it
  return {};
}

Result<Greeter::Opened> Resumption::find_daemon(const Greeter::Hello& hello, Milliseconds patience) {
  const Limit end = Limit::after(patience);
  const Limit limit = limit_of_wait(patience).or_earlier(Limit::after(std::max(patience, options_.answer)));
  Greeter::Tries tries;
  Pauses pauses;
  for (;;) {
    auto opened = try_daemon(hello, limit, tries);
    if (opened || patience.count() == 0) return opened;
    const Errc code = opened.error().code;
    if (code != Errc::no_daemon && code != Errc::disconnected && !tries.was_kept_out) return opened;
    if (tries.deaths >= kMostDeaths)
      return fail(
          Errc::disconnected,
          fmt::format("the daemon at {} went away, and so did the next, when this process said who it is "
                      "and what it has; it is not said a third time",
                      greeter_.socket()));
    if (end.is_over())
      return fail(code, fmt::format("{}; none came within {} ms", opened.error().message, patience.count()));
    if (!pause(std::min(Limit::Clock::now() + pauses.next(), end.end()))) return opened;
  }
}

// False when the search is to end.
bool Resumption::pause(Limit::Clock::time_point until) {
  std::unique_lock lock(pool_mutex());
  if (is_closed_) return false;
  change_.pause_until(lock, until);
  return true;
}

Result<Greeter::Opened> Resumption::try_daemon(const Greeter::Hello& hello, const Limit& limit,
                                               Greeter::Tries& tries) {
  tries.was_kept_out = false;
  auto opened = greeter_.open(hello, limit, tries);
  if (!opened || !hello.resumes) return opened;
  Channel& channel = *opened->channel;
  const auto said = say_what_is_held(channel, limit);
  if (said) return opened;
  if (said.error().code != Errc::disconnected) return error_of(said);
  if (channel.was_read()) ++tries.deaths;
  return fail(Errc::disconnected, fmt::format("the daemon at {} went away again", greeter_.socket()));
}

// Nobody is between a reply and what it brings: what is held now is all that there is.
Result<void> Resumption::say_what_is_held(Channel& channel, const Limit& limit) {
  try {
    return say_all(channel, limit);
  } catch (const std::bad_alloc&) {
    return fail(Errc::out_of_memory, "this process has no memory left");
  }
}

Result<void> Resumption::say_all(Channel& channel, const Limit& limit) {
  Holdings held;
  {
    const std::lock_guard lock(pool_mutex());
    releases_.clear();  // this daemon does not hear of them in the first place
    held = holdings_;
    told_ends_ = held.ends();
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

void Resumption::close() noexcept {
  is_closed_ = true;
  change_.notify_all();
}

void Resumption::start_over_in_child() {
  change_.start_over_in_child();
  holdings_ = {};
  told_ends_ = 0;
  last_failure_.reset();
  is_under_way_ = false;
}

}  // namespace cowmgr::detail
