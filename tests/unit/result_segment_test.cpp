#include "proto/result_segment.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/result_memory.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr std::uint64_t kSet = 77;

template <class T>
T read_at(const std::byte* memory, std::uint64_t offset) {
  T value{};
  std::memcpy(&value, memory + offset, sizeof value);
  return value;
}
template <class T>
void write_at(std::byte* memory, std::uint64_t offset, T value) {
  std::memcpy(memory + offset, &value, sizeof value);
}

// ---- How it is laid out: README.md, "Result segments" ----

std::vector<std::uint64_t> offsets_of(std::uint64_t slots, std::uint64_t value_bytes) {
  const ResultLayout layout = result_layout(slots, value_bytes);
  return {layout.slots_offset, layout.order_offset, layout.values_offset, layout.max_bytes};
}

TEST(ResultLayout, SlotsThenTheirOrderThenWholePagesOfValues) {
  EXPECT_THAT(offsets_of(1, 0), ElementsAre(8192, 8232, 12288, 12288));
  EXPECT_THAT(offsets_of(1, 1), ElementsAre(8192, 8232, 12288, 16384));
  EXPECT_THAT(offsets_of(100, 4096), ElementsAre(8192, 12192, 16384, 425984));
  EXPECT_THAT(offsets_of(1024, 4), ElementsAre(8192, 49152, 53248, 57344));  // 44 bytes a slot: 11 pages
  EXPECT_THAT(offsets_of(1025, 4), ElementsAre(8192, 49192, 57344, 65536));
}

TEST(ResultLayout, TheLargestSetsDoNotOverflow) {
  EXPECT_THAT(offsets_of(1U << 24U, kMaxValueBytes), ElementsAre(8192, 671096832, 738205696, 1100249833472));
  EXPECT_THAT(offsets_of(UINT32_MAX, kMaxValueBytes),
              ElementsAre(8192, 171798699992, 188978569216, 281663955214336));
}

TEST(ResultLayout, TheHeaderIsWhatItIs) {
  const ResultMemory memory(kSet, 100, 4096);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(memory.data()), 8), "COWMGRRS");
  EXPECT_EQ(read_at<std::uint32_t>(memory.data(), 8), 1U);
  EXPECT_EQ(read_at<std::uint32_t>(memory.data(), 12), 40U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 16), kSet);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 24), 100U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 32), 12192U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 40), 12592U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 48), 0U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 56), 16384U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 64), 425984U);
  EXPECT_EQ(read_at<std::uint64_t>(memory.data(), 72), 0U);
  EXPECT_TRUE(std::all_of(memory.data() + 4096, memory.data() + memory.layout().max_bytes,
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

// ---- Opening ----

TEST(ResultSegment, OpensWhatTheHeaderSaysItIs) {
  const ResultMemory memory(kSet, 3, 0);
  const auto segment = ResultSegment::open(memory.data(), kSet);
  ASSERT_THAT(segment, Succeeds());
  EXPECT_EQ(segment->slots(), 3U);
  EXPECT_EQ(segment->settled(), 0U);
}

TEST(ResultSegment, WhatIsNotTheSetsIsCorrupted) {
  ResultMemory memory(kSet, 3, 0);
  const auto open = [&](std::uint64_t set) { return ResultSegment::open(memory.data(), set); };
  EXPECT_THAT(open(kSet + 1), FailsWith(Errc::corrupted));
  write_at<std::uint32_t>(memory.data(), 12, 48);
  EXPECT_THAT(open(kSet), FailsWith(Errc::corrupted));
  write_at<std::uint32_t>(memory.data(), 12, 40);
  EXPECT_THAT(open(kSet), Succeeds());
  write_at<char>(memory.data(), 7, 'X');
  EXPECT_THAT(open(kSet), FailsWith(Errc::corrupted));
  write_at<std::uint32_t>(memory.data(), 8, 2);  // what has another magic has no version
  EXPECT_THAT(open(kSet), FailsWith(Errc::corrupted));
  std::memset(memory.data(), 0, kPageBytes);
  EXPECT_THAT(open(0), FailsWith(Errc::corrupted));
}

TEST(ResultSegment, ANewerLayoutIsUnsupportedWhateverElseItSays) {
  ResultMemory memory(kSet, 3, 0);
  write_at<std::uint32_t>(memory.data(), 8, 3);
  write_at<std::uint32_t>(memory.data(), 12, 48);
  const auto opened = ResultSegment::open(memory.data(), kSet + 1);
  ASSERT_THAT(opened, FailsWith(Errc::unsupported));
  EXPECT_THAT(opened.error().message, HasSubstr("version 3"));
}

// ---- Reading ----

// What the daemon writes for one slot, byte for byte.
void write_slot(ResultMemory& memory, std::uint64_t slot, std::uint64_t word, std::uint64_t place,
                std::uint64_t size_bytes) {
  const std::uint64_t at = 8192 + slot * 40;
  write_at<std::uint64_t>(memory.data(), at, word);
  write_at<std::uint64_t>(memory.data(), at + 8, 5);
  write_at<std::int64_t>(memory.data(), at + 16, -6);
  write_at<std::uint64_t>(memory.data(), at + 24, place);
  write_at<std::uint64_t>(memory.data(), at + 32, size_bytes);
}

TEST(ResultSegment, ASlotIsReadAsItLiesThere) {
  ResultMemory memory(kSet, 4, 0);
  write_slot(memory, 2, 0x0000'0009'0000'0302, 123, 456);
  const SlotSnapshot slot = memory.segment().slot(2);
  EXPECT_EQ(slot.state, SlotState::committed);
  EXPECT_EQ(slot.content, SlotContent::array);
  EXPECT_EQ(slot.attempt, 9U);
  EXPECT_EQ(slot.holder, 5U);
  EXPECT_EQ(slot.since_us, -6);
  EXPECT_EQ(slot.place, 123U);
  EXPECT_EQ(slot.size_bytes, 456U);
  const SlotSnapshot untouched = memory.segment().slot(3);
  EXPECT_EQ(untouched.state, SlotState::free);
  EXPECT_EQ(untouched.content, SlotContent::none);
  EXPECT_EQ(untouched.attempt, 0U);
}

TEST(ResultSegment, ASlotThatIsNotSettledPointsNowhere) {
  ResultMemory memory(kSet, 1, 0);
  write_slot(memory, 0, 0x0000'0002'0000'0001, UINT64_MAX, UINT64_MAX);  // leased; the rest is being written
  const SlotSnapshot slot = memory.segment().slot(0);
  EXPECT_EQ(slot.state, SlotState::leased);
  EXPECT_EQ(slot.place, 0U);
  EXPECT_EQ(slot.size_bytes, 0U);
  EXPECT_THAT(memory.segment().value(slot), IsEmpty());
}

// The daemon notes there which array the holder writes: nobody else may take that for the result.
TEST(ResultSegment, ASlotHoldsNothingUntilItIsSettled) {
  ResultMemory memory(kSet, 2, 0);
  write_slot(memory, 0, 0x0000'0001'0000'0301, 123, 456);  // leased, and its holder writes the array 123
  write_slot(memory, 1, 0x0000'0001'0000'0300, 123, 456);  // free
  for (const std::uint64_t index : {0U, 1U}) {
    const SlotSnapshot slot = memory.segment().slot(index);
    EXPECT_EQ(slot.content, SlotContent::none);
    EXPECT_EQ(slot.place, 0U);
    EXPECT_EQ(slot.size_bytes, 0U);
  }
}

TEST(ResultSegment, OnlyValuesAndReasonsLieInTheSegment) {
  ResultMemory memory(kSet, 4, 16);
  const std::uint64_t place = memory.layout().values_offset;
  std::memcpy(memory.data() + place, "valuereason", 11);
  write_slot(memory, 0, 0x102, place, 5);
  write_slot(memory, 1, 0x202, place, 5);
  write_slot(memory, 2, 0x302, place, 5);
  write_slot(memory, 3, 0x403, place + 5, 6);
  EXPECT_EQ(text_of(memory.segment(), 0), "");
  EXPECT_EQ(text_of(memory.segment(), 1), "value");
  EXPECT_EQ(text_of(memory.segment(), 2), "");
  EXPECT_EQ(text_of(memory.segment(), 3), "reason");
}

TEST(ResultSegment, TellsTheOrderInWhichSlotsWereSettled) {
  ResultMemory memory(kSet, 100, 0);
  write_at<std::uint32_t>(memory.data(), 12192, 99);
  write_at<std::uint32_t>(memory.data(), 12196, 3);
  write_at<std::uint64_t>(memory.data(), 72, 2);
  const ResultSegment segment = memory.segment();
  EXPECT_EQ(segment.settled(), 2U);
  EXPECT_EQ(segment.settled_at(0), 99U);
  EXPECT_EQ(segment.settled_at(1), 3U);
}

// ---- How rows are split ----

std::vector<Rows> split(std::uint64_t rows, std::uint64_t slots) {
  std::vector<Rows> all;
  for (std::uint64_t slot = 0; slot < slots; ++slot) all.push_back(rows_of_slot(rows, slots, slot));
  return all;
}

TEST(RowsOfSlot, AreSplitAsNumpySplitsThem) {
  // [len(x) for x in np.array_split(..)]: 4, 3, 3
  EXPECT_THAT(split(10, 3), ElementsAre(Rows{0, 4}, Rows{4, 7}, Rows{7, 10}));
  EXPECT_THAT(split(3, 5), ElementsAre(Rows{0, 1}, Rows{1, 2}, Rows{2, 3}, Rows{3, 3}, Rows{3, 3}));
  EXPECT_THAT(split(0, 2), ElementsAre(Rows{0, 0}, Rows{0, 0}));
  EXPECT_THAT(split(7, 1), ElementsAre(Rows{0, 7}));
}

TEST(RowsOfSlot, CoverEverythingOnceAndDifferByOneAtMost) {
  for (std::uint64_t rows = 0; rows < 70; ++rows) {
    for (std::uint64_t slots = 1; slots < 40; ++slots) {
      std::uint64_t next = 0;
      std::uint64_t last_count = rows / slots + 1;
      for (const Rows part : split(rows, slots)) {
        ASSERT_EQ(part.begin, next);
        ASSERT_GE(part.count(), rows / slots);
        ASSERT_LE(part.count(), last_count);  // the longer ones first
        last_count = part.count();
        next = part.end;
      }
      ASSERT_EQ(next, rows);
    }
  }
}

TEST(RowsOfSlot, DoNotOverflow) {
  for (const std::uint64_t rows : {(std::uint64_t{1} << 48U) - 1, std::uint64_t{UINT64_MAX}}) {
    EXPECT_EQ(rows_of_slot(rows, 1000, 999).end, rows);
    EXPECT_EQ(rows_of_slot(rows, 1000, 999).count(), rows / 1000);
  }
}

}  // namespace
}  // namespace cowmgr
