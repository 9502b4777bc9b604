#include "daemon/peers/closer.hpp"

#include <condition_variable>
#include <csignal>
#include <ctime>
#include <deque>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <utility>

#include "proto/errors.hpp"

namespace cowmgr {
namespace {

constexpr long kPatienceNs = 5'000'000;

int nudge_signal() noexcept {
  return SIGRTMIN + 2;
}

// As long as it lives, a signal comes to the calling thread every few milliseconds. close(2) then waits no
// longer for a socket that lingers, and the socket is closed all the same, with all others behind it in the
// same queue: TCP goes on by itself with what is unsent. So a peer can hold up others of its kind, but not
// for long.
class Nudge {
 public:
  Nudge() noexcept {
    struct sigaction nothing {};
    nothing.sa_handler = [](int) {};
    ::sigaction(nudge_signal(), &nothing, nullptr);
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = nudge_signal();
    event._sigev_un._tid = ::gettid();
    if (::timer_create(CLOCK_MONOTONIC, &event, &timer_) != 0) return;
    const itimerspec each{{0, kPatienceNs}, {0, kPatienceNs}};
    ::timer_settime(timer_, 0, &each, nullptr);
    is_set_ = true;
  }
  ~Nudge() {
    if (is_set_) ::timer_delete(timer_);
  }
  Nudge(const Nudge&) = delete;
  Nudge& operator=(const Nudge&) = delete;

 private:
  timer_t timer_{};
  bool is_set_ = false;
};

}  // namespace

struct Closer::Shared {
  struct Item {
    UniqueFd fd;
    std::function<void()> closed;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Item> queue;
  bool is_over = false;
};

Closer::Closer() : shared_(std::make_shared<Shared>()) {
  std::thread([shared = shared_] { work(*shared); }).detach();
}

Closer::~Closer() {
  const std::lock_guard lock(shared_->mutex);
  shared_->is_over = true;
  shared_->changed.notify_one();
}

void Closer::close(UniqueFd fd, std::function<void()> closed) {
  const std::lock_guard lock(shared_->mutex);
  shared_->queue.push_back({std::move(fd), std::move(closed)});
  shared_->changed.notify_one();
}

void Closer::work(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  for (;;) {
    shared.changed.wait(lock, [&] { return shared.is_over || !shared.queue.empty(); });
    if (shared.queue.empty()) return;
    Shared::Item item = std::move(shared.queue.front());
    shared.queue.pop_front();
    lock.unlock();
    {
      const Nudge nudge;
      item.fd.reset();
    }
    lock.lock();
    if (!shared.is_over && item.closed) item.closed();
  }
}

}  // namespace cowmgr
