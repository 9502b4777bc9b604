// A wait of the caller, cut into requests:
//
//   auto patience = connection.patience(wait);
//   for (;;) {
//     patience.next();
//     auto answer = connection.call<...>(patience, build with patience.wait_ms(), take);
//     if (answer is what is waited for, or !patience.may_ask_again(...)) return ...;
//   }
//
// A call without a turn (turns.hpp) looks again and again instead of waiting in the daemon. So does, once, a
// call whose daemon has died: a daemon that answers that does not die of it.
#pragma once

#include <cstdint>

#include "client/fork_guard.hpp"
#include "client/limit.hpp"
#include "client/turns.hpp"
#include "cowmgr/info.hpp"
#include "proto/errors.hpp"

namespace cowmgr::detail {

// How long one request may wait in the daemon; longer waits ask again.
inline constexpr Milliseconds kLongestPoll{20'000};

class Patience {
 public:
  // `answer`: how long the daemon may take beyond what it is asked to wait.
  Patience(Turns& turns, Milliseconds wait, Milliseconds answer);
  ~Patience();
  Patience(const Patience&) = delete;
  Patience& operator=(const Patience&) = delete;

  // To be called before each request; may pause, where others wait already.
  void next();
  // For the wait_ms of the request. 0 for one that only looks.
  [[nodiscard]] std::uint32_t wait_ms() const noexcept { return is_look_ ? 0 : wait_ms_; }
  // When the answer to the next request must be there.
  [[nodiscard]] Limit limit() const noexcept;
  [[nodiscard]] bool is_over() const { return end_.is_over(); }
  // Whether `error` only says that what is waited for is not there yet, and there is time left.
  [[nodiscard]] bool may_ask_again(const Error& error) const;
  // The error for the caller: a look that found nothing at the end of a wait has waited.
  [[nodiscard]] Error last_word(const Error& error) const;
  // The request was under way when its daemon died.
  void look_first() noexcept { is_look_ = true; }

 private:
  Turns& turns_;
  Milliseconds wait_;
  Milliseconds answer_;
  Limit end_;          // of the wait
  Limit last_answer_;  // when the answer to the last request must be there
  std::uint32_t wait_ms_ = 0;
  bool is_look_ = false;
  bool has_turn_ = false;
  bool is_crowded_ = false;
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
