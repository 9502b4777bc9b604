#include "daemon/store/slot_table.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/result_memory.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::Optional;

constexpr SessionId kMe = 1, kOther = 2;
constexpr std::uint64_t kSet = 7, kValueBytes = 64;

// `ms` after both clocks' start; the wall's starts later than the steady one's.
constexpr Tick tick_at(int ms) {
  return Tick(milliseconds(ms));
}
constexpr Moment at(int ms) {
  return {Time(milliseconds(1'000'000 + ms)), tick_at(ms)};
}
constexpr Moment kNow = at(0);

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// A table in memory that is all there, unless `backed_bytes` says less.
class Slots {
 public:
  explicit Slots(std::uint64_t slots, const SlotLimits& limits = {}, std::uint64_t values = UINT64_MAX)
      : memory_(kSet, slots, kValueBytes),
        table_(memory_.data(), slots,
               values == UINT64_MAX ? memory_.layout().max_bytes : memory_.layout().values_offset + values,
               limits) {}

  SlotTable* operator->() noexcept { return &table_; }
  // What readers see.
  [[nodiscard]] ResultSegment seen() const { return memory_.segment(); }
  [[nodiscard]] SlotSnapshot seen(SlotIndex slot) const { return seen().slot(slot); }
  [[nodiscard]] std::string text(SlotIndex slot) const { return text_of(seen(), slot); }
  [[nodiscard]] std::vector<SlotIndex> order() const {
    std::vector<SlotIndex> slots;
    for (std::uint64_t rank = 0; rank < seen().settled(); ++rank) slots.push_back(seen().settled_at(rank));
    return slots;
  }
  [[nodiscard]] const ResultLayout& layout() const noexcept { return memory_.layout(); }

  // Another daemon takes over what lies in the memory.
  [[nodiscard]] Result<void> restart(const SlotLimits& limits = {}, const Moment& now = kNow) {
    table_ = SlotTable(memory_.data(), table_.size(), table_.backed_bytes(), limits);
    return table_.adopt(now.tick);
  }
  // The bytes of a slot, to scribble on.
  [[nodiscard]] SlotEntry& entry(SlotIndex slot) noexcept {
    return reinterpret_cast<SlotEntry*>(memory_.data() + memory_.layout().slots_offset)[slot];
  }
  [[nodiscard]] ResultHeader& header() noexcept { return *reinterpret_cast<ResultHeader*>(memory_.data()); }

  // Leases the slot, which must be free.
  std::uint32_t lease(SessionId session, SlotIndex slot, const Moment& now = kNow) {
    const auto leased = table_.lease(session, slot, now);
    EXPECT_THAT(leased, Succeeds());
    return leased ? leased->attempt : 0;
  }

 private:
  ResultMemory memory_;
  SlotTable table_;
};

// ---- Leasing ----

TEST(SlotTable, LeasesTheLowestFreeSlotFirst) {
  Slots table(3);
  EXPECT_EQ(table->lease_any(kMe, kNow)->slot, 0U);
  EXPECT_EQ(table->lease(kMe, 2, kNow)->slot, 2U);
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 1U);
  EXPECT_FALSE(table->lease_any(kOther, kNow));
  EXPECT_THAT(table->give_back(kMe, 2, kNow.time), Succeeds());
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 0U);
}

TEST(SlotTable, EachLeaseIsOneAttemptMore) {
  Slots table(2);
  EXPECT_EQ(table->lease_any(kMe, kNow)->attempt, 1U);
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  EXPECT_EQ(table->lease(kOther, 0, kNow)->attempt, 2U);
  EXPECT_THAT(table->lose_all(kOther, "", kNow.time).slots, ElementsAre(0));
  const auto lease = table->lease_any(kMe, kNow);
  EXPECT_EQ(lease->slot, 0U);
  EXPECT_EQ(lease->attempt, 3U);
  EXPECT_EQ(table->lease_any(kMe, kNow)->attempt, 1U);
}

TEST(SlotTable, OnlyTheHolderEndsALease) {
  Slots table(2);
  ASSERT_TRUE(table->lease_any(kMe, kNow));
  const auto expect_refused = [&](SessionId session, SlotIndex slot, Errc code) {
    EXPECT_THAT(table->check_holder(session, slot), FailsWith(code));
    EXPECT_THAT(table->commit_rows(session, slot, kNow.time), FailsWith(code));
    EXPECT_THAT(table->commit_value(session, slot, bytes_of("x"), kNow.time), FailsWith(code));
    EXPECT_THAT(table->commit_array(session, slot, 9, 9, kNow.time), FailsWith(code));
    EXPECT_THAT(table->fail(session, slot, "x", false, kNow.time), FailsWith(code));
    EXPECT_THAT(table->give_back(session, slot, kNow.time), FailsWith(code));
  };
  for (const SlotIndex slot : {SlotIndex{0}, SlotIndex{1}}) expect_refused(kOther, slot, Errc::not_holder);
  expect_refused(0, 1, Errc::not_holder);
  for (const SlotIndex slot : {SlotIndex{2}, SlotIndex{UINT64_MAX}}) {
    EXPECT_THAT(table->lease(kMe, slot, kNow), FailsWith(Errc::not_found));
    expect_refused(kMe, slot, Errc::not_found);
  }
  EXPECT_THAT(table->lease(kOther, 0, kNow), FailsWith(Errc::busy));
  EXPECT_THAT(table->lease(kMe, 0, kNow), FailsWith(Errc::busy));
  EXPECT_THAT(table->check_holder(kMe, 0), Succeeds());
  EXPECT_EQ(table->leased(), 1U);
  EXPECT_EQ(table->value_bytes(), 0U);
}

TEST(SlotTable, CommittedAndFailedAreFinal) {
  Slots table(2);
  ASSERT_TRUE(table->lease_any(kMe, kNow) && table->lease_any(kMe, kNow));
  EXPECT_THAT(table->commit_rows(kMe, 0, kNow.time), Succeeds());
  EXPECT_THAT(table->fail(kMe, 1, "x", false, kNow.time), Optional(true));
  EXPECT_TRUE(table->is_settled());
  for (const auto& [slot, code] :
       std::map<SlotIndex, Errc>{{0, Errc::already_committed}, {1, Errc::slot_failed}}) {
    EXPECT_THAT(table->lease(kMe, slot, kNow), FailsWith(code));
    EXPECT_THAT(table->check_holder(kMe, slot), FailsWith(code));
    EXPECT_THAT(table->commit_rows(kMe, slot, kNow.time), FailsWith(code));
    EXPECT_THAT(table->commit_value(kMe, slot, {}, kNow.time), FailsWith(code));
    EXPECT_THAT(table->fail(kMe, slot, "y", false, kNow.time), FailsWith(code));
    EXPECT_THAT(table->give_back(kMe, slot, kNow.time), FailsWith(code));
  }
  EXPECT_THAT(table->lose_all(kMe, "z", kNow.time).slots, IsEmpty());
  EXPECT_FALSE(table->lease_any(kMe, kNow));
  EXPECT_EQ(table->leases_of(kMe), 0U);
  EXPECT_THAT(table.order(), ElementsAre(0, 1));
  EXPECT_EQ(table.text(1), "x");
}

// ---- What readers see ----

TEST(SlotTable, ReadersSeeWhoHasASlotSinceWhen) {
  Slots table(2);
  EXPECT_EQ(table.seen(1).since_us, 0);
  table.lease(kMe, 1, at(1));
  EXPECT_EQ(table.seen(1).state, SlotState::leased);
  EXPECT_EQ(table.seen(1).holder, kMe);
  EXPECT_EQ(table.seen(1).since_us, 1'000'001'000);
  EXPECT_THAT(table->give_back(kMe, 1, at(2).time), Succeeds());
  EXPECT_EQ(table.seen(1).state, SlotState::free);
  EXPECT_EQ(table.seen(1).holder, 0U);
  EXPECT_EQ(table.seen(1).attempt, 1U);
  EXPECT_EQ(table.seen(1).since_us, 1'000'002'000);
  table.lease(kOther, 1, at(3));
  EXPECT_THAT(table->commit_rows(kOther, 1, at(4).time), Succeeds());
  EXPECT_EQ(table.seen(1).holder, kOther);
  EXPECT_EQ(table.seen(1).attempt, 2U);
  EXPECT_EQ(table.seen(1).since_us, 1'000'004'000);
  EXPECT_EQ(table.seen(0).attempt, 0U);
}

TEST(SlotTable, ReadersSeeWhatWasCommittedInTheOrderOfSettling) {
  Slots table(5);
  for (SlotIndex slot = 0; slot < 5; ++slot) table.lease(kMe, slot);
  EXPECT_THAT(table->commit_value(kMe, 3, bytes_of("three"), kNow.time), Succeeds());
  EXPECT_THAT(table->commit_array(kMe, 1, 123, 456, kNow.time), Succeeds());
  EXPECT_THAT(table->fail(kMe, 4, "why", false, kNow.time), Optional(true));
  EXPECT_THAT(table->commit_rows(kMe, 2, kNow.time), Succeeds());
  EXPECT_THAT(table.order(), ElementsAre(3, 1, 4, 2));
  EXPECT_THAT(table->commit_value(kMe, 0, bytes_of("nil"), kNow.time), Succeeds());
  EXPECT_THAT(table.order(), ElementsAre(3, 1, 4, 2, 0));
  const std::vector<std::pair<SlotState, SlotContent>> expected = {{SlotState::committed, SlotContent::value},
                                                                   {SlotState::committed, SlotContent::array},
                                                                   {SlotState::committed, SlotContent::rows},
                                                                   {SlotState::committed, SlotContent::value},
                                                                   {SlotState::failed, SlotContent::reason}};
  for (SlotIndex slot = 0; slot < 5; ++slot) {
    EXPECT_EQ(table.seen(slot).state, expected[slot].first) << slot;
    EXPECT_EQ(table.seen(slot).content, expected[slot].second) << slot;
    EXPECT_EQ(table->slot(slot).content, expected[slot].second) << slot;
  }
  EXPECT_EQ(table.text(3), "three");
  EXPECT_EQ(table.text(4), "why");
  EXPECT_EQ(table.text(0), "nil");
  EXPECT_EQ(table.seen(1).place, 123U);
  EXPECT_EQ(table.seen(1).size_bytes, 456U);
  EXPECT_EQ(table->committed(), 4U);
  EXPECT_EQ(table->failed(), 1U);
}

TEST(SlotTable, AnEmptyValueIsAValue) {
  Slots table(1);
  table.lease(kMe, 0);
  EXPECT_THAT(table->commit_value(kMe, 0, {}, kNow.time), Succeeds());
  EXPECT_EQ(table.seen(0).content, SlotContent::value);
  EXPECT_EQ(table.seen(0).size_bytes, 0U);
  EXPECT_EQ(table->value_bytes(), 0U);
}

// ---- Room for values ----

TEST(SlotTable, ValuesTakeRoomUntilTheSegmentIsExtended) {
  Slots table(3, {}, 10);
  EXPECT_EQ(table->room_bytes(), 10U);
  for (SlotIndex slot = 0; slot < 3; ++slot) table.lease(kMe, slot);
  EXPECT_THAT(table->commit_value(kMe, 0, bytes_of("0123456789"), kNow.time), Succeeds());
  EXPECT_EQ(table->room_bytes(), 0U);
  EXPECT_EQ(table->value_bytes(), 10U);
  EXPECT_EQ(table->backed_bytes(), table.layout().values_offset + 10);
  table->extend(table.layout().values_offset + 15);
  EXPECT_EQ(table->room_bytes(), 5U);
  EXPECT_EQ(table->value_bytes(), 10U);
  EXPECT_THAT(table->commit_value(kMe, 1, bytes_of("abcde"), kNow.time), Succeeds());
  EXPECT_EQ(table.text(0), "0123456789");
  EXPECT_EQ(table.text(1), "abcde");
}

TEST(SlotTable, AReasonThatHasNoRoomIsLeftOut) {
  Slots table(3, {}, 10);
  for (SlotIndex slot = 0; slot < 3; ++slot) table.lease(kMe, slot);
  EXPECT_THAT(table->fail(kMe, 0, "eleven long", false, kNow.time), Optional(true));
  EXPECT_THAT(table->fail(kMe, 1, "ten in all", false, kNow.time), Optional(true));
  EXPECT_THAT(table->lose_all(kMe, "x", kNow.time).slots, ElementsAre(2));
  table.lease(kMe, 2);
  EXPECT_THAT(table->fail(kMe, 2, "x", false, kNow.time), Optional(true));
  EXPECT_EQ(table.text(0), "");
  EXPECT_EQ(table.text(1), "ten in all");
  EXPECT_EQ(table.text(2), "");
  for (SlotIndex slot = 0; slot < 3; ++slot) EXPECT_EQ(table.seen(slot).content, SlotContent::reason);
  EXPECT_EQ(table->room_bytes(), 0U);
}

TEST(SlotTableDeathTest, AValueWithoutRoomIsABug) {
  Slots table(1, {}, 3);
  table.lease(kMe, 0);
  EXPECT_DEATH((void)table->commit_value(kMe, 0, bytes_of("four"), kNow.time), "does not hold");
}

// ---- Attempts ----

TEST(SlotTable, WithoutALimitAWorkersWordIsFinalAndALostLeaseNeverIs) {
  Slots table(2);
  for (std::uint32_t attempt = 1; attempt < 50; ++attempt) {
    EXPECT_EQ(table.lease(kMe, 0), attempt);
    EXPECT_FALSE(table->lose_all(kMe, "x", kNow.time).first_failed);
  }
  table.lease(kMe, 1);
  EXPECT_THAT(table->fail(kMe, 1, "why", false, kNow.time), Optional(true));
  EXPECT_EQ(table.seen(0).state, SlotState::free);
  EXPECT_EQ(table.seen(1).state, SlotState::failed);
}

TEST(SlotTable, AFailureLeavesTheSlotFreeUntilItsAttemptsAreUsedUp) {
  Slots table(1, {.attempts = 3});
  for (const std::uint32_t attempt : {1U, 2U}) {
    EXPECT_EQ(table.lease(kMe, 0), attempt);
    EXPECT_THAT(table->fail(kMe, 0, "early", false, kNow.time), Optional(false));
    EXPECT_EQ(table.seen(0).state, SlotState::free);
    EXPECT_EQ(table->leases_of(kMe), 0U);
  }
  EXPECT_EQ(table->value_bytes(), 0U);
  EXPECT_EQ(table->lease_any(kOther, kNow)->attempt, 3U);
  EXPECT_THAT(table->fail(kOther, 0, "last", false, kNow.time), Optional(true));
  EXPECT_EQ(table.seen(0).state, SlotState::failed);
  EXPECT_EQ(table.seen(0).attempt, 3U);
  EXPECT_EQ(table.text(0), "last");
  EXPECT_TRUE(table->is_settled());
}

TEST(SlotTable, AFailureThatNoAttemptMendsIsFinalAtOnce) {
  Slots table(1, {.attempts = 3});
  table.lease(kMe, 0);
  EXPECT_THAT(table->fail(kMe, 0, "never", true, kNow.time), Optional(true));
  EXPECT_EQ(table.seen(0).state, SlotState::failed);
  EXPECT_EQ(table.seen(0).attempt, 1U);
  EXPECT_EQ(table.text(0), "never");
}

TEST(SlotTable, ALostLeaseFailsTheSlotAtItsLastAttempt) {
  Slots table(4, {.attempts = 2});
  for (const SlotIndex slot : {SlotIndex{1}, SlotIndex{3}}) {
    table.lease(kMe, slot);
    EXPECT_THAT(table->fail(kMe, slot, "early", false, kNow.time), Optional(false));
  }
  for (SlotIndex slot = 0; slot < 4; ++slot) table.lease(slot == 2 ? kOther : kMe, slot);
  const auto lost = table->lose_all(kMe, "killed", at(5).time);
  EXPECT_THAT(lost.slots, ElementsAre(0, 1, 3));
  EXPECT_THAT(lost.first_failed, Optional(SlotIndex{1}));
  EXPECT_THAT(table.order(), ElementsAre(1, 3));
  EXPECT_EQ(table.seen(0).state, SlotState::free);
  EXPECT_EQ(table.text(1), "killed");
  EXPECT_EQ(table.text(3), "killed");
  EXPECT_EQ(table.seen(3).since_us, 1'000'005'000);
  EXPECT_EQ(table->leases_of(kMe), 0U);
  EXPECT_EQ(table->leases_of(kOther), 1U);
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 0U);
  EXPECT_FALSE(table->lease_any(kOther, kNow));
}

TEST(SlotTable, ASlotThatIsGivenBackDoesNotFail) {
  Slots table(1, {.attempts = 1});
  table.lease(kMe, 0);
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  EXPECT_EQ(table.seen(0).state, SlotState::free);
  EXPECT_EQ(table.lease(kMe, 0), 2U);
  EXPECT_THAT(table->commit_rows(kMe, 0, kNow.time), Succeeds());
}

// ---- Deadlines ----

TEST(SlotTable, ALeaseEndsAtItsDeadlineNotBefore) {
  Slots table(2, {.lease = milliseconds(50)});
  EXPECT_FALSE(table->next_deadline());
  table.lease(kMe, 0, at(0));
  table.lease(kOther, 1, at(10));
  EXPECT_THAT(table->next_deadline(), Optional(tick_at(50)));
  EXPECT_THAT(table->expire(at(49)).slots, IsEmpty());
  EXPECT_THAT(table->expire(at(50)).slots, ElementsAre(0));
  EXPECT_EQ(table.seen(0).state, SlotState::free);
  EXPECT_EQ(table.seen(0).holder, 0U);
  EXPECT_EQ(table.seen(0).since_us, 1'000'050'000);
  EXPECT_EQ(table->leases_of(kMe), 0U);
  EXPECT_THAT(table->next_deadline(), Optional(tick_at(60)));
  EXPECT_THAT(table->expire(at(1000)).slots, ElementsAre(1));
  EXPECT_FALSE(table->next_deadline());
  EXPECT_EQ(table->lease_any(kMe, at(1000))->attempt, 2U);
  EXPECT_THAT(table->next_deadline(), Optional(tick_at(1050)));
}

TEST(SlotTable, LeasesThatEndTogetherAreLostInTheOrderOfTheirDeadlines) {
  Slots table(3, {.attempts = 1, .lease = milliseconds(50)});
  table.lease(kMe, 2, at(0));
  table.lease(kOther, 1, at(1));
  table.lease(kMe, 0, at(1));
  const auto lost = table->expire(at(51));
  EXPECT_THAT(lost.slots, ElementsAre(2, 0, 1));
  EXPECT_THAT(lost.first_failed, Optional(SlotIndex{2}));
  EXPECT_THAT(table.order(), ElementsAre(2, 0, 1));
  EXPECT_EQ(table.text(1), "no result within 50 ms");
}

TEST(SlotTable, WithoutALimitALeaseHasNoDeadline) {
  Slots table(1);
  table.lease(kMe, 0);
  EXPECT_FALSE(table->next_deadline());
  EXPECT_THAT(table->expire(at(1'000'000'000)).slots, IsEmpty());
  EXPECT_EQ(table->leased(), 1U);
}

TEST(SlotTable, ALeaseThatEndedOtherwiseHasNoDeadlineLeft) {
  Slots table(5, {.attempts = 2, .lease = milliseconds(50)});
  for (SlotIndex slot = 0; slot < 5; ++slot) table.lease(slot == 4 ? kOther : kMe, slot);
  EXPECT_THAT(table->commit_rows(kMe, 0, kNow.time), Succeeds());
  EXPECT_THAT(table->commit_value(kMe, 1, {}, kNow.time), Succeeds());
  EXPECT_THAT(table->fail(kMe, 2, "x", false, kNow.time), Succeeds());
  EXPECT_THAT(table->give_back(kMe, 3, kNow.time), Succeeds());
  EXPECT_TRUE(table->next_deadline());
  table->lose_all(kOther, "x", kNow.time);
  EXPECT_FALSE(table->next_deadline());
  table.lease(kMe, 2, at(30));
  EXPECT_THAT(table->expire(at(79)).slots, IsEmpty());
}

TEST(SlotTable, AHeldLeaseDoesNotRunOut) {
  Slots table(2, {.lease = milliseconds(50)});
  table.lease(kMe, 0);
  table.lease(kMe, 1);
  table->hold(0);
  EXPECT_THAT(table->expire(at(50)).slots, ElementsAre(1));
  EXPECT_THAT(table->check_holder(kMe, 0), Succeeds());
  table->hold(0);
  EXPECT_THAT(table->commit_array(kMe, 0, 9, 9, at(60).time), Succeeds());
}

TEST(SlotTable, WhoComesAfterTheDeadlineIsToldOfTheLimit) {
  Slots table(1, {.lease = milliseconds(50)});
  table.lease(kMe, 0);
  table->expire(at(50));
  const auto late = table->commit_rows(kMe, 0, at(50).time);
  ASSERT_THAT(late, FailsWith(Errc::not_holder));
  EXPECT_THAT(late.error().message, HasSubstr("50 ms"));
  table.lease(kOther, 0, at(50));
  EXPECT_THAT(table->commit_value(kMe, 0, bytes_of("late"), at(51).time), FailsWith(Errc::not_holder));
  EXPECT_THAT(table->commit_rows(kOther, 0, at(51).time), Succeeds());
  Slots endless(1);
  EXPECT_THAT(endless->commit_rows(kMe, 0, kNow.time).error().message, Not(HasSubstr("ms")));
}

// ---- Another daemon ----

TEST(SlotTable, AnotherDaemonTakesOverWhatTheSlotsSay) {
  Slots table(6);
  for (const SlotIndex slot : {0U, 1U, 2U, 4U}) table.lease(kMe, slot);
  EXPECT_THAT(table->commit_value(kMe, 2, bytes_of("two"), kNow.time), Succeeds());
  EXPECT_THAT(table->fail(kMe, 1, "why", true, kNow.time), Succeeds());
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  ASSERT_THAT(table.restart(), Succeeds());
  EXPECT_THAT(table->held_by(kMe), ElementsAre(4));
  EXPECT_THAT(table->holders(), ElementsAre(kMe));
  EXPECT_EQ(table->value_bytes(), 6U);
  EXPECT_THAT(table->first_failed(), Optional(std::pair(SlotIndex{1}, std::string("why"))));
  EXPECT_THAT(table.order(), ElementsAre(2, 1));
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 0U);
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 3U);
  EXPECT_EQ(table->lease_any(kOther, kNow)->slot, 5U);
  EXPECT_THAT(table->commit_value(kMe, 4, bytes_of("four"), kNow.time), Succeeds());
  EXPECT_EQ(table.text(2), "two");
  EXPECT_EQ(table.text(4), "four");
}

TEST(SlotTable, KnowsWhoseLeaseEndedWithItsCommit) {
  Slots table(1);
  table.lease(kMe, 0);
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  EXPECT_EQ(table.lease(kOther, 0), 2U);
  EXPECT_FALSE(table->was_committed(0, 2));
  EXPECT_THAT(table->commit_rows(kOther, 0, kNow.time), Succeeds());
  ASSERT_THAT(table.restart(), Succeeds());
  EXPECT_TRUE(table->was_committed(0, 2));
  EXPECT_FALSE(table->was_committed(0, 1));
  EXPECT_FALSE(table->was_committed(0, 0));
  EXPECT_FALSE(table->was_committed(1, 2));
}

TEST(SlotTable, AnArrayThatIsWrittenForASlotIsKnownToTheNextDaemon) {
  Slots table(2);
  table.lease(kMe, 0);
  table->note_array(0, 77);
  ASSERT_THAT(table.restart(), Succeeds());
  EXPECT_EQ(table->noted_array(0), 77U);
  EXPECT_EQ(table->slot(0).content, SlotContent::none) << "to everybody else it is no result yet";
  table->note_array(0, 0);
  EXPECT_EQ(table->noted_array(0), 0U);
  EXPECT_EQ(table->slot(0).state, SlotState::leased);
  table->note_array(0, 78);
  EXPECT_THAT(table->give_back(kMe, 0, kNow.time), Succeeds());
  EXPECT_EQ(table->noted_array(0), 0U);
}

// What came back goes alone where attempts are limited, with every daemon, wherever in the set it is.
TEST(SlotTable, ASlotThatCameBackIsKnownToTheNextDaemon) {
  const SlotLimits limits{.attempts = 3};
  Slots table(3, limits);
  for (const SlotIndex slot : {0U, 1U}) table.lease(kMe, slot);
  EXPECT_THAT(table->commit_rows(kMe, 0, kNow.time), Succeeds());
  EXPECT_THAT(table->lose_all(kMe, "", kNow.time).slots, ElementsAre(1));
  ASSERT_THAT(table.restart(limits), Succeeds());
  EXPECT_TRUE(table->is_next_to_go_alone());
  EXPECT_EQ(table->lease_any(kMe, kNow)->slot, 1U);
  EXPECT_FALSE(table->is_next_to_go_alone());
  EXPECT_EQ(table->lease_any(kMe, kNow)->slot, 2U);
}

// A daemon that died between the stores of a settled slot: the order is there or not, the count is not.
TEST(SlotTable, ASlotThatWasSettledButNotCountedIsCounted) {
  Slots table(4);
  for (const SlotIndex slot : {0U, 1U, 2U}) table.lease(kMe, slot);
  for (const SlotIndex slot : {2U, 0U, 1U}) EXPECT_THAT(table->commit_rows(kMe, slot, kNow.time), Succeeds());
  table.header().settled = 2;
  ASSERT_THAT(table.restart(), Succeeds());
  EXPECT_THAT(table.order(), ElementsAre(2, 0, 1));
  EXPECT_EQ(table->committed(), 3U);
}

TEST(SlotTable, DamagedSlotsAreNotTakenOver) {
  const auto word = [](SlotState state, SlotContent content) {
    return static_cast<std::uint64_t>(state) | static_cast<std::uint64_t>(content) << 8U |
           std::uint64_t{1} << 32U;
  };
  const auto expect_damaged = [&](std::uint64_t bad, std::uint64_t place, std::uint64_t size_bytes) {
    Slots table(3);
    table.lease(kMe, 1);
    table.entry(1).word = bad;
    table.entry(1).place = place;
    table.entry(1).size_bytes = size_bytes;
    EXPECT_THAT(table.restart(), FailsWith(Errc::corrupted)) << std::hex << bad;
  };
  const std::uint64_t values = Slots(3).layout().values_offset;
  const std::uint64_t end = Slots(3).layout().max_bytes;
  const std::uint64_t value = word(SlotState::committed, SlotContent::value);
  expect_damaged(4, values, 0);
  expect_damaged(word(SlotState::free, SlotContent::value), values, 0);
  expect_damaged(word(SlotState::leased, SlotContent::rows), values, 0);
  expect_damaged(word(SlotState::committed, SlotContent::reason), values, 0);
  expect_damaged(word(SlotState::failed, SlotContent::value), values, 0);
  expect_damaged(word(SlotState::failed, SlotContent::none), values, 0);
  expect_damaged(value, values - 1, 1);
  expect_damaged(value, end + 1, 0);
  expect_damaged(value, values, end - values + 1);
  expect_damaged(value, values, UINT64_MAX);
  Slots headless(1);
  headless.lease(kMe, 0);
  headless.entry(0).holder = 0;
  EXPECT_THAT(headless.restart(), FailsWith(Errc::corrupted));
}

// ---- Against a plain model ----

// A plain retelling of what a slot table does.
struct PlainSlots {
  struct Slot {
    SlotState state = SlotState::free;
    SlotContent content = SlotContent::none;
    std::uint32_t attempt = 0;
    SessionId holder = 0;
    std::optional<Tick> end{};
    std::string text{};
  };
  std::vector<Slot> slots;
  SlotLimits limits;
  std::vector<SlotIndex> order{};

  [[nodiscard]] std::uint64_t count(SlotState state) const {
    return static_cast<std::uint64_t>(
        std::count_if(slots.begin(), slots.end(), [&](const Slot& slot) { return slot.state == state; }));
  }
  [[nodiscard]] std::optional<SlotIndex> lowest_free() const {
    for (SlotIndex slot = 0; slot < slots.size(); ++slot) {
      if (slots[slot].state == SlotState::free) return slot;
    }
    return std::nullopt;
  }
  [[nodiscard]] std::optional<Tick> next_deadline() const {
    std::optional<Tick> next;
    for (const Slot& slot : slots) {
      if (slot.end && (!next || *slot.end < *next)) next = slot.end;
    }
    return next;
  }
  // What ending a lease gives: nothing, or the refusal.
  [[nodiscard]] std::optional<Errc> refusal(SessionId session, SlotIndex slot) const {
    if (slot >= slots.size()) return Errc::not_found;
    if (slots[slot].state == SlotState::committed) return Errc::already_committed;
    if (slots[slot].state == SlotState::failed) return Errc::slot_failed;
    if (slots[slot].state == SlotState::leased && slots[slot].holder == session) return std::nullopt;
    return Errc::not_holder;
  }

  void lease(SessionId session, SlotIndex slot, Tick now) {
    slots[slot] = {SlotState::leased, SlotContent::none, slots[slot].attempt + 1, session};
    if (limits.lease.count() > 0) slots[slot].end = now + limits.lease;
  }
  void set_free(SlotIndex slot) { slots[slot] = {.attempt = slots[slot].attempt}; }
  void settle(SlotIndex slot, SlotState state, SlotContent content, const std::string& text) {
    slots[slot] = {.state = state,
                   .content = content,
                   .attempt = slots[slot].attempt,
                   .holder = slots[slot].holder,
                   .text = text};
    order.push_back(slot);
  }
  void lose(SlotIndex slot, bool is_for_good, const std::string& reason, SlotTable::Lost& lost) {
    lost.slots.push_back(slot);
    if (!is_for_good) return set_free(slot);
    settle(slot, SlotState::failed, SlotContent::reason, reason);
    if (!lost.first_failed) lost.first_failed = slot;
  }
  [[nodiscard]] bool has_used_all(SlotIndex slot) const {
    return limits.attempts > 0 && slots[slot].attempt >= limits.attempts;
  }
};

class SlotWalk : public testing::TestWithParam<unsigned> {
 protected:
  static constexpr std::uint64_t kSlots = 40;

  std::uint64_t pick(std::uint64_t end) {
    return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_);
  }

  void lease_any(SessionId session) {
    const auto lease = table_->lease_any(session, now());
    const auto expected = model_.lowest_free();
    ASSERT_EQ(lease.has_value(), expected.has_value());
    if (!lease) return;
    model_.lease(session, *expected, now().tick);
    ASSERT_EQ(lease->slot, *expected);
    ASSERT_EQ(lease->attempt, model_.slots[*expected].attempt);
  }

  void lease_one(SessionId session, SlotIndex slot) {
    const auto lease = table_->lease(session, slot, now());
    const bool is_free = slot < kSlots && model_.slots[slot].state == SlotState::free;
    ASSERT_EQ(lease.has_value(), is_free);
    if (!lease) return;
    model_.lease(session, slot, now().tick);
    ASSERT_EQ(lease->attempt, model_.slots[slot].attempt);
  }

  template <class Ended>
  [[nodiscard]] bool agrees(const Ended& ended, SessionId session, SlotIndex slot) {
    const auto refusal = model_.refusal(session, slot);
    EXPECT_EQ(ended.has_value(), !refusal.has_value());
    if (!ended && refusal) {
      EXPECT_EQ(ended.error().code, *refusal);
    }
    return ended && !refusal;
  }

  void commit(SessionId session, SlotIndex slot) {
    const std::string text(pick(kValueBytes + 1), static_cast<char>('a' + slot % 26));
    switch (pick(3)) {
      case 0:
        if (agrees(table_->commit_rows(session, slot, now().time), session, slot))
          model_.settle(slot, SlotState::committed, SlotContent::rows, "");
        return;
      case 1:
        if (agrees(table_->commit_array(session, slot, slot, 1, now().time), session, slot))
          model_.settle(slot, SlotState::committed, SlotContent::array, "");
        return;
      default:
        if (agrees(table_->commit_value(session, slot, bytes_of(text), now().time), session, slot))
          model_.settle(slot, SlotState::committed, SlotContent::value, text);
    }
  }

  void fail(SessionId session, SlotIndex slot) {
    const std::string reason = fmt::format("reason {}", pick(1000));
    const auto failed = table_->fail(session, slot, reason, false, now().time);
    if (!agrees(failed, session, slot)) return;
    const bool is_final = model_.limits.attempts == 0 || model_.has_used_all(slot);
    ASSERT_EQ(*failed, is_final);
    SlotTable::Lost ignored;
    model_.lose(slot, is_final, reason, ignored);
  }

  void give_back(SessionId session, SlotIndex slot) {
    if (agrees(table_->give_back(session, slot, now().time), session, slot)) model_.set_free(slot);
  }

  void hold(SessionId session, SlotIndex slot) {
    if (model_.refusal(session, slot)) return;
    table_->hold(slot);
    model_.slots[slot].end.reset();
  }

  void end_session(SessionId session) {
    SlotTable::Lost expected;
    for (SlotIndex slot = 0; slot < kSlots; ++slot) {
      if (model_.refusal(session, slot)) continue;
      model_.lose(slot, model_.has_used_all(slot), "gone", expected);
    }
    expect_lost(table_->lose_all(session, "gone", now().time), expected);
    ASSERT_EQ(table_->leases_of(session), 0U);
  }

  // Leases begin anew with another daemon; all else is as it was.
  void restart() {
    ASSERT_THAT(table_.restart(limits(), now()), Succeeds());
    for (auto& slot : model_.slots) {
      if (slot.state == SlotState::leased && model_.limits.lease.count() > 0)
        slot.end = now().tick + model_.limits.lease;
    }
  }

  // Goes on to a time that may be a deadline, or just before one.
  void pass_time() {
    const auto next = model_.next_deadline();
    if (next && pick(2) == 0)
      now_ms_ += static_cast<int>((*next - now().tick) / milliseconds(1)) - (pick(2) == 0 ? 1 : 0);
    else
      now_ms_ += static_cast<int>(pick(9));
    SlotTable::Lost expected;
    for (;;) {
      const auto end = model_.next_deadline();
      if (!end || *end > now().tick) break;
      const auto at_end = [&](const PlainSlots::Slot& slot) { return slot.end == end; };
      const auto found = std::find_if(model_.slots.begin(), model_.slots.end(), at_end);
      const auto slot = static_cast<SlotIndex>(found - model_.slots.begin());
      model_.lose(slot, model_.has_used_all(slot), "no result within 20 ms", expected);
    }
    expect_lost(table_->expire(now()), expected);
  }

  static void expect_lost(const SlotTable::Lost& lost, const SlotTable::Lost& expected) {
    ASSERT_EQ(lost.slots, expected.slots);
    ASSERT_EQ(lost.first_failed, expected.first_failed);
  }

  void step() {
    const SessionId session = 1 + pick(4);
    const SlotIndex slot = pick(kSlots + 1);
    const auto what = pick(100);
    if (what < 40)
      lease_any(session);
    else if (what < 55)
      lease_one(session, slot);
    else if (what < 59)
      commit(session, slot);
    else if (what < 62)
      fail(session, slot);
    else if (what < 65)
      hold(session, slot);
    else if (what < 85)
      give_back(session, slot);
    else if (what < 92)
      pass_time();
    else if (what < 95)
      restart();
    else
      end_session(session);
  }

  void check() {
    ASSERT_EQ(table_->free(), model_.count(SlotState::free));
    ASSERT_EQ(table_->leased(), model_.count(SlotState::leased));
    ASSERT_EQ(table_->committed(), model_.count(SlotState::committed));
    ASSERT_EQ(table_->failed(), model_.count(SlotState::failed));
    ASSERT_EQ(table_->is_settled(), model_.order.size() == kSlots);
    ASSERT_EQ(table_->next_deadline(), model_.next_deadline());
    ASSERT_EQ(table_.order(), model_.order);
    std::uint64_t value_bytes = 0;
    for (SlotIndex slot = 0; slot < kSlots; ++slot) {
      const PlainSlots::Slot& expected = model_.slots[slot];
      const SlotSnapshot seen = table_.seen(slot);
      ASSERT_EQ(seen.state, expected.state) << slot;
      ASSERT_EQ(seen.content, expected.content) << slot;
      ASSERT_EQ(seen.attempt, expected.attempt) << slot;
      ASSERT_EQ(seen.holder, expected.holder) << slot;
      ASSERT_EQ(table_.text(slot), expected.text) << slot;
      value_bytes += expected.text.size();
    }
    ASSERT_EQ(table_->value_bytes(), value_bytes);
  }

 private:
  [[nodiscard]] Moment now() const { return at(now_ms_); }
  // Odd seeds: slots and leases without limits.
  static SlotLimits limits() {
    if (GetParam() % 2 == 1) return {};
    return {.attempts = 15, .lease = milliseconds(20)};
  }

  std::mt19937 random_{GetParam()};
  int now_ms_ = 0;
  Slots table_{kSlots, limits()};
  PlainSlots model_{std::vector<PlainSlots::Slot>(kSlots), limits()};
};

TEST_P(SlotWalk, ATableDoesWhatAPlainModelDoes) {
  for (int i = 0; i < 3000 && !HasFailure(); ++i) {
    step();
    check();
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, SlotWalk, testing::Range(1U, 9U));

}  // namespace
}  // namespace cowmgr
