#include "client/limit.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace cowmgr::detail {
namespace {

// How long after the end of a wait an answer to it still counts.
constexpr Milliseconds kLateAnswer{1000};
// How long a call that does not wait gives a daemon, or a machine, that is busy.
constexpr Milliseconds kAnswer{20'000};

thread_local int partings = 0;

}  // namespace

Limit Limit::after(Milliseconds wait) noexcept {
  Limit limit;
  const auto now = Clock::now();
  const auto left = std::chrono::duration_cast<Milliseconds>(Clock::time_point::max() - now);
  if (wait < left) limit.end_ = now + wait;
  return limit;
}

int Limit::poll_ms() const noexcept {
  if (!is_set()) return -1;
  const auto left = std::chrono::ceil<Milliseconds>(end_ - Clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, std::numeric_limits<int>::max()));
}

Limit limit_of_wait(Milliseconds wait) noexcept {
  if (wait == kForever) return {};
  return Limit::after(wait.count() == 0 ? kAnswer : wait + kLateAnswer);
}

Limit limit_of_call(Milliseconds answer) noexcept {
  const Limit own = Limit::after(answer);
  return partings > 0 ? Limit::after(kPartingPatience).or_earlier(own) : own;
}

Parting::Parting() noexcept {
  ++partings;
}
Parting::~Parting() {
  --partings;
}

}  // namespace cowmgr::detail
