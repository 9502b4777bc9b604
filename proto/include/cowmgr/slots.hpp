// What both sides say of the slots of a result set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cowmgr {

inline constexpr std::uint64_t kMaxValueBytes = std::uint64_t{64} << 10;  // of a slot's inline value
inline constexpr std::size_t kMaxJobBytes = std::size_t{64} << 10;        // of what a set says to its workers
inline constexpr std::size_t kMaxReasonBytes = 4096;  // of a worker's message for a failed slot

enum class SlotState : std::uint8_t { free, leased, committed, failed };

// What a slot holds, once it is settled.
enum class SlotContent : std::uint8_t {
  none,
  rows,    // committed: its rows of the dense set's output array
  value,   // committed: bytes in the set's own segment
  array,   // committed: an array of its own. Leased, for the daemon alone: one that its holder is writing
  reason,  // failed: text in the set's own segment
};

// Rows [begin, end) along the first axis.
struct Rows {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  [[nodiscard]] constexpr std::uint64_t count() const noexcept { return end - begin; }
  friend bool operator==(const Rows&, const Rows&) = default;
};

// The rows of one of `slots` slots (at least 1), as numpy.array_split splits them: the first rows % slots
// slots have one row more than the others.
[[nodiscard]] constexpr Rows rows_of_slot(std::uint64_t rows, std::uint64_t slots,
                                          std::uint64_t slot) noexcept {
  const std::uint64_t base = rows / slots;
  const std::uint64_t longer = rows % slots;
  const std::uint64_t begin = slot * base + (slot < longer ? slot : longer);
  return {begin, begin + base + (slot < longer ? 1 : 0)};
}

}  // namespace cowmgr
