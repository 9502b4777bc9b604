// How long a call waits for what the daemon answers.
#pragma once

#include <chrono>

#include "cowmgr/info.hpp"

namespace cowmgr::detail {

// When an answer must be there.
class Limit {
 public:
  using Clock = std::chrono::steady_clock;

  Limit() = default;  // none
  [[nodiscard]] static Limit after(Milliseconds wait) noexcept;
  [[nodiscard]] static Limit now() noexcept { return after(Milliseconds(0)); }

  [[nodiscard]] bool is_set() const noexcept { return end_ != Clock::time_point::max(); }
  [[nodiscard]] bool is_over() const noexcept { return is_set() && Clock::now() >= end_; }
  [[nodiscard]] Clock::time_point end() const noexcept { return end_; }
  // As poll(2) takes it.
  [[nodiscard]] int poll_ms() const noexcept;
  // Whichever is over first.
  [[nodiscard]] Limit or_earlier(const Limit& other) const noexcept {
    return other.end_ < end_ ? other : *this;
  }

 private:
  Clock::time_point end_ = Clock::time_point::max();
};

// How long a destructor waits for the daemon, and how long what was not kept takes to go back.
inline constexpr Milliseconds kPartingPatience{5000};

// When the last answer to whoever waits so long must be there.
[[nodiscard]] Limit limit_of_wait(Milliseconds wait) noexcept;
// The limit of a call that has no wait, when the daemon may take `answer` for a reply.
[[nodiscard]] Limit limit_of_call(Milliseconds answer) noexcept;

// While an object of this lives, no call of this thread waits for an answer for longer than kPartingPatience:
// for destructors, which tell the daemon of an end. It hears of it all the same when it goes on.
class Parting {
 public:
  Parting() noexcept;
  ~Parting();
  Parting(const Parting&) = delete;
  Parting& operator=(const Parting&) = delete;
};

}  // namespace cowmgr::detail
