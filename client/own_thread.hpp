// The library's own threads, and how they wait for each other and for the program's. Both know of fork(2): a
// child has neither its parent's threads nor those that waited at the fork.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "client/fork_guard.hpp"
#include "client/limit.hpp"

namespace cowmgr::detail {

// The name of the library's own threads (prctl(2), PR_SET_NAME), by which they are told from the program's.
inline constexpr const char* kThreadName = "cowmgr-client";

// A thread that runs with all signals blocked: the program's handlers run in the program's threads. Whoever
// owns it ends its work first; the destructor waits for that.
class OwnThread {
 public:
  OwnThread() = default;
  OwnThread(const OwnThread&) = delete;
  OwnThread& operator=(const OwnThread&) = delete;
  ~OwnThread() { join(); }

  // Whether this process has it.
  [[nodiscard]] bool is_there() const noexcept { return thread_ && generation_ == fork_generation(); }
  // Starts it unless it is there. Without effect when no thread is to be had: look at is_there().
  void start(const std::function<void()>& work) noexcept;
  // Waits for the end of its work. A child leaves its parent's thread alone.
  void join() noexcept;

 private:
  std::unique_ptr<std::thread> thread_;
  std::uint64_t generation_ = 0;  // of the process that has it
};

// A condition of what pool_mutex() guards. A condition variable that threads waited for at a fork waits for
// them for ever in the child, in notify_all() as in its destructor: so a child leaves it alone, and takes
// another.
class Condition {
 public:
  Condition() = default;
  Condition(const Condition&) = delete;
  Condition& operator=(const Condition&) = delete;
  ~Condition() {
    if (generation_ != fork_generation()) (void)variable_.release();
  }

  void notify_all() noexcept { variable_->notify_all(); }
  // Waits until `holds`.
  template <class Holds>
  void wait(std::unique_lock<std::mutex>& lock, const Holds& holds) {
    variable_->wait(lock, holds);
  }
  // Waits until `holds`, or the limit is over. Whether it holds.
  template <class Holds>
  [[nodiscard]] bool wait_until(std::unique_lock<std::mutex>& lock, const Limit& limit, const Holds& holds) {
    if (limit.is_set()) return variable_->wait_until(lock, limit.end(), holds);
    variable_->wait(lock, holds);
    return true;
  }
  // Waits until somebody notifies, or for no reason, but not longer than that.
  void pause(std::unique_lock<std::mutex>& lock, std::chrono::milliseconds pause) {
    variable_->wait_for(lock, pause);
  }
  void pause_until(std::unique_lock<std::mutex>& lock, Limit::Clock::time_point until) {
    variable_->wait_until(lock, until);
  }
  // In a child, with the mutex held. Nothing has changed if this throws bad_alloc.
  void start_over_in_child() {
    auto fresh = std::make_unique<std::condition_variable>();
    (void)variable_.release();
    variable_ = std::move(fresh);
    generation_ = fork_generation();
  }

 private:
  std::unique_ptr<std::condition_variable> variable_ = std::make_unique<std::condition_variable>();
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
