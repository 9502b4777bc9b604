#include "daemon/results.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/mapping.hpp"
#include "tests/support/store_fixture.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr SessionId kMe = 1, kOther = 2;

// ---- How rows are split ----

using Range = std::pair<std::uint64_t, std::uint64_t>;

std::vector<Range> ranges_of(std::uint64_t rows, std::uint64_t slots) {
  SlotTable table(rows, slots);
  std::vector<Range> ranges;
  while (const auto lease = table.lease_any(kMe)) ranges.emplace_back(lease->begin, lease->end);
  return ranges;
}

TEST(SlotRows, AreSplitAsNumpySplitsThem) {
  EXPECT_THAT(ranges_of(10, 3), ElementsAre(Range{0, 4}, Range{4, 7},
                                            Range{7, 10}));  // [len(x) for x in np.array_split(..)]: 4, 3, 3
  EXPECT_THAT(ranges_of(3, 5), ElementsAre(Range{0, 1}, Range{1, 2}, Range{2, 3}, Range{3, 3}, Range{3, 3}));
  EXPECT_THAT(ranges_of(0, 2), ElementsAre(Range{0, 0}, Range{0, 0}));
  EXPECT_THAT(ranges_of(7, 1), ElementsAre(Range{0, 7}));
}

TEST(SlotRows, CoverEverythingOnceAndDifferByOneAtMost) {
  for (std::uint64_t rows = 0; rows < 70; ++rows) {
    for (std::uint64_t slots = 1; slots < 40; ++slots) {
      std::uint64_t next = 0;
      std::uint64_t last_length = rows / slots + 1;
      for (const auto& [begin, end] : ranges_of(rows, slots)) {
        ASSERT_EQ(begin, next);
        ASSERT_GE(end - begin, rows / slots);
        ASSERT_LE(end - begin, last_length);  // the longer ones first
        last_length = end - begin;
        next = end;
      }
      ASSERT_EQ(next, rows);
    }
  }
}

TEST(SlotRows, DoNotOverflow) {
  const std::uint64_t rows = (std::uint64_t{1} << 48U) - 1;
  SlotTable table(rows, 1000);
  const auto last = table.lease(kMe, 999);
  ASSERT_THAT(last, Succeeds());
  EXPECT_EQ(last->end, rows);
  EXPECT_EQ(last->end - last->begin, rows / 1000);
}

// ---- Slots ----

TEST(SlotTable, LeasesTheLowestFreeSlotFirst) {
  SlotTable table(6, 3);
  EXPECT_EQ(table.lease_any(kMe)->slot, 0U);
  EXPECT_EQ(table.lease(kMe, 2)->slot, 2U);
  EXPECT_EQ(table.lease_any(kOther)->slot, 1U);
  EXPECT_EQ(table.lease_any(kOther), std::nullopt);
  EXPECT_THAT(table.give_back(kMe, 2), Succeeds());
  EXPECT_THAT(table.give_back(kMe, 0), Succeeds());
  EXPECT_EQ(table.lease_any(kOther)->slot, 0U);
}

TEST(SlotTable, EachLeaseIsOneAttemptMore) {
  SlotTable table(6, 2);
  EXPECT_EQ(table.lease_any(kMe)->attempt, 1U);
  EXPECT_THAT(table.give_back(kMe, 0), Succeeds());
  EXPECT_EQ(table.lease(kOther, 0)->attempt, 2U);
  EXPECT_EQ(table.give_back_all(kOther), 1U);
  const auto lease = table.lease_any(kMe);
  EXPECT_EQ(lease->slot, 0U);
  EXPECT_EQ(lease->attempt, 3U);
  EXPECT_EQ(table.lease_any(kMe)->attempt, 1U);
}

TEST(SlotTable, OnlyTheHolderEndsALease) {
  SlotTable table(6, 2);
  ASSERT_TRUE(table.lease_any(kMe));
  for (const SlotIndex slot : {SlotIndex{0}, SlotIndex{1}}) {
    EXPECT_THAT(table.commit(kOther, slot), FailsWith(Errc::not_holder));
    EXPECT_THAT(table.fail(kOther, slot), FailsWith(Errc::not_holder));
    EXPECT_THAT(table.give_back(kOther, slot), FailsWith(Errc::not_holder));
  }
  EXPECT_THAT(table.commit(0, 1), FailsWith(Errc::not_holder));
  for (const SlotIndex slot : {SlotIndex{2}, SlotIndex{UINT64_MAX}}) {
    EXPECT_THAT(table.lease(kMe, slot), FailsWith(Errc::not_found));
    EXPECT_THAT(table.commit(kMe, slot), FailsWith(Errc::not_found));
    EXPECT_THAT(table.fail(kMe, slot), FailsWith(Errc::not_found));
    EXPECT_THAT(table.give_back(kMe, slot), FailsWith(Errc::not_found));
  }
  EXPECT_THAT(table.lease(kOther, 0), FailsWith(Errc::busy));
  EXPECT_THAT(table.lease(kMe, 0), FailsWith(Errc::busy));
  EXPECT_EQ(table.leased(), 1U);
}

TEST(SlotTable, CommittedAndFailedAreFinal) {
  SlotTable table(6, 2);
  ASSERT_TRUE(table.lease_any(kMe) && table.lease_any(kMe));
  EXPECT_THAT(table.commit(kMe, 0), Succeeds());
  EXPECT_THAT(table.fail(kMe, 1), Succeeds());
  EXPECT_TRUE(table.is_settled());
  for (const auto& [slot, code] :
       std::map<SlotIndex, Errc>{{0, Errc::already_committed}, {1, Errc::slot_failed}}) {
    EXPECT_THAT(table.lease(kMe, slot), FailsWith(code));
    EXPECT_THAT(table.commit(kMe, slot), FailsWith(code));
    EXPECT_THAT(table.fail(kMe, slot), FailsWith(code));
    EXPECT_THAT(table.give_back(kMe, slot), FailsWith(code));
  }
  EXPECT_EQ(table.give_back_all(kMe), 0U);
  EXPECT_EQ(table.lease_any(kMe), std::nullopt);
  EXPECT_EQ(table.leases_of(kMe), 0U);
}

// A plain retelling of what a slot table does.
struct PlainSlots {
  enum class State { free, leased, committed, failed };
  struct Slot {
    State state = State::free;
    std::uint32_t attempt = 0;
    SessionId holder = 0;
  };
  std::vector<Slot> slots;

  [[nodiscard]] std::uint64_t count(State state) const {
    return static_cast<std::uint64_t>(
        std::count_if(slots.begin(), slots.end(), [&](const Slot& slot) { return slot.state == state; }));
  }
  [[nodiscard]] std::optional<SlotIndex> lowest_free() const {
    const auto at =
        std::find_if(slots.begin(), slots.end(), [](const Slot& slot) { return slot.state == State::free; });
    if (at == slots.end()) return std::nullopt;
    return static_cast<SlotIndex>(at - slots.begin());
  }
  void lease(SessionId session, SlotIndex slot) {
    slots[slot] = {State::leased, slots[slot].attempt + 1, session};
  }
  // What ending a lease gives: nothing, or the refusal.
  [[nodiscard]] std::optional<Errc> refusal(SessionId session, SlotIndex slot) const {
    if (slot >= slots.size()) return Errc::not_found;
    if (slots[slot].state == State::committed) return Errc::already_committed;
    if (slots[slot].state == State::failed) return Errc::slot_failed;
    if (slots[slot].state == State::leased && slots[slot].holder == session) return std::nullopt;
    return Errc::not_holder;
  }
};

class SlotWalk : public testing::TestWithParam<unsigned> {
 protected:
  static constexpr std::uint64_t kSlots = 40;

  std::uint64_t pick(std::uint64_t end) {
    return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_);
  }

  void lease_any(SessionId session) {
    const auto lease = table_.lease_any(session);
    const auto expected = model_.lowest_free();
    ASSERT_EQ(lease.has_value(), expected.has_value());
    if (!lease) return;
    model_.lease(session, *expected);
    ASSERT_EQ(lease->slot, *expected);
    ASSERT_EQ(lease->attempt, model_.slots[*expected].attempt);
  }

  void lease_one(SessionId session, SlotIndex slot) {
    const auto lease = table_.lease(session, slot);
    const bool is_free = slot < kSlots && model_.slots[slot].state == PlainSlots::State::free;
    ASSERT_EQ(lease.has_value(), is_free);
    if (!lease) return;
    model_.lease(session, slot);
    ASSERT_EQ(lease->attempt, model_.slots[slot].attempt);
  }

  void end(SessionId session, SlotIndex slot, PlainSlots::State state) {
    const auto refusal = model_.refusal(session, slot);
    const auto ended = state == PlainSlots::State::committed ? table_.commit(session, slot)
                       : state == PlainSlots::State::failed  ? table_.fail(session, slot)
                                                             : table_.give_back(session, slot);
    ASSERT_EQ(ended.has_value(), !refusal.has_value());
    if (refusal)
      ASSERT_EQ(ended.error().code, *refusal);
    else
      model_.slots[slot].state = state;
  }

  void end_session(SessionId session) {
    std::size_t expected = 0;
    for (auto& slot : model_.slots) {
      if (slot.state != PlainSlots::State::leased || slot.holder != session) continue;
      slot.state = PlainSlots::State::free;
      ++expected;
    }
    ASSERT_EQ(table_.give_back_all(session), expected);
    ASSERT_EQ(table_.leases_of(session), 0U);
  }

  void step() {
    using State = PlainSlots::State;
    const SessionId session = 1 + pick(4);
    const SlotIndex slot = pick(kSlots + 1);
    const auto what = pick(100);
    if (what < 40)
      lease_any(session);
    else if (what < 55)
      lease_one(session, slot);
    else if (what < 60)
      end(session, slot, State::committed);
    else if (what < 62)
      end(session, slot, State::failed);
    else if (what < 95)
      end(session, slot, State::free);
    else
      end_session(session);
  }

  void check() {
    using State = PlainSlots::State;
    ASSERT_EQ(table_.free(), model_.count(State::free));
    ASSERT_EQ(table_.leased(), model_.count(State::leased));
    ASSERT_EQ(table_.committed(), model_.count(State::committed));
    ASSERT_EQ(table_.failed(), model_.count(State::failed));
    ASSERT_EQ(table_.is_settled(), model_.count(State::committed) + model_.count(State::failed) == kSlots);
  }

 private:
  std::mt19937 random_{GetParam()};
  SlotTable table_{1000, kSlots};
  PlainSlots model_{std::vector<PlainSlots::Slot>(kSlots)};
};

TEST_P(SlotWalk, ATableDoesWhatAPlainModelDoes) {
  for (int i = 0; i < 3000 && !HasFatalFailure(); ++i) {
    step();
    check();
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, SlotWalk, testing::Range(1U, 9U));

// ---- Sets ----

class ResultSetsTest : public StoreTest {
 protected:
  using SetState = ResultSetRecord::State;

  // A set of `slots` slots, made by `session`.
  ArrayId make(SessionId session, const std::string& name, std::uint64_t slots, const Options& options) {
    const ArrayId id = write(session, name, options);
    results_.add(session, record(id), slots);
    return id;
  }
  ArrayId make(SessionId session, const std::string& name, std::uint64_t slots) {
    return make(session, name, slots, {.mode = 0660});
  }

  ResultSetRecord& set(ArrayId id) {
    const auto found = results_.find(kRoot, id);
    COWMGR_ASSERT(found.has_value());
    return **found;
  }
  bool is_there(ArrayId id) { return results_.find(kRoot, id).has_value(); }

  SlotIndex lease(SessionId session, ArrayId id) {
    const auto lease = results_.lease(session, set(id), std::nullopt);
    EXPECT_TRUE(lease && *lease);
    return lease && *lease ? (*lease)->slot : UINT64_MAX;
  }
  Result<void> commit(SessionId session, ArrayId id, SlotIndex slot) {
    return results_.commit(session, set(id), slot);
  }
  void lease_and_commit(SessionId session, ArrayId id) {
    EXPECT_THAT(commit(session, id, lease(session, id)), Succeeds());
  }
  std::vector<ArrayId> finish() { return results_.finish_settled(tick()); }
  // What the daemon does when a session ends.
  void end_session(SessionId session) {
    results_.close_session(session);
    store_->close_session(session);
  }

  ResultSets results_{*store_, kAdminUid};
};

TEST_F(ResultSetsTest, ChecksWhatConcernsSlots) {
  const auto check = [](ArraySpec spec, std::uint64_t slots) { return ResultSets::check(spec, slots); };
  EXPECT_THAT(check(bytes_spec(10), 1), Succeeds());
  EXPECT_THAT(check(bytes_spec(0), 5), Succeeds());
  EXPECT_THAT(check(bytes_spec(10), kMaxSlots), Succeeds());
  EXPECT_THAT(check(bytes_spec(10), 0), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(check(bytes_spec(10), kMaxSlots + 1), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(check({Dtype::of<float>(), {}}, 1), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(check({Dtype::of<float>(), {3, 4}, Order::fortran}, 1), FailsWith(Errc::invalid_argument));
}

TEST_F(ResultSetsTest, ASetBecomesAnArrayWhenAllSlotsAreCommittedAndUnmapped) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::running);
  lease_and_commit(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());  // nothing to be tried again: two sessions have it mapped
  EXPECT_EQ(set(id).state, SetState::sealing);
  results_.unmapped(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::sealing);
  results_.unmapped(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
  EXPECT_EQ(attach(kMate, "r"), id);
}

TEST_F(ResultSetsTest, WhoHoldsASlotHasTheSetMappedWhateverItSays) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  const SlotIndex held = lease(kMate, id);
  results_.unmapped(kMate, id);
  EXPECT_THAT(set(id).mapped, ElementsAre(kMate));
  EXPECT_THAT(commit(kMate, id, held), Succeeds());
  results_.unmapped(kMate, id);
  EXPECT_THAT(set(id).mapped, IsEmpty());
}

TEST_F(ResultSetsTest, ASetThatSomebodyStillMapsIsTriedAgain) {
  if (!env_.has_leases()) GTEST_SKIP() << "the kernel gives no leases here";
  const ArrayId id = make(kAlice, "r", 1);
  auto mapped =
      Mapping::map(record(id).segment.writer.get(), record(id).segment.size_bytes, Access::read_write);
  ASSERT_THAT(mapped, Succeeds());
  lease_and_commit(kMate, id);
  results_.unmapped(kMate, id);
  EXPECT_THAT(finish(), ElementsAre(id));
  EXPECT_THAT(finish(), ElementsAre(id));
  results_.explain(id, "process 13 still maps it");
  EXPECT_EQ(set(id).message, "process 13 still maps it");
  mapped = Mapping();
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
  EXPECT_EQ(set(id).message, "");
  EXPECT_EQ(attach(kMate, "r"), id);
}

TEST_F(ResultSetsTest, AFailedSetSaysWhyAndGivesItsMemoryBack) {
  const ArrayId id = make(kAlice, "r", 3);
  lease_and_commit(kMate, id);
  EXPECT_THAT(results_.fail(kMate, set(id), lease(kMate, id), "no such file"), Succeeds());
  EXPECT_THAT(results_.fail(kMate, set(id), lease(kMate, id), "too late"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_EQ(set(id).message, "slot 1: no such file");
  EXPECT_FALSE(exists(id));
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_THAT(results_.lease(kMate, set(id), SlotIndex{0}), FailsWith(Errc::already_committed));
}

TEST_F(ResultSetsTest, AFailedSlotDoesNotEndTheOthers) {
  const ArrayId id = make(kAlice, "r", 2);
  EXPECT_THAT(results_.fail(kMate, set(id), lease(kMate, id), "x"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::running);
  lease_and_commit(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
}

TEST_F(ResultSetsTest, ASetWhoseNameWasTakenMeanwhileFailsAndGivesItsMemoryBack) {
  const ArrayId id = make(kAlice, "r", 1);
  put(kAlice2, "r", {.replace = true});
  lease_and_commit(kAlice, id);
  results_.unmapped(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_THAT(set(id).message, HasSubstr("sealed by somebody else"));
  EXPECT_FALSE(exists(id));
  end_session(kAlice);
}

TEST_F(ResultSetsTest, ASetThatWasCutShortFails) {
  const ArrayId id = make(kAlice, "r", 1);
  lease_and_commit(kMate, id);
  results_.unmapped(kMate, id);
  ASSERT_EQ(::pwrite(record(id).segment.writer.get(), "!", 1, 0), 1);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_FALSE(exists(id));
}

TEST_F(ResultSetsTest, TheSlotsOfADeadWorkerAreFreeAgain) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  lease(kMate, id);
  EXPECT_EQ(results_.leases_of(kMate), 1U);
  end_session(kMate);
  EXPECT_EQ(results_.leases_of(kMate), 0U);
  EXPECT_THAT(set(id).mapped, IsEmpty());
  const auto again = results_.lease(kAlice2, set(id), std::nullopt);
  ASSERT_THAT(again, Succeeds());
  EXPECT_EQ((*again)->slot, 1U);
  EXPECT_EQ((*again)->attempt, 2U);
  EXPECT_THAT(commit(kAlice2, id, 1), Succeeds());
  results_.unmapped(kAlice2, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
}

TEST_F(ResultSetsTest, TheDeathOfTheLastWorkerThatMapsItLetsTheSetBeSealed) {
  const ArrayId id = make(kAlice, "r", 1);
  lease_and_commit(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::sealing);
  end_session(kMate);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
}

TEST_F(ResultSetsTest, ASetGoesWithItsOwnerInEveryStateAndItsArrayOnlyIfUnfinished) {
  const ArrayId running = make(kAlice, "running", 2);
  lease(kMate, running);
  const ArrayId sealing = make(kAlice, "sealing", 1);
  lease_and_commit(kMate, sealing);
  const ArrayId done = make(kAlice, "done", 1);
  lease_and_commit(kMate, done);
  results_.unmapped(kMate, done);
  const ArrayId failed = make(kAlice, "failed", 1);
  EXPECT_THAT(results_.fail(kMate, set(failed), lease(kMate, failed), "x"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(sealing).state, SetState::sealing);
  end_session(kAlice);
  for (const ArrayId id : {running, sealing, done, failed}) EXPECT_FALSE(is_there(id));
  EXPECT_THAT(listed(kRoot), ElementsAre("done"));
  EXPECT_EQ(results_.leases_of(kMate), 0U);
  EXPECT_THAT(finish(), IsEmpty());
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
}

TEST_F(ResultSetsTest, WhoMayNotWriteMayNotLease) {
  const ArrayId id = make(kAlice, "r", 1, {.mode = 0640});
  EXPECT_THAT(results_.open(kMate, "r"), Succeeds());
  EXPECT_THAT(results_.lease(kMate, set(id), std::nullopt), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_.open(kStranger, "r"), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_.find(kStranger, id), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_.find(kStranger, id + 1), FailsWith(Errc::not_found));
  EXPECT_THAT(results_.list(kStranger, "*", 0, 10), IsEmpty());
  EXPECT_THAT(results_.list(kMate, "*", 0, 10), ElementsAre(&set(id)));
  EXPECT_THAT(set(id).mapped, IsEmpty());
}

TEST_F(ResultSetsTest, OpenPrefersTheRunningSetToANewerOneThatIsDone) {
  EXPECT_THAT(results_.open(kAlice, "r"), FailsWith(Errc::not_found));
  const ArrayId running = make(kAlice, "r", 1, {.replace = true});
  const ArrayId done = make(kAlice2, "r", 1, {.replace = true});
  EXPECT_EQ(results_.open(kAlice, "r").value()->id, done);  // both run: the newer
  lease_and_commit(kAlice2, done);
  results_.unmapped(kAlice2, done);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(results_.open(kAlice, "r").value()->id, running);
  end_session(kAlice);
  EXPECT_EQ(results_.open(kAlice2, "r").value()->id, done);
}

TEST_F(ResultSetsTest, KnowsWhichArraysAreSets) {
  const ArrayId array = put(kAlice, "array");
  const ArrayId id = make(kAlice, "r", 1);
  EXPECT_TRUE(results_.contains(id));
  EXPECT_FALSE(results_.contains(array));
}

TEST_F(ResultSetsTest, ListsPageByPage) {
  const ArrayId first = make(kAlice, "a1", 1);
  make(kAlice, "b", 1);
  const ArrayId last = make(kAlice, "a2", 1);
  EXPECT_THAT(results_.list(kAlice, "a*", 0, 1), ElementsAre(&set(first)));
  EXPECT_THAT(results_.list(kAlice, "a*", first, 5), ElementsAre(&set(last)));
}

TEST_F(ResultSetsTest, EveryChangeHasANewRevisionAndIsTold) {
  const ArrayId id = make(kAlice, "r", 2);
  auto revision = set(id).revision;
  const auto expect_change = [&](const char* what) {
    EXPECT_GT(set(id).revision, revision) << what;
    EXPECT_THAT(results_.take_changed(), testing::Contains(id)) << what;
    revision = set(id).revision;
  };
  const SlotIndex slot = lease(kMate, id);
  expect_change("lease");
  EXPECT_THAT(results_.give_back(kMate, set(id), slot), Succeeds());
  expect_change("give back");
  lease_and_commit(kMate, id);
  expect_change("commit");
  EXPECT_THAT(commit(kMate, id, slot), FailsWith(Errc::already_committed));
  EXPECT_THAT(results_.take_changed(), IsEmpty());
  lease_and_commit(kMate, id);
  results_.unmapped(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  expect_change("done");
  end_session(kAlice);
  EXPECT_THAT(results_.take_changed(), testing::Contains(id));
}

}  // namespace
}  // namespace cowmgr
