// The layout of a result set's own segment: who has which slot, in which order they were settled, and the
// values that are small enough to lie here. Specified in README.md beside this file, "Result segments".
//
// 1. Only the daemon writes; everybody else maps it read-only, and reads without asking.
// 2. `word` of a slot and `settled` of the header are each written last, with release order: whoever reads
//    them with acquire order sees all that they speak of.
// 3. A slot that is committed or failed does not change any more. What a free or leased slot says besides its
//    word is a hint: it may change while it is being read.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>

#include "proto/errors.hpp"

namespace cowmgr {

inline constexpr std::uint64_t kMaxValueBytes = std::uint64_t{64} << 10;  // of a slot's inline value

enum class SlotState : std::uint8_t { free, leased, committed, failed };

// What a settled slot holds.
enum class SlotContent : std::uint8_t {
  none,    // it is not settled
  rows,    // committed: its rows of the dense set's output array
  value,   // committed: bytes in this segment
  array,   // committed: an array of its own
  reason,  // failed: text in this segment
};

// One slot, as it lies in the segment.
struct SlotEntry {
  std::atomic<std::uint64_t> word;     // state, content << 8, attempt << 32
  std::atomic<std::uint64_t> holder;   // session, while leased
  std::atomic<std::int64_t> since_us;  // of the state; microseconds since 1970 UTC
  std::uint64_t place;                 // value, reason: offset in the segment. array: its id
  std::uint64_t size_bytes;            // of the value, the reason, or the array's data
};
static_assert(sizeof(SlotEntry) == 40 && std::is_standard_layout_v<SlotEntry> &&
              std::atomic<std::uint64_t>::is_always_lock_free);

struct ResultHeader {
  std::array<char, 8> magic;
  std::uint32_t layout_version;
  std::uint32_t slot_bytes;  // sizeof(SlotEntry)
  std::uint64_t set;         // id
  std::uint64_t slots;
  std::uint64_t order_offset;   // of u32[slots]: slots in the order in which they were settled
  std::uint64_t values_offset;  // what lies there grows
  std::uint64_t max_bytes;      // the segment never grows beyond
  std::atomic<std::uint64_t> settled;
};
static_assert(sizeof(ResultHeader) == 64 && offsetof(ResultHeader, settled) == 56);

struct ResultLayout {
  std::uint64_t slots_offset = 0;
  std::uint64_t order_offset = 0;
  std::uint64_t values_offset = 0;
  std::uint64_t max_bytes = 0;
};
// Offsets for `slots` slots (1 to 2^32 - 1), each with up to `value_bytes` bytes in the segment.
[[nodiscard]] ResultLayout result_layout(std::uint64_t slots, std::uint64_t value_bytes) noexcept;

// Writes the header of a new segment, which is zero so far.
void write_result_header(std::byte* memory, std::uint64_t set, std::uint64_t slots,
                         const ResultLayout& layout) noexcept;

// A copy of what a slot said at one moment.
struct SlotSnapshot {
  SlotState state{};
  SlotContent content{};
  std::uint32_t attempt = 0;
  std::uint64_t holder = 0;
  std::int64_t since_us = 0;
  std::uint64_t place = 0;
  std::uint64_t size_bytes = 0;
};

// A mapped result segment, for reading. Borrows the memory.
class ResultSegment {
 public:
  // `memory`: at least the header's page; the mapping must reach to max_bytes. Errors: corrupted when the
  // header does not describe set `set`, unsupported for a newer layout.
  [[nodiscard]] static Result<ResultSegment> open(const std::byte* memory, std::uint64_t set);

  [[nodiscard]] std::uint64_t slots() const noexcept { return header().slots; }
  [[nodiscard]] std::uint64_t settled() const noexcept {
    return header().settled.load(std::memory_order_acquire);
  }
  // The slot that was settled as the `rank`th, from 0; rank < settled().
  [[nodiscard]] std::uint64_t settled_at(std::uint64_t rank) const noexcept;
  [[nodiscard]] SlotSnapshot slot(std::uint64_t index) const noexcept;
  // The value or the reason that a settled slot holds; empty for other contents.
  [[nodiscard]] std::span<const std::byte> value(const SlotSnapshot& slot) const noexcept;

 private:
  explicit ResultSegment(const std::byte* memory) noexcept : memory_(memory) {}
  [[nodiscard]] const ResultHeader& header() const noexcept {
    return *reinterpret_cast<const ResultHeader*>(memory_);
  }

  const std::byte* memory_;
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
