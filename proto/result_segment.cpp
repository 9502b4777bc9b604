#include "proto/result_segment.hpp"

#include <new>

#include <fmt/format.h>

#include "proto/segment.hpp"

namespace cowmgr {
namespace {

constexpr std::array<char, 8> kMagic = {'C', 'O', 'W', 'M', 'G', 'R', 'R', 'S'};
constexpr std::uint32_t kVersion = 1;

constexpr std::uint64_t whole_pages(std::uint64_t size_bytes) noexcept {
  return (size_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

}  // namespace

ResultLayout result_layout(std::uint64_t slots, std::uint64_t value_bytes) noexcept {
  ResultLayout layout;
  layout.slots_offset = kPageBytes;
  layout.order_offset = layout.slots_offset + slots * sizeof(SlotEntry);
  layout.values_offset = whole_pages(layout.order_offset + slots * sizeof(std::uint32_t));
  layout.max_bytes = whole_pages(layout.values_offset + slots * value_bytes);
  return layout;
}

void write_result_header(std::byte* memory, std::uint64_t set, std::uint64_t slots,
                         const ResultLayout& layout) noexcept {
  ::new (memory) ResultHeader{.magic = kMagic,
                              .layout_version = kVersion,
                              .slot_bytes = sizeof(SlotEntry),
                              .set = set,
                              .slots = slots,
                              .order_offset = layout.order_offset,
                              .values_offset = layout.values_offset,
                              .max_bytes = layout.max_bytes,
                              .settled = 0};
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

SlotSnapshot ResultSegment::slot(std::uint64_t index) const noexcept {
  const auto& entry = reinterpret_cast<const SlotEntry*>(memory_ + kPageBytes)[index];
  const std::uint64_t word = entry.word.load(std::memory_order_acquire);
  SlotSnapshot slot{.state = static_cast<SlotState>(word & 0xFFU),
                    .content = static_cast<SlotContent>(word >> 8U & 0xFFU),
                    .attempt = static_cast<std::uint32_t>(word >> 32U),
                    .holder = entry.holder.load(std::memory_order_relaxed),
                    .since_us = entry.since_us.load(std::memory_order_relaxed)};
  if (slot.content == SlotContent::none) return slot;
  slot.place = entry.place;
  slot.size_bytes = entry.size_bytes;
  return slot;
}

std::span<const std::byte> ResultSegment::value(const SlotSnapshot& slot) const noexcept {
  if (slot.content != SlotContent::value && slot.content != SlotContent::reason) return {};
  return {memory_ + slot.place, slot.size_bytes};
}

}  // namespace cowmgr
