#include "daemon/store/results.hpp"

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/results_fixture.hpp"

namespace cowmgr {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Optional;

// ---- Making and finding ----

TEST_F(ResultSetsTest, ChecksWhatConcernsSlots) {
  const auto check = [](ArraySpec spec, std::uint64_t slots) {
    return ResultSets::check({.name = "r", .spec = std::move(spec)}, {.slots = slots});
  };
  EXPECT_THAT(check(bytes_spec(10), 1), Succeeds());
  EXPECT_THAT(check(bytes_spec(0), 5), Succeeds());
  EXPECT_THAT(check(bytes_spec(10), kMaxSlots), Succeeds());
  EXPECT_THAT(check(bytes_spec(10), 0), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(check(bytes_spec(10), kMaxSlots + 1), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(check({Dtype::of<float>(), {}}, 1), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(check({Dtype::of<float>(), {3, 4}, Order::fortran}, 1), FailsWith(Errc::invalid_argument));
}

TEST_F(ResultSetsTest, TheNamesOfARaggedSetsArraysMustFit) {
  const auto check = [](std::size_t name_bytes, std::uint64_t slots) {
    return ResultSets::check({.name = std::string(name_bytes, 'r'), .spec = {Dtype::of<std::uint8_t>(), {}}},
                             {.slots = slots, .is_ragged = true});
  };
  EXPECT_THAT(check(253, 10), Succeeds());  // ".../9"
  EXPECT_THAT(check(253, 11), FailsWith(Errc::invalid_name));
  EXPECT_THAT(check(252, 11), Succeeds());
  EXPECT_THAT(check(10, 0), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(check(10, kMaxSlots + 1), FailsWith(Errc::invalid_argument));
}

TEST_F(ResultSetsTest, ASetTellsWhoMadeItWhenAndWhatItIs) {
  const ArrayId dense = make(kAlice, "d", 3, {.mode = 0640});
  EXPECT_EQ(set(dense).name, "d");
  EXPECT_EQ(set(dense).owner_pid, 11);
  EXPECT_EQ(set(dense).owner.uid, kAliceUid);
  EXPECT_EQ(set(dense).owner.mode, 0640U);
  EXPECT_EQ(set(dense).session, kAlice);
  EXPECT_EQ(set(dense).data_bytes, kPageBytes);
  EXPECT_EQ(set(dense).created, record(dense).created);
  EXPECT_EQ(set(dense).table.size(), 3U);
  const ArrayId ragged = make_ragged(kMate, "r", 2);
  EXPECT_EQ(set(ragged).owner_pid, 13);
  EXPECT_EQ(set(ragged).owner.uid, 1001U);
  EXPECT_EQ(set(ragged).data_bytes, 0U);
  EXPECT_FALSE(exists(ragged));
  EXPECT_EQ(results_->size(), 2U);
  EXPECT_EQ(results_->get(ragged), &set(ragged));
  EXPECT_EQ(results_->get(ragged + 100), nullptr);
}

TEST_F(ResultSetsTest, WhoMayNotWriteMayNotLease) {
  const ArrayId id = make(kAlice, "r", 1, {.mode = 0640});
  EXPECT_THAT(results_->open(kMate, "r"), Succeeds());
  EXPECT_THAT(results_->find(kMate, id), Succeeds());
  EXPECT_THAT(results_->find_to_work(kMate, id), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_->find_to_work(kAlice2, id), Succeeds());
  EXPECT_THAT(results_->open(kStranger, "r"), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_->find(kStranger, id), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_->find_to_work(kStranger, id), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_->find(kStranger, id + 100), FailsWith(Errc::not_found));
  EXPECT_THAT(results_->list(kStranger, {}, 0, 10).entries, IsEmpty());
  EXPECT_THAT(results_->list(kMate, {}, 0, 10).entries, ElementsAre(&set(id)));
  EXPECT_THAT(set(id).workers, IsEmpty());
}

TEST_F(ResultSetsTest, OpenPrefersTheRunningSetToANewerOneThatIsDone) {
  EXPECT_THAT(results_->open(kAlice, "r"), FailsWith(Errc::not_found));
  const ArrayId running = make(kAlice, "r", 1, {.replace = true});
  const ArrayId done = make(kAlice2, "r", 1, {.replace = true});
  EXPECT_EQ(results_->open(kAlice, "r").value()->id, done);  // both run: the newer
  lease_and_commit(kAlice2, done);
  results_->unmapped(kAlice2, done);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(results_->open(kAlice, "r").value()->id, running);
  end_session(kAlice);
  EXPECT_EQ(results_->open(kAlice2, "r").value()->id, done);
}

TEST_F(ResultSetsTest, KnowsWhichArraysAreSets) {
  const ArrayId array = put(kAlice, "array");
  const ArrayId id = make(kAlice, "r", 1);
  const ArrayId ragged = make_ragged(kAlice, "g", 1);
  const ArrayId allocated = allocate(kMate, ragged, lease(kMate, ragged));
  EXPECT_TRUE(results_->contains(id));
  EXPECT_TRUE(results_->contains(allocated));
  EXPECT_FALSE(results_->contains(array));
  EXPECT_THAT(commit_array(kMate, ragged, 0), Succeeds());
  EXPECT_FALSE(results_->contains(allocated));  // an array as any other now
}

TEST_F(ResultSetsTest, ListsPageByPage) {
  const ArrayId first = make(kAlice, "a1", 1);
  make(kAlice, "b", 1);
  const ArrayId last = make_ragged(kAlice, "a2", 1);
  const NameFilter filter{.pattern = *Glob::parse("a*")};
  const auto page = results_->list(kAlice, filter, 0, 1);
  EXPECT_THAT(page.entries, ElementsAre(&set(first)));
  EXPECT_EQ(page.next, first);
  EXPECT_THAT(results_->list(kAlice, filter, first, 5).entries, ElementsAre(&set(last)));
  EXPECT_EQ(results_->list(kAlice, filter, first, 5).next, 0U);
  EXPECT_THAT(results_->list(kAlice, {.name = "b"}, 0, 5).entries.size(), 1U);
}

TEST_F(ResultSetsTest, ANameIsTakenByAnOpenSetAndByAnyRaggedOne) {
  const auto check = [&](SessionId session, const std::string& name, bool replace) {
    return results_->check_name_is_free(session, name, replace);
  };
  EXPECT_THAT(check(kAlice, "r", false), Succeeds());
  make_ragged(kAlice, "r", 1, {.mode = 0640});
  EXPECT_THAT(check(kAlice, "r", false), FailsWith(Errc::already_exists));
  EXPECT_THAT(check(kAlice2, "r", true), Succeeds());
  EXPECT_THAT(check(kMate, "r", true), FailsWith(Errc::permission_denied));
  EXPECT_THAT(check(kAlice, "other", false), Succeeds());
  const ArrayId dense = make(kAlice, "d", 1);
  EXPECT_THAT(check(kAlice, "d", false), FailsWith(Errc::already_exists));
  lease_and_commit(kMate, dense);
  results_->unmapped(kMate, dense);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_THAT(check(kAlice, "d", false), Succeeds());  // an array by now: the store refuses
  const ArrayId ended = make_ragged(kAlice, "e", 1);
  EXPECT_THAT(results_->cancel(kAlice, set(ended), false), Succeeds());
  EXPECT_THAT(check(kAlice, "e", false), FailsWith(Errc::already_exists));
}

TEST_F(ResultSetsTest, ARaggedSetReplacesThoseOfItsName) {
  const ArrayId old = make_ragged(kAlice, "r", 2);
  const ArrayId other = make_ragged(kAlice, "other", 1);
  lease(kMate, old);
  lease(kMate, old);
  const ArrayId committed = allocate(kMate, old, 0);
  EXPECT_THAT(commit_array(kMate, old, 0), Succeeds());
  const ArrayId written = allocate(kMate, old, 1);
  const ArrayId fresh = make_ragged(kAlice2, "r", 1);
  EXPECT_FALSE(is_there(old));
  EXPECT_FALSE(exists(committed));
  EXPECT_FALSE(exists(written));
  EXPECT_TRUE(is_there(other));
  EXPECT_EQ(results_->open(kMate, "r").value()->id, fresh);
  EXPECT_TRUE(results_->take_changed().at(old).has_ended);
  reclaim();
  EXPECT_EQ(used_pages(), set_pages(other) + set_pages(fresh));
}

// ---- Dense sets ----

TEST_F(ResultSetsTest, ASetBecomesAnArrayWhenAllSlotsAreCommittedAndUnmapped) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::running);
  lease_and_commit(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());  // nothing to be tried again: two sessions have it mapped
  EXPECT_EQ(set(id).state, SetState::sealing);
  results_->unmapped(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::sealing);
  results_->unmapped(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
  EXPECT_EQ(attach(kMate, "r"), id);
  EXPECT_THAT(order(id), ElementsAre(0, 1));
  EXPECT_EQ(seen(id, 0).content, SlotContent::rows);
}

TEST_F(ResultSetsTest, WhoHoldsASlotHasTheSetMappedWhateverItSays) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  const SlotIndex held = lease(kMate, id);
  results_->unmapped(kMate, id);
  EXPECT_THAT(set(id).workers, ElementsAre(kMate));
  EXPECT_THAT(commit(kMate, id, held), Succeeds());
  results_->unmapped(kMate, id);
  EXPECT_THAT(set(id).workers, IsEmpty());
}

TEST_F(ResultSetsTest, ASetThatSomebodyStillMapsIsTriedAgain) {
  if (!env_.has_leases()) GTEST_SKIP() << "the kernel gives no leases here";
  const ArrayId id = make(kAlice, "r", 1);
  auto mapped =
      Mapping::map(record(id).segment.writer.get(), record(id).segment.size_bytes, Access::read_write);
  ASSERT_THAT(mapped, Succeeds());
  lease_and_commit(kMate, id);
  results_->unmapped(kMate, id);
  EXPECT_THAT(finish(), ElementsAre(id));
  EXPECT_THAT(finish(), ElementsAre(id));
  results_->explain(id, "process 13 still maps it");
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
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "no such file"), Succeeds());
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "too late"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_EQ(set(id).message, "slot 1: no such file");
  EXPECT_FALSE(exists(id));
  reclaim();
  EXPECT_EQ(used_pages(), set_pages(id));  // what its slots say can still be read
  EXPECT_EQ(text(id, 1), "no such file");
  EXPECT_EQ(text(id, 2), "too late");
  EXPECT_THAT(results_->lease(kMate, set(id), SlotIndex{0}, now()), FailsWith(Errc::already_committed));
}

TEST_F(ResultSetsTest, AFailedSlotDoesNotEndTheOthers) {
  const ArrayId id = make(kAlice, "r", 2);
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "x"), Succeeds());
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
  results_->unmapped(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_THAT(set(id).message, HasSubstr("sealed by somebody else"));
  EXPECT_FALSE(exists(id));
  end_session(kAlice);
}

TEST_F(ResultSetsTest, ASetThatWasCutShortFails) {
  const ArrayId id = make(kAlice, "r", 1);
  lease_and_commit(kMate, id);
  results_->unmapped(kMate, id);
  ASSERT_EQ(::pwrite(record(id).segment.writer.get(), "!", 1, 0), 1);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_FALSE(exists(id));
}

TEST_F(ResultSetsTest, ADoneSetIsForgottenWithItsArray) {
  const ArrayId id = make(kAlice, "r", 1);
  lease_and_commit(kMate, id);
  results_->forget_array(id);  // it is not done
  EXPECT_TRUE(is_there(id));
  results_->unmapped(kMate, id);
  EXPECT_THAT(finish(), IsEmpty());
  attach(kMate, "r");
  ASSERT_THAT(evict(kAlice, {"r"}), Succeeds());
  forget_dropped();
  EXPECT_TRUE(is_there(id));  // somebody views it still
  release(kMate, id);
  ignore_changes();
  forget_dropped();
  EXPECT_FALSE(is_there(id));
  EXPECT_TRUE(results_->take_changed().at(id).has_ended);
  results_->forget_array(id);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(ResultSetsTest, AFailedSetIsNotForgottenWithItsArray) {
  const ArrayId id = make(kAlice, "r", 1);
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "x"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  forget_dropped();
  EXPECT_EQ(set(id).message, "slot 0: x");
}

// ---- Leases ----

TEST_F(ResultSetsTest, ABatchIsAsLargeAsWasAskedOrAsThereIs) {
  const ArrayId id = make(kAlice, "r", 5);
  EXPECT_THAT(lease(kMate, id, 3, false), ElementsAre(0, 1, 2));
  EXPECT_THAT(lease(kAlice2, id, 3, false), ElementsAre(3, 4));
  EXPECT_THAT(lease(kAlice, id, 3, false), IsEmpty());
  EXPECT_THAT(set(id).workers, ElementsAre(kAlice2, kMate));  // who got none has nothing mapped
  EXPECT_EQ(results_->leases_of(kMate), 3U);
}

TEST_F(ResultSetsTest, SharesGetSmallerTowardsTheEnd) {
  const ArrayId id = make(kAlice, "r", 40);
  const auto share_of = [&](SessionId session) { return lease(session, id, 16, true).size(); };
  EXPECT_EQ(share_of(kMate), 16U);   // of 40, half is 20: it asked for less
  EXPECT_EQ(share_of(kMate), 12U);   // of 24, half
  EXPECT_EQ(share_of(kAlice2), 3U);  // of 12, the half of one of two workers
  EXPECT_EQ(share_of(kMate), 2U);
  EXPECT_EQ(share_of(kAlice), 1U);  // of 7, the half of one of three
  for (int left = 6; left > 0; --left) EXPECT_EQ(share_of(kMate), 1U);
  EXPECT_EQ(share_of(kMate), 0U);
}

TEST_F(ResultSetsTest, TheSlotsOfADeadWorkerAreFreeAgain) {
  const ArrayId id = make(kAlice, "r", 2);
  lease_and_commit(kMate, id);
  lease(kMate, id);
  EXPECT_EQ(results_->leases_of(kMate), 1U);
  end_session(kMate);
  EXPECT_EQ(results_->leases_of(kMate), 0U);
  EXPECT_THAT(set(id).workers, IsEmpty());
  const auto again = results_->lease(kAlice2, set(id), 1, false, now());
  ASSERT_THAT(again, testing::SizeIs(1));
  EXPECT_EQ(again.front().slot, 1U);
  EXPECT_EQ(again.front().attempt, 2U);
  EXPECT_THAT(commit(kAlice2, id, 1), Succeeds());
  results_->unmapped(kAlice2, id);
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

TEST_F(ResultSetsTest, ASlotFailsWhenItsWorkersDiedTooOften) {
  const ArrayId id = make(kAlice, "r", 2, {}, {.limits = {.attempts = 2}});
  EXPECT_EQ(lease(kMate, id), 0U);
  end_session(kMate, "process 13 was killed");
  EXPECT_EQ(seen(id, 0).state, SlotState::free);
  EXPECT_EQ(set(id).message, "");
  EXPECT_THAT(lease(kAlice2, id, 2, false), ElementsAre(0));
  EXPECT_THAT(lease(kAlice2, id, 2, false), ElementsAre(1));
  end_session(kAlice2, "process 12 was killed");
  EXPECT_EQ(seen(id, 0).state, SlotState::failed);
  EXPECT_EQ(seen(id, 1).state, SlotState::free);
  EXPECT_EQ(text(id, 0), "process 12 was killed");
  EXPECT_EQ(set(id).message, "slot 0: process 12 was killed");
  lease_and_commit(kAlice, id);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
}

// One of a batch may have killed its worker: at the next attempt each stands for itself.
TEST_F(ResultSetsTest, SlotsOfALostBatchAreTriedAgainOneByOne) {
  const ArrayId id = make(kAlice, "r", 6, {}, {.limits = {.attempts = 2}});
  EXPECT_THAT(lease(kMate, id, 3, false), ElementsAre(0, 1, 2));
  end_session(kMate, "killed");
  EXPECT_THAT(lease(kAlice, id, 6, false), ElementsAre(0));
  EXPECT_THAT(lease(kAlice, id, 6, true), ElementsAre(1));
  EXPECT_THAT(lease(kAlice, id, 6, false), ElementsAre(2));
  EXPECT_THAT(lease(kAlice, id, 6, false), ElementsAre(3, 4, 5));
}

TEST_F(ResultSetsTest, SlotsWithOneAttemptNeverShareABatch) {
  const ArrayId id = make(kAlice, "r", 3, {}, {.limits = {.attempts = 1}});
  for (SlotIndex slot = 0; slot < 3; ++slot) EXPECT_THAT(lease(kMate, id, 3, false), ElementsAre(slot));
}

TEST_F(ResultSetsTest, WithoutALimitOfAttemptsLostSlotsComeInBatchesAgain) {
  const ArrayId id = make(kAlice, "r", 3);
  lease(kMate, id, 2, false);
  end_session(kMate, "killed");
  EXPECT_THAT(lease(kAlice, id, 3, false), ElementsAre(0, 1, 2));
}

TEST_F(ResultSetsTest, AWorkersWordIsOneAttemptWhenThereAreMore) {
  const ArrayId id = make(kAlice, "r", 1, {}, {.limits = {.attempts = 2}});
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "busy disk"), Succeeds());
  EXPECT_EQ(set(id).message, "");
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "full disk"), Succeeds());
  EXPECT_EQ(set(id).message, "slot 0: full disk");
  EXPECT_EQ(text(id, 0), "full disk");
}

TEST_F(ResultSetsTest, LeasesEndAtTheirDeadline) {
  const ArrayId slow = make(kAlice, "slow", 1, {}, {.limits = {.lease = milliseconds(100)}});
  const ArrayId fast = make(kAlice, "fast", 1, {}, {.limits = {.lease = milliseconds(20)}});
  const ArrayId endless = make(kAlice, "endless", 1);
  EXPECT_FALSE(results_->next_deadline());
  for (const ArrayId id : {slow, fast, endless}) lease(kMate, id);
  EXPECT_THAT(results_->next_deadline(), Optional(tick_at(20)));
  pass(19);
  results_->expire(now());
  EXPECT_EQ(results_->leases_of(kMate), 3U);
  pass(1);
  results_->expire(now());
  EXPECT_EQ(results_->leases_of(kMate), 2U);
  EXPECT_EQ(seen(fast, 0).state, SlotState::free);
  EXPECT_THAT(set(fast).workers, ElementsAre(kMate));  // it has lost its lease, not its mapping
  EXPECT_THAT(results_->next_deadline(), Optional(tick_at(100)));
  EXPECT_THAT(commit(kMate, fast, 0), FailsWith(Errc::not_holder));
  EXPECT_EQ(lease(kAlice2, fast), 0U);
  EXPECT_THAT(results_->next_deadline(), Optional(tick_at(40)));
  EXPECT_THAT(commit(kAlice2, fast, 0), Succeeds());
  pass(1000);
  results_->expire(now());
  EXPECT_EQ(seen(endless, 0).state, SlotState::leased);
  EXPECT_FALSE(results_->next_deadline());
}

TEST_F(ResultSetsTest, ASlotThatTookTooLongTooOftenFails) {
  const ArrayId id = make_ragged(kAlice, "r", 1, {}, {.limits = {.attempts = 1, .lease = milliseconds(20)}});
  lease(kMate, id);
  const ArrayId array = allocate(kMate, id, 0);
  pass(20);
  results_->expire(now());
  EXPECT_FALSE(exists(array));
  EXPECT_EQ(seen(id, 0).state, SlotState::failed);
  EXPECT_EQ(set(id).message, "slot 0: no result within 20 ms");
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
}

// ---- Ragged sets ----

TEST_F(ResultSetsTest, ARaggedSetIsDoneAtOnceWhenEverySlotIsSettled) {
  const ArrayId id = make_ragged(kAlice, "r", 3);
  EXPECT_THAT(lease(kMate, id, 3, false), ElementsAre(0, 1, 2));
  EXPECT_THAT(commit_value(kMate, id, 2, "two"), Succeeds());
  const ArrayId array = allocate(kMate, id, 1, 5);
  EXPECT_EQ(record(array).name, "r/1");
  EXPECT_EQ(record(array).owner.uid, kAliceUid);
  EXPECT_THAT(commit_array(kMate, id, 1), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::running);
  EXPECT_THAT(commit_value(kMate, id, 0, ""), Succeeds());
  EXPECT_THAT(set(id).workers, ElementsAre(kMate));
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::done);
  EXPECT_EQ(set(id).message, "");
  EXPECT_THAT(order(id), ElementsAre(2, 1, 0));
  EXPECT_EQ(text(id, 2), "two");
  EXPECT_EQ(seen(id, 0).content, SlotContent::value);
  EXPECT_EQ(seen(id, 1).content, SlotContent::array);
  EXPECT_EQ(seen(id, 1).place, array);
  EXPECT_EQ(seen(id, 1).size_bytes, 3 * kPageBytes);
  EXPECT_EQ(attach(kAlice2, "r/1"), array);
}

TEST_F(ResultSetsTest, ARaggedSetThatFailedKeepsWhatWasCommitted) {
  const ArrayId id = make_ragged(kAlice, "r", 3);
  lease(kMate, id, 3, false);
  const ArrayId array = allocate(kMate, id, 0);
  EXPECT_THAT(commit_array(kMate, id, 0), Succeeds());
  const ArrayId given_up = allocate(kMate, id, 1);
  EXPECT_THAT(fail(kMate, id, 1, "bad input"), Succeeds());
  EXPECT_FALSE(exists(given_up));
  EXPECT_THAT(commit_value(kMate, id, 2, "v"), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(id).state, SetState::failed);
  EXPECT_EQ(set(id).message, "slot 1: bad input");
  EXPECT_EQ(text(id, 1), "bad input");
  EXPECT_EQ(text(id, 2), "v");
  EXPECT_EQ(attach(kAlice, "r/0"), array);
}

TEST_F(ResultSetsTest, WhatWasAllocatedGoesWhenItIsReplacedOrNotCommitted) {
  const ArrayId id = make_ragged(kAlice, "r", 4, {}, {.limits = {.attempts = 5}});
  lease(kMate, id, 4, false);
  std::vector<ArrayId> gone = {allocate(kMate, id, 0)};
  store_->retire(gone.back());  // its name has to be free for the next
  const ArrayId replaced = allocate(kMate, id, 0);
  EXPECT_FALSE(exists(gone.back()));
  EXPECT_TRUE(exists(replaced));
  for (const SlotIndex slot : {1U, 2U, 3U}) gone.push_back(allocate(kMate, id, slot));
  EXPECT_THAT(commit_value(kMate, id, 1, "a value after all"), Succeeds());
  EXPECT_THAT(results_->give_back(kMate, set(id), 2, now().time), Succeeds());
  EXPECT_THAT(fail(kMate, id, 3, "x"), Succeeds());
  for (const ArrayId array : gone) EXPECT_FALSE(exists(array)) << array;
  end_session(kMate);
  EXPECT_FALSE(exists(replaced));
  EXPECT_THAT(set(id).allocated, IsEmpty());
  reclaim();
  EXPECT_EQ(used_pages(), set_pages(id));
}

TEST_F(ResultSetsTest, AnAllocationTakesThePlaceOfTheOneBefore) {
  const ArrayId id = make_ragged(kAlice, "r", 1);
  lease(kMate, id);
  const ArrayId first = write(kMate, "first");
  const ArrayId second = write(kMate, "second");
  EXPECT_TRUE(results_->allocated(set(id), 0, first));
  EXPECT_TRUE(results_->allocated(set(id), 0, second));
  EXPECT_FALSE(exists(first));
  EXPECT_THAT(set(id).allocated, ElementsAre(testing::Pair(0, second)));
}

TEST_F(ResultSetsTest, OnlyTheHolderCommitsAnArray) {
  const ArrayId id = make_ragged(kAlice, "r", 2);
  lease(kMate, id);
  EXPECT_THAT(results_->begin_sealing(kMate, set(id), 0, 0), FailsWith(Errc::invalid_argument));
  const ArrayId array = allocate(kMate, id, 0);
  EXPECT_THAT(results_->begin_sealing(kAlice2, set(id), 0, 0), FailsWith(Errc::not_holder));
  EXPECT_THAT(results_->begin_sealing(kMate, set(id), 0, 2), FailsWith(Errc::not_holder));
  EXPECT_THAT(results_->begin_sealing(kMate, set(id), 1, 0), FailsWith(Errc::not_holder));
  const auto sealing = results_->begin_sealing(kMate, set(id), 0, 0);
  ASSERT_THAT(sealing, Succeeds());
  EXPECT_THAT(results_->commit_array(kMate, *sealing, now().time), FailsWith(Errc::not_holder));
  seal(kDaemonSession, array);
  EXPECT_THAT(set(id).allocated, testing::SizeIs(1));
  EXPECT_THAT(results_->commit_array(kMate, *sealing, now().time), Succeeds());
  EXPECT_THAT(set(id).allocated, IsEmpty());
}

TEST_F(ResultSetsTest, AnArrayWhoseSlotWasLostWhileItWasSealedGoes) {
  const ArrayId id = make_ragged(kAlice, "r", 1, {}, {.limits = {.lease = milliseconds(20)}});
  lease(kMate, id);
  const ArrayId array = allocate(kMate, id, 0);
  const auto sealing = results_->begin_sealing(kMate, set(id), 0, 0);
  ASSERT_THAT(sealing, Succeeds());
  pass(20);
  results_->expire(now());
  EXPECT_TRUE(exists(array)) << "its holder was in time";
  EXPECT_THAT(results_->give_back(kMate, set(id), 0, now().time), Succeeds());
  EXPECT_FALSE(exists(array));
  results_->give_up_sealing(kMate, *sealing, now().tick);
  EXPECT_THAT(results_->commit_array(kMate, *sealing, now().time), FailsWith(Errc::not_holder));
  pass(20);
  results_->expire(now());
  EXPECT_EQ(seen(id, 0).state, SlotState::free);
  EXPECT_EQ(set(id).table.leased(), 0U);
}

TEST_F(ResultSetsTest, TheArraysOfARaggedSetGoWithItButForPinnedAndViewedOnes) {
  const ArrayId id = make_ragged(kAlice, "r", 4);
  lease(kMate, id, 4, false);
  std::vector<ArrayId> arrays;
  for (const SlotIndex slot : {0U, 1U, 2U}) {
    arrays.push_back(allocate(kMate, id, slot));
    EXPECT_THAT(commit_array(kMate, id, slot), Succeeds());
  }
  arrays.push_back(allocate(kMate, id, 3));  // being written still
  ASSERT_THAT(pin(kAlice, {"r/1"}), Succeeds());
  attach(kAlice2, "r/2");
  end_session(kAlice);
  EXPECT_FALSE(is_there(id));
  EXPECT_FALSE(exists(arrays[0]));
  EXPECT_EQ(attach(kAlice2, "r/1"), arrays[1]);
  EXPECT_EQ(record(arrays[2]).state, State::draining);
  EXPECT_FALSE(exists(arrays[3]));
  release(kAlice2, arrays[2]);
  EXPECT_FALSE(exists(arrays[2]));
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
}

// ---- The end of the maker ----

TEST_F(ResultSetsTest, ASetGoesWithItsOwnerInEveryStateAndItsArrayOnlyIfUnfinished) {
  const ArrayId running = make(kAlice, "running", 2);
  lease(kMate, running);
  const ArrayId sealing = make(kAlice, "sealing", 1);
  lease_and_commit(kMate, sealing);
  const ArrayId done = make(kAlice, "done", 1);
  lease_and_commit(kMate, done);
  results_->unmapped(kMate, done);
  const ArrayId failed = make(kAlice, "failed", 1);
  EXPECT_THAT(fail(kMate, failed, lease(kMate, failed), "x"), Succeeds());
  const ArrayId cancelled = make(kAlice, "cancelled", 1);
  EXPECT_THAT(results_->cancel(kAlice, set(cancelled), false), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(sealing).state, SetState::sealing);
  end_session(kAlice);
  for (const ArrayId id : {running, sealing, done, failed, cancelled}) EXPECT_FALSE(is_there(id));
  EXPECT_THAT(listed(kRoot), ElementsAre("done"));
  EXPECT_EQ(results_->leases_of(kMate), 0U);
  EXPECT_THAT(finish(), IsEmpty());
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
}

TEST_F(ResultSetsTest, ADetachedSetOutlivesItsMakerAndIsFoundAfterwards) {
  const ArrayId dense = make(kAlice, "d", 2, {.mode = 0660}, {.is_detached = true});
  lease_and_commit(kAlice, dense);
  EXPECT_EQ(lease(kAlice, dense), 1U);  // it works itself, and dies at that
  end_session(kAlice);
  EXPECT_EQ(results_->open(kAlice2, "d").value()->id, dense);
  EXPECT_EQ(set(dense).session, 0U);
  EXPECT_EQ(set(dense).owner_pid, 11);
  EXPECT_EQ(set(dense).state, SetState::running);
  EXPECT_THAT(set(dense).workers, IsEmpty());
  EXPECT_EQ(lease(kMate, dense), 1U);
  EXPECT_THAT(commit(kMate, dense, 1), Succeeds());
  results_->unmapped(kMate, dense);
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(set(dense).state, SetState::done);
  EXPECT_EQ(attach(kAlice2, "d"), dense);
}

TEST_F(ResultSetsTest, ADetachedRaggedSetKeepsWhatItsDeadWorkersCommitted) {
  const ArrayId id = make_ragged(kAlice, "r", 3, {}, {.is_detached = true});
  lease(kMate, id, 3, false);
  const ArrayId kept = allocate(kMate, id, 0);
  EXPECT_THAT(commit_array(kMate, id, 0), Succeeds());
  EXPECT_THAT(commit_value(kMate, id, 1, "kept"), Succeeds());
  const ArrayId unfinished = allocate(kMate, id, 2);
  end_session(kMate);
  end_session(kAlice);
  EXPECT_EQ(results_->open(kAlice2, "r").value()->id, id);
  EXPECT_EQ(attach(kAlice2, "r/0"), kept);
  EXPECT_EQ(text(id, 1), "kept");
  EXPECT_FALSE(exists(unfinished));
  EXPECT_EQ(seen(id, 2).state, SlotState::free);
  EXPECT_EQ(lease(kAlice2, id), 2U);
  end_session(kAlice2);
  EXPECT_TRUE(is_there(id));  // it was never hers
  EXPECT_THAT(results_->cancel(kAdmin, set(id), false), Succeeds());
  EXPECT_THAT(results_->cancel(kAdmin, set(id), false), Succeeds());
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

// ---- Cancelling ----

TEST_F(ResultSetsTest, ACancelledSetGivesItsMemoryBackAndRefusesItsWorkers) {
  const ArrayId id = make(kAlice, "r", 2, {.mode = 0660}, {.limits = {.lease = milliseconds(20)}});
  lease(kMate, id);
  const auto revision = set(id).revision;
  EXPECT_THAT(results_->cancel(kAlice, set(id), false), Succeeds());
  EXPECT_EQ(set(id).state, SetState::cancelled);
  EXPECT_GT(set(id).revision, revision);
  EXPECT_TRUE(results_->take_changed().at(id).has_ended);
  EXPECT_THAT(results_->find_to_work(kMate, id), FailsWith(Errc::cancelled));
  EXPECT_THAT(results_->find(kMate, id), Succeeds());
  EXPECT_THAT(lease(kMate, id, 1, false), IsEmpty());
  EXPECT_FALSE(results_->next_deadline());
  EXPECT_FALSE(exists(id));
  reclaim();
  EXPECT_EQ(used_pages(), set_pages(id));
  EXPECT_THAT(finish(), IsEmpty());
  end_session(kMate);
  EXPECT_EQ(set(id).state, SetState::cancelled);
}

TEST_F(ResultSetsTest, ACancelledSetTakesItsLeasesBack) {
  const ArrayId id = make(kAlice, "r", 2);
  lease(kMate, id);
  EXPECT_THAT(results_->cancel(kAlice, set(id), false), Succeeds());
  EXPECT_EQ(results_->leases_of(kMate), 0U);
}

TEST_F(ResultSetsTest, ACancelledRaggedSetGivesItsArraysBack) {
  const ArrayId id = make_ragged(kAlice, "r", 3);
  lease(kMate, id, 3, false);
  const ArrayId committed = allocate(kMate, id, 0);
  EXPECT_THAT(commit_array(kMate, id, 0), Succeeds());
  const ArrayId written = allocate(kMate, id, 1);
  EXPECT_THAT(commit_value(kMate, id, 2, "v"), Succeeds());
  EXPECT_THAT(results_->cancel(kAlice2, set(id), false), Succeeds());
  EXPECT_FALSE(exists(committed));
  EXPECT_FALSE(exists(written));
  EXPECT_THAT(set(id).allocated, IsEmpty());
  reclaim();
  EXPECT_EQ(used_pages(), 0U) << "its own segment goes too";
  EXPECT_EQ(set(id).table.committed(), 2U) << "the counts are still told";
  EXPECT_THAT(results_->cancel(kAlice, set(id), false), Succeeds());
  EXPECT_FALSE(is_there(id));
}

TEST_F(ResultSetsTest, OnlyWhoMayWriteCancels) {
  const ArrayId id = make(kAlice, "r", 1, {.mode = 0640});
  EXPECT_THAT(results_->cancel(kMate, set(id), false), FailsWith(Errc::permission_denied));
  EXPECT_THAT(results_->cancel(kStranger, set(id), false), FailsWith(Errc::permission_denied));
  EXPECT_EQ(set(id).state, SetState::running);
  EXPECT_THAT(results_->cancel(kAlice, set(id), false), Succeeds());
  EXPECT_THAT(results_->cancel(kMate, set(id), false), FailsWith(Errc::permission_denied));
  EXPECT_TRUE(is_there(id));
}

TEST_F(ResultSetsTest, CancellingASetThatHasEndedForgetsItAndWhatItsSlotsHold) {
  const ArrayId dense = make(kAlice, "d", 1);
  lease_and_commit(kMate, dense);
  results_->unmapped(kMate, dense);
  const ArrayId failed = make(kAlice, "f", 1);
  EXPECT_THAT(fail(kMate, failed, lease(kMate, failed), "x"), Succeeds());
  const ArrayId ragged = make_ragged(kAlice, "r", 1);
  lease(kMate, ragged);
  const ArrayId array = allocate(kMate, ragged, 0);
  EXPECT_THAT(commit_array(kMate, ragged, 0), Succeeds());
  EXPECT_THAT(finish(), IsEmpty());
  ignore_changes();
  for (const ArrayId id : {dense, failed, ragged}) {
    EXPECT_THAT(results_->cancel(kAlice, set(id), false), Succeeds());
    EXPECT_FALSE(is_there(id));
    EXPECT_TRUE(results_->take_changed().at(id).has_ended);
  }
  EXPECT_EQ(attach(kMate, "d"), dense);
  EXPECT_FALSE(exists(array));
  EXPECT_EQ(results_->size(), 0U);
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
}

// ---- What changed ----

TEST_F(ResultSetsTest, EveryChangeHasANewRevisionAndIsTold) {
  const ArrayId id = make(kAlice, "r", 2, {}, {.limits = {.attempts = 3, .lease = milliseconds(20)}});
  ignore_changes();
  auto revision = set(id).revision;
  const auto expect_change = [&](const std::string& flags, const char* what) {
    EXPECT_GT(set(id).revision, revision) << what;
    EXPECT_EQ(changes_of(id), flags) << what;
    revision = set(id).revision;
  };
  const SlotIndex slot = lease(kMate, id);
  expect_change("changed", "lease");
  EXPECT_THAT(results_->give_back(kMate, set(id), slot, now().time), Succeeds());
  expect_change("changed free", "give back");
  EXPECT_THAT(fail(kMate, id, lease(kMate, id), "x"), Succeeds());
  expect_change("changed free", "fail, to be tried again");
  EXPECT_THAT(lease(kAlice, id, 5, false), ElementsAre(0));
  EXPECT_THAT(lease(kAlice, id, 5, false), ElementsAre(1));
  expect_change("changed", "lease of two");
  EXPECT_THAT(fail(kAlice, id, 0, "x"), Succeeds());
  expect_change("changed settled", "fail for good");
  pass(20);
  results_->expire(now());
  expect_change("changed free", "a lease ended");
  lease_and_commit(kMate, id);
  expect_change("changed settled", "commit");
  EXPECT_THAT(commit(kMate, id, 1), FailsWith(Errc::already_committed));
  EXPECT_THAT(fail(kMate, id, 0, "x"), FailsWith(Errc::slot_failed));
  EXPECT_THAT(results_->give_back(kMate, set(id), 0, now().time), FailsWith(Errc::slot_failed));
  results_->expire(now());
  EXPECT_THAT(results_->take_changed(), IsEmpty());
  results_->unmapped(kMate, id);
  expect_change("changed", "unmapped");
  EXPECT_THAT(finish(), IsEmpty());
  expect_change("changed ended", "failed");
  end_session(kAlice);
  EXPECT_EQ(changes_of(id), "changed ended");
}

TEST_F(ResultSetsTest, ASlotThatIsLostForGoodIsSettled) {
  const ArrayId id = make_ragged(kAlice, "r", 2, {}, {.limits = {.attempts = 1}});
  lease(kMate, id);
  ignore_changes();
  end_session(kMate);
  EXPECT_THAT(changes_of(id), HasSubstr("settled"));
  EXPECT_THAT(commit_value(kAlice, id, lease(kAlice, id), "v"), Succeeds());
  EXPECT_EQ(changes_of(id), "changed settled");
  EXPECT_THAT(finish(), IsEmpty());
  EXPECT_EQ(changes_of(id), "changed ended");
}

TEST_F(ResultSetsTest, WhatCannotBeSealedIsToldOnce) {
  const ArrayId id = make(kAlice, "r", 1);
  lease_and_commit(kMate, id);
  results_->explain(id, "too early");
  EXPECT_EQ(set(id).message, "");
  EXPECT_THAT(finish(), IsEmpty());
  ignore_changes();
  results_->explain(id, "process 13 still maps it");
  EXPECT_EQ(changes_of(id), "changed ended");
  results_->explain(id, "process 13 still maps it");
  results_->explain(id + 100, "no such set");
  EXPECT_THAT(results_->take_changed(), IsEmpty());
}

TEST_F(ResultSetsTest, ForgettingARunningSetLeavesNothingOfIt) {
  const ArrayId dense = make(kAlice, "d", 2);
  lease(kMate, dense);
  const ArrayId ragged = make_ragged(kAlice, "r", 2);
  lease(kMate, ragged);
  allocate(kMate, ragged, 0);
  EXPECT_THAT(results_->cancel(kMate, set(dense), true), Succeeds());
  EXPECT_THAT(results_->cancel(kAlice, set(ragged), true), Succeeds());
  EXPECT_FALSE(is_there(dense));
  EXPECT_FALSE(is_there(ragged));
  EXPECT_EQ(results_->leases_of(kMate), 0U);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

}  // namespace
}  // namespace cowmgr
