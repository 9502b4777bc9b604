// The two clocks: of people, as frames and segments tell it, and of deadlines.
#pragma once

#include <chrono>
#include <cstdint>

namespace cowmgr {

using Time = std::chrono::sys_time<std::chrono::microseconds>;
using Tick = std::chrono::steady_clock::time_point;

// Now, by both.
struct Moment {
  Time time{};
  Tick tick{};
};

// As frames and segments tell it: microseconds since 1970 UTC.
[[nodiscard]] constexpr std::int64_t microseconds(Time time) noexcept {
  return time.time_since_epoch().count();
}
[[nodiscard]] constexpr Time time_at(std::int64_t us) noexcept {
  return Time(std::chrono::microseconds(us));
}

}  // namespace cowmgr
