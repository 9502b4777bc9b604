// The layout of a result set's own segment: who has which slot, in which order they were settled, and the
// values that are small enough to lie here. Specified in README.md beside this file, "Result segments".
//
// 1. Only the daemon writes; everybody else maps it read-only, and reads without asking.
// 2. `word` of a slot and `settled` of the header are each written last, with release order: whoever reads
//    them with acquire order sees all that they speak of.
// 3. A slot that is committed or failed does not change any more. What a free or leased slot says besides its
//    word may change while it is being read: SlotSnapshot leaves out what it holds, so that nobody takes what
//    is still being written for a result.
// 4. It is the set's record: a daemon that finds it knows all that the one before knew of the set.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>

#include "cowmgr/slots.hpp"  // IWYU pragma: export
#include "proto/errors.hpp"
#include "proto/segment.hpp"

namespace cowmgr {

inline constexpr std::uint32_t kMaxBatch = 4096;          // slots of one request
inline constexpr std::uint32_t kArrayValue = UINT32_MAX;  // in CommitSlots: the array that was allocated

// One slot, as it lies in the segment.
struct SlotEntry {
  std::atomic<std::uint64_t> word;     // state, content << 8, attempt << 32
  std::atomic<std::uint64_t> holder;   // leased, committed: the session that has it, or did it
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
  std::uint64_t order_offset;  // of u32[slots]: slots in the order in which they were settled
  std::uint64_t job_offset;    // of what the maker says to the workers
  std::uint64_t job_bytes;
  std::uint64_t values_offset;  // what lies there grows
  std::uint64_t max_bytes;      // the segment never grows beyond
  std::atomic<std::uint64_t> settled;
  std::uint64_t maker;  // session
  std::uint64_t token;
  std::int64_t created_us;
  std::uint32_t owner_uid;
  std::uint32_t owner_gid;
  std::uint32_t mode;
  std::uint32_t flags;
  std::uint32_t attempts;
  std::uint32_t lease_ms;
  std::uint32_t name_bytes;
  std::uint32_t queue_bytes;
  std::array<char, 256> name;
  std::array<char, 256> queue;
  std::uint32_t npy_crc;  // layout 2: of the second page of the .npy header, at npy_offset()
  std::array<char, 3440> zero;
  std::uint32_t crc;  // of all that does not change: this page but for `settled`, and the next
};
static_assert(sizeof(ResultHeader) == kPageBytes && std::is_standard_layout_v<ResultHeader>);
static_assert(offsetof(ResultHeader, settled) == 72 && offsetof(ResultHeader, maker) == 80 &&
              offsetof(ResultHeader, owner_uid) == 104 && offsetof(ResultHeader, attempts) == 120 &&
              offsetof(ResultHeader, name) == 136 && offsetof(ResultHeader, queue) == 392 &&
              offsetof(ResultHeader, npy_crc) == 648 && offsetof(ResultHeader, crc) == 4092);
inline constexpr std::uint64_t kSlotsOffset =
    2 * kPageBytes;  // behind the header and a page of the .npy header

// What the header says of a set, and does not change.
struct ResultRecord {
  std::uint64_t set = 0;  // id
  std::uint64_t slots = 0;
  std::uint64_t job_bytes = 0;
  std::string name{};
  std::string queue{};      // or empty
  std::uint64_t maker = 0;  // session
  std::uint64_t token = 0;  // the maker's number of its request: who asks once more has the set already
  std::int64_t created_us = 0;
  uid_t owner_uid = 0;
  gid_t owner_gid = 0;
  std::uint32_t mode = 0;
  bool is_ragged = false;
  bool is_detached = false;
  bool replace = false;
  bool evictable = false;
  std::uint32_t attempts = 0;
  std::uint32_t lease_ms = 0;
  std::string npy_header{};  // of a dense set's output array: one page (layout 1), or two (layout 2)

  friend bool operator==(const ResultRecord&, const ResultRecord&) = default;
};

struct ResultLayout {
  std::uint64_t slots_offset = 0;
  std::uint64_t order_offset = 0;
  std::uint64_t job_offset = 0;
  std::uint64_t npy_offset = 0;  // of the second page of the .npy header; where there is none: values_offset
  std::uint64_t values_offset = 0;
  std::uint64_t max_bytes = 0;
};
// Offsets for `slots` slots (1 to 2^32 - 1), each with up to `value_bytes` bytes in the segment, and for a
// job of `job_bytes`; with a second page of the .npy header, or without.
[[nodiscard]] ResultLayout result_layout(std::uint64_t slots, std::uint64_t value_bytes,
                                         std::uint64_t job_bytes = 0, bool has_more_npy = false) noexcept;

// The layout of a set's segment: a ragged one has room for a value in each slot, a dense one for a reason.
[[nodiscard]] ResultLayout result_layout(const ResultRecord& record) noexcept;

// Writes the header and the job, of record.job_bytes, of a new segment, which is zero so far.
void write_result_header(std::byte* memory, const ResultRecord& record, const ResultLayout& layout,
                         std::span<const std::byte> job = {}) noexcept;

// Reads the two pages of a segment that has `size_bytes` bytes. Errors: corrupted when it does not check,
// unsupported for a newer layout.
[[nodiscard]] Result<ResultRecord> read_result_header(std::span<const std::byte, kSlotsOffset> pages,
                                                      std::uint64_t size_bytes);
// Of layout 2: the page that `record` still lacks, which read_result_header() has read, lies at this offset.
[[nodiscard]] std::optional<std::uint64_t> more_npy_header(const ResultRecord& record) noexcept;
// Adds that page; `pages` are those of read_result_header(). Errors: corrupted.
[[nodiscard]] Result<void> add_npy_header(ResultRecord& record,
                                          std::span<const std::byte, kSlotsOffset> pages,
                                          std::span<const std::byte, kPageBytes> more);

// Whether a segment that starts with `first_page` is a result set's: an array's starts as a .npy file does.
[[nodiscard]] bool is_result_segment(std::span<const std::byte> first_page) noexcept;

// A copy of what a slot said at one moment.
struct SlotSnapshot {
  SlotState state{};
  std::uint32_t attempt = 0;
  std::uint64_t holder = 0;
  std::int64_t since_us = 0;
  // What it holds: of a slot that is committed or failed, and of no other.
  SlotContent content = SlotContent::none;
  std::uint64_t place = 0;
  std::uint64_t size_bytes = 0;
};

[[nodiscard]] SlotSnapshot snapshot_of(const SlotEntry& entry) noexcept;
// What the word of a slot says it holds, settled or not: for who writes it.
[[nodiscard]] inline SlotContent content_in(std::uint64_t word) noexcept {
  return static_cast<SlotContent>(word >> 8U & 0xFFU);
}

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
  // What the maker of the set says to its workers; does not change.
  [[nodiscard]] std::span<const std::byte> job() const noexcept {
    return {memory_ + header().job_offset, header().job_bytes};
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

}  // namespace cowmgr
