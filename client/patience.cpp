#include "client/patience.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

namespace cowmgr::detail {
namespace {

// Between two looks of a call that has no turn.
constexpr Milliseconds kCrowdPause{50};

}  // namespace

Patience::Patience(Turns& turns, Milliseconds wait, Milliseconds answer)
    : turns_(turns),
      wait_(wait),
      answer_(answer),
      end_(Limit::after(wait)),
      last_answer_(limit_of_wait(wait)) {}

Patience::~Patience() {
  if (has_turn_ && generation_ == fork_generation()) turns_.end();
}

void Patience::next() {
  is_look_ = false;
  if (wait_.count() == 0) return;
  has_turn_ = has_turn_ || turns_.begin(is_crowded_ ? kCrowdPause : Milliseconds(0));
  is_crowded_ = !has_turn_;
  is_look_ = is_crowded_;
  const auto left = std::chrono::ceil<Milliseconds>(end_.end() - Limit::Clock::now());
  const auto most = end_.is_set() ? std::clamp(left, Milliseconds(0), kLongestPoll) : kLongestPoll;
  wait_ms_ = static_cast<std::uint32_t>(most.count());
}

Limit Patience::limit() const noexcept {
  if (answer_ == kForever) return last_answer_;
  return last_answer_.or_earlier(Limit::after(Milliseconds(wait_ms()) + answer_));
}

bool Patience::may_ask_again(const Error& error) const {
  if (is_over()) return false;
  return error.code == Errc::timed_out || (wait_ms() == 0 && error.code == Errc::not_found);
}

Error Patience::last_word(const Error& error) const {
  if (wait_ms() > 0 || wait_.count() == 0 || error.code != Errc::not_found) return error;
  return {Errc::timed_out, fmt::format("{}; it did not come within {} ms", error.message, wait_.count())};
}

}  // namespace cowmgr::detail
