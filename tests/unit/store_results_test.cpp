// What result sets ask of the store: memory that is no array, and arrays that belong to a set.
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "daemon/store/store.hpp"
#include "tests/support/store_fixture.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class StoreForResults : public StoreTest {};

// ---- Arrays of others ----

TEST_F(StoreForResults, AnArrayCanBeMadeForAnotherOwner) {
  auto wanted = request("x", {.mode = 0666});
  wanted.owner = Ownership{kAliceUid, 1000, 0600};
  const auto id = store_->reserve(kMate, wanted, tick());
  ASSERT_THAT(id, Succeeds());
  EXPECT_THAT(store_->back(*id, make_segment(*id)), Succeeds());
  EXPECT_EQ(record(*id).owner.uid, kAliceUid);
  EXPECT_EQ(record(*id).writer_pid, 13);
  seal(kMate, *id);  // who writes it seals it, whoever owns it
  EXPECT_THAT(try_attach(kMate, {"x"}), FailsWith(Errc::permission_denied));
  EXPECT_EQ(attach(kAlice, "x"), *id);
}

TEST_F(StoreForResults, AnArrayOfTheHouseStaysWhenItsMakerGoesAndTheHouseSealsIt) {
  const auto id = store_->reserve(kAlice, request("x"), tick());
  ASSERT_THAT(id, Succeeds());
  EXPECT_THAT(store_->back(*id, make_segment(*id)), Succeeds());
  EXPECT_NE(store_->hand_to_daemon(*id), nullptr);
  EXPECT_EQ(record(*id).writer_pid, 11);
  EXPECT_EQ(record(*id).owner.uid, kAliceUid);
  EXPECT_EQ(store_->use_of(kAlice).writing, 0U);
  EXPECT_EQ(store_->use_of(kDaemonSession).writing, 1U);
  EXPECT_THAT(store_->seal(kAlice, *id, false, tick()), FailsWith(Errc::not_holder));
  store_->close_session(kAlice);
  EXPECT_TRUE(exists(*id));
  seal(kDaemonSession, *id);
  EXPECT_EQ(store_->use_of(kDaemonSession).writing, 0U);
  EXPECT_EQ(attach(kAlice2, "x"), *id);
}

// ---- The end of what belongs to something else ----

TEST_F(StoreForResults, RetireDropsWhatIsNotSealed) {
  const ArrayId reserved = reserve(kAlice, "reserved");
  const ArrayId writing = write(kAlice, "writing");
  store_->retire(reserved);
  store_->retire(writing);
  store_->retire(writing);
  store_->retire(12345);
  EXPECT_EQ(store_->size(), 0U);
  EXPECT_EQ(store_->use_of(kAlice).writing, 0U);
  store_->fail_backing(reserved);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreForResults, RetireEvictsWhatIsSealedUnlessItIsPinned) {
  const ArrayId sealed = put(kAlice, "sealed");
  const ArrayId viewed = put(kAlice, "viewed");
  const ArrayId pinned = put(kAlice, "pinned");
  const ArrayId tampered = put(kAlice, "tampered");
  attach(kAlice2, "viewed");
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  store_->mark_tampered(record(tampered).segment.lease.get());
  for (int i = 0; i < 2; ++i) {
    for (const ArrayId id : {sealed, viewed, pinned, tampered}) store_->retire(id);
  }
  EXPECT_FALSE(exists(sealed));
  EXPECT_FALSE(exists(tampered));
  EXPECT_EQ(record(viewed).state, State::draining);
  EXPECT_THAT(try_attach(kAlice, {"viewed"}), FailsWith(Errc::not_found));
  EXPECT_EQ(attach(kAlice2, "pinned"), pinned);
  release(kAlice2, viewed);
  EXPECT_FALSE(exists(viewed));
}

TEST_F(StoreForResults, TellsOnceWhichArraysAreGone) {
  const ArrayId aborted = write(kAlice, "aborted");
  const ArrayId evicted = put(kAlice, "evicted");
  const ArrayId viewed = put(kAlice, "viewed");
  attach(kAlice2, "viewed");
  EXPECT_THAT(store_->take_dropped(), IsEmpty());
  store_->abort(aborted);
  ASSERT_THAT(evict(kAlice, {"evicted", "viewed"}), Succeeds());
  EXPECT_THAT(store_->take_dropped(), ElementsAre(aborted, evicted));
  release(kAlice2, viewed);
  EXPECT_THAT(store_->take_dropped(), ElementsAre(viewed));
  EXPECT_THAT(store_->take_dropped(), IsEmpty());
}

// ---- Memory that is no array ----

TEST_F(StoreForResults, ASegmentThatIsNoArrayTakesRoomAndEvictsForIt) {
  const ArrayId evictable = put(kAlice, "evictable", {.pages = 60, .evictable = true});
  {
    auto room = store_->take_room(kAliceUid, 40 * kPageBytes);
    ASSERT_THAT(room, Succeeds());
    EXPECT_EQ(used_pages(), 100U);
    EXPECT_THAT(store_->take_room(kAliceUid, 61 * kPageBytes), FailsWith(Errc::out_of_memory));
    EXPECT_THAT(store_->extend(*room, 61 * kPageBytes), FailsWith(Errc::out_of_memory));
    EXPECT_TRUE(exists(evictable));
    EXPECT_THAT(store_->extend(*room, 1), FailsWith(Errc::out_of_memory));
    EXPECT_FALSE(exists(evictable));  // its memory is on its way back
    reclaim();
    EXPECT_THAT(store_->extend(*room, 20 * kPageBytes), Succeeds());
    EXPECT_EQ(used_pages(), 60U);
    room->shrink(20 * kPageBytes);
    EXPECT_EQ(used_pages(), 40U);
  }
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreForResults, ADiscardedSegmentTakesRoomUntilItIsReclaimed) {
  auto room = store_->take_room(kAliceUid, 3 * kPageBytes);
  ASSERT_THAT(room, Succeeds());
  const ArrayId id = store_->next_id();
  Segment segment = make_segment(id, 3 * kPageBytes, "");
  ASSERT_THAT(store_->extend(*room, 2 * kPageBytes), Succeeds());
  ASSERT_THAT(env_.grow(segment, 5 * kPageBytes), Succeeds());
  segment.size_bytes = 5 * kPageBytes;
  EXPECT_TRUE(has_name(id));
  store_->discard(*std::move(room), std::move(segment));
  EXPECT_FALSE(has_name(id));
  EXPECT_EQ(used_pages(), 5U);
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 5 * kPageBytes);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 0U);
}

TEST_F(StoreForResults, SegmentsAndArraysNeverShareAnId) {
  const ArrayId first = store_->next_id();
  const ArrayId array = put(kAlice, "x");
  EXPECT_EQ(array, first + 1);
  EXPECT_EQ(store_->next_id(), array + 1);
}

// Anybody may make a file of any name in /dev/shm.
TEST_F(StoreForResults, PassesOverNamesThatAreTaken) {
  const ArrayId first = store_->next_id();
  std::vector<Segment> taken;
  for (ArrayId id = first + 1; id <= first + 5; ++id) taken.push_back(make_segment(id, 2 * kPageBytes, ""));
  EXPECT_EQ(put(kAlice, "x"), first + 6);
  taken.clear();
}

TEST_F(StoreForResults, IdsGrowBeyondThoseOfAnEarlierDaemon) {
  const ArrayId first = store_->next_id();
  store_->note_id(first + 1000);
  EXPECT_EQ(store_->next_id(), first + 1001);
  store_->note_id(first);
  store_->note_id(UINT64_MAX);
  EXPECT_EQ(store_->next_id(), first + 1002);
}

// ---- Quotas ----

class StoreForResultsWithQuota : public StoreTest {
 protected:
  StoreForResultsWithQuota()
      : StoreTest(kCapacityPages, {.owner_bytes = 20 * kPageBytes, .owner_arrays = 3, .owner_sessions = 9}) {}
};

TEST_F(StoreForResultsWithQuota, MemoryThatIsNoArrayIsChargedToItsOwner) {
  constexpr std::uint64_t kTen = 10 * kPageBytes;
  auto room = store_->take_room(kAliceUid, kTen);
  ASSERT_THAT(room, Succeeds());
  EXPECT_THAT(store_->take_room(kAliceUid, kTen + 1), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(store_->extend(*room, kTen + 1), FailsWith(Errc::quota_exceeded));
  EXPECT_EQ(used_pages(), 10U);
  EXPECT_THAT(store_->extend(*room, kTen), Succeeds());
  EXPECT_THAT(try_reserve(kAlice, "x", {.pages = 2}), FailsWith(Errc::quota_exceeded));
  store_->discard(*std::move(room), make_segment(store_->next_id(), 2 * kTen, ""));
  put(kAlice, "x", {.pages = 18});
  put(kAlice, "y", {.pages = 2});
  {
    const auto third = store_->take_room(kAliceUid, 0);
    ASSERT_THAT(third, Succeeds());
    EXPECT_THAT(store_->take_room(kAliceUid, 0), FailsWith(Errc::quota_exceeded)) << "the fourth";
  }
  EXPECT_THAT(store_->take_room(kAliceUid, 0), Succeeds());
  put(kMate, "all of hers", {.pages = 20});
}

TEST_F(StoreForResultsWithQuota, MemoryThatWasNotToBeHadIsNotCharged) {
  std::vector<Room> rooms;
  const auto take = [&](uid_t user, std::uint64_t pages) {
    auto room = store_->take_room(user, pages * kPageBytes);
    ASSERT_THAT(room, Succeeds());
    rooms.push_back(*std::move(room));
  };
  for (const uid_t uid : {2001U, 2002U, 2003U, 2004U}) take(uid, 20);
  take(2005, 15);
  take(kAliceUid, 1);
  EXPECT_THAT(store_->take_room(kAliceUid, 10 * kPageBytes), FailsWith(Errc::out_of_memory));
  EXPECT_THAT(store_->extend(rooms.back(), 10 * kPageBytes), FailsWith(Errc::out_of_memory));
  rooms.pop_back();
  rooms.front() = {};
  EXPECT_THAT(store_->take_room(kAliceUid, 20 * kPageBytes), Succeeds());
}

TEST_F(StoreForResultsWithQuota, AnArrayForAnotherOwnerIsChargedToHim) {
  auto wanted = request("x", {.pages = 20});
  wanted.owner = Ownership{kAliceUid, 1000, 0600};
  const auto id = store_->reserve(kMate, wanted, tick());
  ASSERT_THAT(id, Succeeds());
  EXPECT_THAT(try_reserve(kAlice, "y", {.pages = 2}), FailsWith(Errc::quota_exceeded));
  put(kMate, "hers", {.pages = 20});
  store_->abort(*id);
  store_->fail_backing(*id);
  put(kAlice, "y", {.pages = 20});
}

}  // namespace
}  // namespace cowmgr
