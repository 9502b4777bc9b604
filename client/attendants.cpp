// The threads of a connection: one tells of releases, the other watches the daemon and takes late replies.
#include <algorithm>
#include <array>
#include <csignal>
#include <exception>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <utility>

#include "client/connection.hpp"
#include "client/deadlock.hpp"

namespace cowmgr::detail {
namespace {

constexpr auto kFlushPause = std::chrono::milliseconds(1);
constexpr std::size_t kMostWatched = 96;                         // connections; there are fewer
constexpr auto kNoMemoryPause = std::chrono::milliseconds(100);  // before a thread that had none tries again

// How often the watcher looks whether what it watches is still its own: poll(2) is not told when a descriptor
// is closed, and keeps the socket open meanwhile.
constexpr auto kLook = std::chrono::milliseconds(1000);

// With all signals blocked: the program's handlers run in the program's threads. With a name by which they
// are told from the program's (deadlock.cpp). Null when none is to be had.
template <class Work>
std::unique_ptr<std::thread> start_thread(Work work) noexcept {
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::unique_ptr<std::thread> thread;
  try {
    thread = std::make_unique<std::thread>([work = std::move(work)] {
      ::prctl(PR_SET_NAME, kThreadName);
      work();
    });
  } catch (const std::exception&) {
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace

// Called with the mutex held.
void Connection::wake_flusher() noexcept {
  ++release_count_;
  if (!flusher_)
    start_flusher();
  else if (is_flusher_resting_)
    flusher_wake_->notify_one();
}

// Without a thread, what was released goes with the next request.
void Connection::start_flusher() noexcept {
  flusher_ = start_thread([this] { flush_releases(); });
}

// Looks once in kFlushPause while views come and go, and rests when none did: waking it for each release
// would cost as much as telling the daemon of each.
void Connection::flush_releases() {
  std::unique_lock lock(pool_mutex());
  while (!is_closing_) {
    const std::uint64_t seen = release_count_;
    const bool was_empty = releases_.empty();
    flusher_wake_->wait_for(lock, kFlushPause, [&] { return is_closing_; });
    if (is_closing_ || release_count_ != seen) continue;  // still busy: the next request takes them along
    if (!was_empty && !releases_.empty() && !is_lost_) {
      lock.unlock();
      notify([](Builder& b) { return wire::CreateRelease(b); });
      lock.lock();
      continue;
    }
    is_flusher_resting_ = true;
    flusher_wake_->wait(lock, [&] { return is_closing_ || release_count_ != seen; });
    is_flusher_resting_ = false;
  }
}

// ---- Watching the daemon ----

void Connection::watch_daemon() noexcept {
  const std::lock_guard lock(pool_mutex());
  if (reconnect_.count() > 0 && generation_ == fork_generation()) start_watcher();
}

// Without a thread, the next call looks what has come. Called with the mutex held.
void Connection::start_watcher() noexcept {
  if (!watcher_) watcher_ = start_thread([this] { watch(); });
}

// Called with the mutex held.
void Connection::let_go_of_watched() noexcept {
  forget_fd(watched_.get());
  if (!watched_mark_.is_still(watched_.get())) (void)watched_.release();
  watched_.reset();
}

bool Connection::was_robbed() const noexcept {
  const std::lock_guard lock(pool_mutex());
  const auto is_intact = [](const auto& channel) { return channel->is_intact(); };
  const auto is_late_intact = [](const Late& late) { return late.channel->is_intact(); };
  return was_robbed_ || !std::all_of(idle_.begin(), idle_.end(), is_intact) ||
         !std::all_of(late_.begin(), late_.end(), is_late_intact) ||
         (watched_ && !watched_mark_.is_still(watched_.get()));
}

// A daemon that does not come back in time is looked for again by the next call.
void Connection::watch() {
  std::unique_lock lock(pool_mutex());
  bool has_given_up = false;
  while (!is_closing_) {
    try {
      if (!is_lost_) has_given_up = false;
      if (is_lost_ && !has_given_up && reconnect_.count() > 0)
        has_given_up = !reconnect(lock);
      else
        watch_once(lock);
    } catch (const std::bad_alloc&) {
      if (!lock.owns_lock()) lock.lock();
      flusher_wake_->wait_for(lock, kNoMemoryPause, [&] { return is_closing_; });
    }
  }
}

// Waits for the end of a channel's other side, without taking what comes from there, and for late replies; of
// one that was not late when it began, it hears kLook later.
void Connection::watch_once(std::unique_lock<std::mutex>& lock) {
  if (is_reconnecting_ || (is_lost_ && late_.empty())) {
    channel_free_->wait_for(lock, kLook);
    return;
  }
  std::array<pollfd, kMostWatched> polled{};
  const std::uint64_t epoch = epoch_;
  polled[0] = {is_lost_ ? -1 : watched_.get(), POLLRDHUP, 0};
  std::size_t count = 1;
  for (const Late& late : late_) {
    if (count < polled.size()) polled.at(count++) = {late.channel->fd(), POLLIN, 0};
  }
  lock.unlock();
  (void)::poll(polled.data(), count, static_cast<int>(kLook.count()));
  lock.lock();
  if (epoch != epoch_ || is_closing_) return;
  const bool is_robbed = watched_ && !watched_mark_.is_still(watched_.get());
  was_robbed_ = was_robbed_ || is_robbed;
  is_lost_ = is_lost_ || is_robbed || polled[0].revents != 0;
  const auto has_come = [](const pollfd& late) { return late.revents != 0; };
  const auto is_robbed_late = [](const Late& late) { return !late.channel->is_intact(); };
  if (std::any_of(polled.begin() + 1, polled.begin() + static_cast<std::ptrdiff_t>(count), has_come) ||
      std::any_of(late_.begin(), late_.end(), is_robbed_late))
    settle_late(lock);
}

// Takes the late replies that have come. Called with the mutex held, which it gives up meanwhile.
void Connection::settle_late(std::unique_lock<std::mutex>& lock) {
  std::vector<Late> all;
  all.reserve(late_.capacity());  // which is what stays
  all.swap(late_);
  for (const Late& late : all) busy_.push_back(late.channel.get());
  lock.unlock();
  for (Late& late : all) {
    const auto reply = late.channel->receive(Limit::now());
    if (reply) late.unkept.push_back(Grants::of_late(late.channel->request(), **reply));
    (void)late.channel->take_fds();
    end_use(std::move(late.channel), {}, std::move(late.unkept), Limit::now());
  }
  lock.lock();
}

Connection::~Connection() {
  if (generation_ != fork_generation()) {
    leave_threads_to_parent();
    return;
  }
  {
    const std::lock_guard lock(pool_mutex());
    is_closing_ = true;
    for (const Channel* channel : opening_) channel->shutdown();
    for (const Channel* channel : busy_) channel->shutdown();  // those of our threads: nobody calls any more
    for (const Late& late : late_) late.channel->shutdown();
    if (watched_mark_.is_still(watched_.get())) ::shutdown(watched_.get(), SHUT_RDWR);  // wakes the watcher
    channel_free_->notify_all();
    flusher_wake_->notify_one();
  }
  if (flusher_) flusher_->join();
  if (watcher_) watcher_->join();
  // Not before: the watcher may have found another daemon meanwhile. A number that stays registered would be
  // closed in every child, whatever it names by then.
  const std::lock_guard lock(pool_mutex());
  let_go_of_watched();
}

}  // namespace cowmgr::detail
