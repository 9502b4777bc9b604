#include "proto/result_segment.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string_view>
#include <zlib.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::array<char, 8> kMagic = {'C', 'O', 'W', 'M', 'G', 'R', 'R', 'S'};
constexpr std::uint32_t kVersion = 2;  // the newest

constexpr std::uint32_t kFlagRagged = 1;
constexpr std::uint32_t kFlagDetached = 2;
constexpr std::uint32_t kFlagReplace = 4;
constexpr std::uint32_t kFlagEvictable = 8;
constexpr std::uint64_t kMostSlots = UINT32_MAX;  // the order of settling has 32 bits for each

constexpr std::uint64_t whole_pages(std::uint64_t size_bytes) noexcept {
  return (size_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

std::uint32_t crc_of(const std::byte* memory) noexcept {
  constexpr std::size_t kChanging = offsetof(ResultHeader, settled);
  constexpr std::size_t kAfter = kChanging + sizeof(ResultHeader::settled);
  const auto* bytes = reinterpret_cast<const unsigned char*>(memory);
  auto crc = ::crc32_z(0, bytes, kChanging);
  crc = ::crc32_z(crc, bytes + kAfter, offsetof(ResultHeader, crc) - kAfter);
  return static_cast<std::uint32_t>(::crc32_z(crc, bytes + kPageBytes, kPageBytes));
}

std::uint32_t crc_of_page(std::span<const std::byte> page) noexcept {
  return static_cast<std::uint32_t>(
      ::crc32_z(0, reinterpret_cast<const unsigned char*>(page.data()), page.size()));
}

bool has_more_npy(const ResultRecord& record) noexcept {
  return record.npy_header.size() > kPageBytes;
}

std::uint32_t flags_of(const ResultRecord& record) noexcept {
  return (record.is_ragged ? kFlagRagged : 0) | (record.is_detached ? kFlagDetached : 0) |
         (record.replace ? kFlagReplace : 0) | (record.evictable ? kFlagEvictable : 0);
}

tl::unexpected<Error> damaged(std::string_view why) {
  return fail(Errc::corrupted, fmt::format("the header of the result set is damaged: {}", why));
}

}  // namespace

ResultLayout result_layout(std::uint64_t slots, std::uint64_t value_bytes, std::uint64_t job_bytes,
                           bool has_more_npy) noexcept {
  ResultLayout layout;
  layout.slots_offset = kSlotsOffset;
  layout.order_offset = layout.slots_offset + slots * sizeof(SlotEntry);
  layout.job_offset = layout.order_offset + slots * sizeof(std::uint32_t);
  layout.npy_offset = whole_pages(layout.job_offset + job_bytes);
  layout.values_offset = layout.npy_offset + (has_more_npy ? kPageBytes : 0);
  layout.max_bytes = whole_pages(layout.values_offset + slots * value_bytes);
  return layout;
}

ResultLayout result_layout(const ResultRecord& record) noexcept {
  return result_layout(record.slots, record.is_ragged ? kMaxValueBytes : kMaxReasonBytes, record.job_bytes,
                       has_more_npy(record));
}

void write_result_header(std::byte* memory, const ResultRecord& record, const ResultLayout& layout,
                         std::span<const std::byte> job) noexcept {
  COWMGR_ASSERT(job.size() == record.job_bytes && record.name.size() <= kMaxNameBytes &&
                record.queue.size() <= kMaxNameBytes && record.npy_header.size() <= 2 * kPageBytes);
  std::copy(job.begin(), job.end(), memory + layout.job_offset);
  const auto npy_header = std::as_bytes(std::span(record.npy_header));
  const auto first_npy = npy_header.first(std::min<std::size_t>(npy_header.size(), kPageBytes));
  const auto more_npy = npy_header.subspan(first_npy.size());
  std::copy(first_npy.begin(), first_npy.end(), memory + kPageBytes);
  std::copy(more_npy.begin(), more_npy.end(), memory + layout.npy_offset);
  ::new (memory) ResultHeader{.magic = kMagic,
                              .layout_version = more_npy.empty() ? 1U : 2U,
                              .slot_bytes = sizeof(SlotEntry),
                              .set = record.set,
                              .slots = record.slots,
                              .order_offset = layout.order_offset,
                              .job_offset = layout.job_offset,
                              .job_bytes = record.job_bytes,
                              .values_offset = layout.values_offset,
                              .max_bytes = layout.max_bytes,
                              .settled = 0,
                              .maker = record.maker,
                              .token = record.token,
                              .created_us = record.created_us,
                              .owner_uid = record.owner_uid,
                              .owner_gid = record.owner_gid,
                              .mode = record.mode,
                              .flags = flags_of(record),
                              .attempts = record.attempts,
                              .lease_ms = record.lease_ms,
                              .name_bytes = static_cast<std::uint32_t>(record.name.size()),
                              .queue_bytes = static_cast<std::uint32_t>(record.queue.size()),
                              .name = {},
                              .queue = {},
                              .npy_crc = more_npy.empty() ? 0 : crc_of_page(more_npy),
                              .zero = {},
                              .crc = 0};
  auto& header = *std::launder(reinterpret_cast<ResultHeader*>(memory));
  std::copy(record.name.begin(), record.name.end(), header.name.begin());
  std::copy(record.queue.begin(), record.queue.end(), header.queue.begin());
  header.crc = crc_of(memory);
}

Result<ResultRecord> read_result_header(std::span<const std::byte, kSlotsOffset> pages,
                                        std::uint64_t size_bytes) {
  // The bytes need not lie where a header may.
  alignas(ResultHeader) std::array<std::byte, kPageBytes> first{};
  std::copy_n(pages.begin(), first.size(), first.begin());
  const auto& header = *reinterpret_cast<const ResultHeader*>(first.data());
  if (header.magic != kMagic) return damaged("no magic");
  if (header.layout_version > kVersion) {
    return fail(Errc::unsupported,
                fmt::format("the result set has layout version {}, this program reads up to {}; upgrade it",
                            header.layout_version, kVersion));
  }
  if (header.crc != crc_of(pages.data())) return damaged("the crc does not match");
  if (header.layout_version == 0 || header.slot_bytes != sizeof(SlotEntry) || header.set == 0)
    return damaged("it names no set");
  if (header.name_bytes > kMaxNameBytes || header.queue_bytes > kMaxNameBytes || header.slots == 0 ||
      header.slots > kMostSlots || header.job_bytes > kMaxJobBytes)
    return damaged("its counts are out of range");
  ResultRecord record{.set = header.set,
                      .slots = header.slots,
                      .job_bytes = header.job_bytes,
                      .name = std::string(header.name.data(), header.name_bytes),
                      .queue = std::string(header.queue.data(), header.queue_bytes),
                      .maker = header.maker,
                      .token = header.token,
                      .created_us = header.created_us,
                      .owner_uid = header.owner_uid,
                      .owner_gid = header.owner_gid,
                      .mode = header.mode,
                      .is_ragged = (header.flags & kFlagRagged) != 0,
                      .is_detached = (header.flags & kFlagDetached) != 0,
                      .replace = (header.flags & kFlagReplace) != 0,
                      .evictable = (header.flags & kFlagEvictable) != 0,
                      .attempts = header.attempts,
                      .lease_ms = header.lease_ms};
  if (!check_name(record.name) || (!record.queue.empty() && !check_name(record.queue)))
    return damaged("its name is malformed");
  if (!record.is_ragged) {
    const auto page = pages.subspan(kPageBytes);
    record.npy_header.assign(reinterpret_cast<const char*>(page.data()), page.size());
  }
  if (header.layout_version == 2) {
    if (record.is_ragged) return damaged("a ragged set has no output array");
    record.npy_header.resize(2 * kPageBytes);  // the rest is added by add_npy_header()
  }
  const ResultLayout layout = result_layout(record);
  if (header.order_offset != layout.order_offset || header.job_offset != layout.job_offset ||
      header.values_offset != layout.values_offset || header.max_bytes != layout.max_bytes)
    return damaged("its offsets are not those of its slots");
  if (size_bytes < layout.values_offset || size_bytes > layout.max_bytes)
    return damaged("the segment has another size");
  return record;
}

std::optional<std::uint64_t> more_npy_header(const ResultRecord& record) noexcept {
  if (!has_more_npy(record)) return std::nullopt;
  return result_layout(record).npy_offset;
}

Result<void> add_npy_header(ResultRecord& record, std::span<const std::byte, kSlotsOffset> pages,
                            std::span<const std::byte, kPageBytes> more) {
  std::uint32_t wanted = 0;
  std::memcpy(&wanted, pages.data() + offsetof(ResultHeader, npy_crc), sizeof wanted);
  if (wanted != crc_of_page(more)) return damaged("the crc of its output array's header does not match");
  std::memcpy(record.npy_header.data() + kPageBytes, more.data(), more.size());
  return {};
}

bool is_result_segment(std::span<const std::byte> first_page) noexcept {
  return first_page.size() >= kMagic.size() &&
         std::equal(kMagic.begin(), kMagic.end(), reinterpret_cast<const char*>(first_page.data()));
}

Result<ResultSegment> ResultSegment::open(const std::byte* memory, std::uint64_t set) {
  const ResultSegment segment(memory);
  const ResultHeader& header = segment.header();
  if (header.magic == kMagic && header.layout_version > kVersion) {
    return fail(Errc::unsupported,
                fmt::format("the result segment has layout version {}, this library knows {}; upgrade it",
                            header.layout_version, kVersion));
  }
  if (header.magic == kMagic && header.slot_bytes == sizeof(SlotEntry) && header.set == set) return segment;
  return fail(Errc::corrupted, "the segment is not that of the result set");
}

std::uint64_t ResultSegment::settled_at(std::uint64_t rank) const noexcept {
  const auto* order = reinterpret_cast<const std::uint32_t*>(memory_ + header().order_offset);
  return order[rank];
}

SlotSnapshot snapshot_of(const SlotEntry& entry) noexcept {
  const std::uint64_t word = entry.word.load(std::memory_order_acquire);
  SlotSnapshot slot{.state = static_cast<SlotState>(word & 0xFFU),
                    .attempt = static_cast<std::uint32_t>(word >> 32U),
                    .holder = entry.holder.load(std::memory_order_relaxed),
                    .since_us = entry.since_us.load(std::memory_order_relaxed)};
  if (slot.state != SlotState::committed && slot.state != SlotState::failed) return slot;
  slot.content = content_in(word);
  slot.place = entry.place;
  slot.size_bytes = entry.size_bytes;
  return slot;
}

SlotSnapshot ResultSegment::slot(std::uint64_t index) const noexcept {
  return snapshot_of(reinterpret_cast<const SlotEntry*>(memory_ + kSlotsOffset)[index]);
}

std::span<const std::byte> ResultSegment::value(const SlotSnapshot& slot) const noexcept {
  if (slot.content != SlotContent::value && slot.content != SlotContent::reason) return {};
  return {memory_ + slot.place, slot.size_bytes};
}

}  // namespace cowmgr
