#include "client/channel_pool.hpp"

#include <algorithm>
#include <span>
#include <utility>

#include <fmt/format.h>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {

ChannelPool::ChannelPool(Greeter& greeter) : greeter_(greeter) {
  make_room();
}

ChannelPool::~ChannelPool() {
  const std::lock_guard lock(pool_mutex());
  watched_.reset();
}

// What a channel is put into has room for it, always.
void ChannelPool::make_room() {
  idle_.reserve(kMaxChannels);
  late_.reserve(kMaxChannels);
  busy_.reserve(kMaxChannels);
}

// ---- For a request ----

// The first channel makes the session; until then nobody else can join it.
bool ChannelPool::may_open() const noexcept {
  return open_channels_ == 0 || (session_ != 0 && open_channels_ < kMaxChannels);
}

Result<std::unique_ptr<Channel>> ChannelPool::take(std::unique_lock<std::mutex>& lock, const Limit& limit) {
  for (;;) {
    const bool is_there = change_.wait_until(
        lock, limit, [&] { return is_lost_ || is_closed_ || !idle_.empty() || may_open(); });
    if (is_lost_ || is_closed_) return std::unique_ptr<Channel>();
    if (!is_there)
      return fail(Errc::timed_out,
                  fmt::format("the daemon at {} answers none of the {} requests that are under "
                              "way; is it stopped?",
                              greeter_.socket(), open_channels_));
    if (!idle_.empty()) return take_idle();
    const std::uint64_t epoch = epoch_;
    auto opened = open_another(lock, limit);
    if (epoch != epoch_) continue;  // what an earlier daemon said, or gave, does not count any more
    if (opened) {
      busy_.push_back(opened->channel.get());
      return std::move(opened->channel);
    }
    if (!is_lost_) return error_of(std::move(opened));
  }
}

std::unique_ptr<Channel> ChannelPool::take_idle() noexcept {
  auto channel = std::move(idle_.back());
  idle_.pop_back();
  busy_.push_back(channel.get());
  return channel;
}

Result<Greeter::Opened> ChannelPool::open_another(std::unique_lock<std::mutex>& lock, const Limit& limit) {
  ++open_channels_;
  const std::uint64_t epoch = epoch_;
  const Greeter::Hello hello{.session = session_, .epoch = epoch_};
  lock.unlock();
  Greeter::Tries tries;
  auto opened = greeter_.open(hello, limit, tries);
  lock.lock();
  change_.notify_all();
  if (epoch != epoch_) return opened;
  if (opened) {
    if (hello.session == 0) {  // the first of a child
      session_ = opened->session;
      watched_.watch(*opened->channel);
    }
    return opened;
  }
  --open_channels_;
  // A daemon that is gone does not answer; the next one does not know the session.
  const Errc code = opened.error().code;
  if (code == Errc::no_daemon || code == Errc::disconnected ||
      (code == Errc::permission_denied && (hello.session != 0 || tries.was_kept_out)))
    lose();
  return opened;
}

void ChannelPool::lose() noexcept {
  is_lost_ = true;
  change_.notify_all();
}

bool ChannelPool::put_back(std::unique_ptr<Channel> channel, Unkept unkept) noexcept {
  std::erase(busy_, channel.get());
  change_.notify_all();  // who ends the session waits for it too
  if (channel->epoch() != epoch_) return false;
  switch (channel->state()) {
    case Channel::State::ready:
      idle_.push_back(std::move(channel));
      return false;
    case Channel::State::owed:
      late_.push_back({std::move(channel), std::move(unkept)});
      return true;
    default:
      was_robbed_ = was_robbed_ || !channel->is_intact();
      --open_channels_;
      // The session ended with the daemon, or with its last channel.
      if (channel->state() == Channel::State::ended || open_channels_ == 0) lose();
      return false;
  }
}

// ---- Late replies ----

std::vector<ChannelPool::Late> ChannelPool::take_late() {
  std::vector<Late> all;
  all.reserve(late_.capacity());  // which is what stays
  all.swap(late_);
  for (const Late& late : all) busy_.push_back(late.channel.get());
  return all;
}

bool ChannelPool::give_back_late(Grants& grants) {
  if (late_.empty()) return false;
  auto& unkept = late_.back().unkept;
  unkept.insert(unkept.begin(), std::move(grants));
  return true;
}

// ---- The session ----

std::vector<std::unique_ptr<Channel>> ChannelPool::end_session(std::unique_lock<std::mutex>& lock) {
  std::vector<std::unique_ptr<Channel>> old;
  old.reserve(idle_.size() + late_.size());
  ++epoch_;
  for (auto& channel : idle_) old.push_back(std::move(channel));
  for (Late& late : late_) old.push_back(std::move(late.channel));
  idle_.clear();
  late_.clear();
  for (const Channel* channel : busy_) channel->shutdown();
  lose();
  change_.wait(lock, [&] { return busy_.empty(); });
  return old;
}

void ChannelPool::begin_session(std::unique_ptr<Channel> first, std::uint64_t session) {
  watched_.watch(*first);
  session_ = session;
  open_channels_ = 1;
  idle_.push_back(std::move(first));
  is_lost_ = false;
  change_.notify_all();
}

// ---- Watching ----

ChannelPool::PollSet ChannelPool::poll_set() const noexcept {
  PollSet set{.epoch = epoch_};
  set.fds[set.count++] = {is_lost_ ? -1 : watched_.fd(), POLLRDHUP, 0};
  for (const Late& late : late_) set.fds.at(set.count++) = {late.channel->fd(), POLLIN, 0};
  return set;
}

bool ChannelPool::note(const PollSet& polled) noexcept {
  if (polled.epoch != epoch_ || is_closed_) return false;
  const bool is_robbed = watched_.is_robbed();
  was_robbed_ = was_robbed_ || is_robbed;
  if (is_robbed || polled.fds[0].revents != 0) lose();
  const auto late = std::span(polled.fds).first(polled.count).subspan(1);
  return std::ranges::any_of(late, [](const pollfd& one) { return one.revents != 0; }) ||
         std::ranges::any_of(late_, [](const Late& one) { return !one.channel->is_intact(); });
}

bool ChannelPool::was_robbed() const noexcept {
  const auto is_intact = [](const auto& channel) { return channel->is_intact(); };
  const auto is_late_intact = [](const Late& late) { return late.channel->is_intact(); };
  return was_robbed_ || watched_.is_robbed() || !std::ranges::all_of(idle_, is_intact) ||
         !std::ranges::all_of(late_, is_late_intact);
}

// ---- The end ----

void ChannelPool::close() noexcept {
  is_closed_ = true;
  for (const Channel* channel : busy_) channel->shutdown();  // those of our threads: nobody calls any more
  for (const Late& late : late_) late.channel->shutdown();
  watched_.shutdown();
  change_.notify_all();
}

void ChannelPool::start_over_in_child() {
  change_.start_over_in_child();
  idle_.clear();
  late_.clear();
  busy_.clear();
  watched_.reset();
  open_channels_ = 0;
  session_ = 0;
  is_lost_ = false;
  was_robbed_ = false;
}

}  // namespace cowmgr::detail
