#include "daemon/store/store.hpp"

#include <chrono>
#include <fcntl.h>
#include <numeric>
#include <regex>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/mapping.hpp"
#include "tests/support/store_fixture.hpp"

namespace cowmgr {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

// ---- States and versions ----

TEST_F(StoreTest, AnArrayIsReservedThenWrittenThenSealed) {
  const ArrayId id = reserve(kAlice, "x");
  EXPECT_EQ(record(id).state, State::reserved);
  EXPECT_EQ(record(id).writer_pid, 11);
  EXPECT_THAT(store_->back(id, make_segment(id)), Succeeds());
  EXPECT_EQ(record(id).state, State::writing);
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::not_found));
  EXPECT_THAT(try_attach(kAlice, {}, {id}), FailsWith(Errc::not_found));
  seal(kAlice, id);
  EXPECT_EQ(record(id).state, State::sealed);
  EXPECT_EQ(record(id).writer_pid, 0);
  EXPECT_EQ(record(id).version, 1U);
  EXPECT_FALSE(record(id).segment.writer);
}

TEST_F(StoreTest, TheSealGivesTheWriterAViewIfItAsks) {
  const ArrayId kept = write(kAlice, "kept");
  EXPECT_THAT(store_->seal(kAlice, kept, true, tick()), testing::Optional(true));
  EXPECT_EQ(store_->views_of(kAlice, kept), 1U);
  EXPECT_EQ(store_->views_of(kAlice, put(kAlice, "put")), 0U);
  EXPECT_EQ(store_->use_of(kAlice).writing, 0U);
}

TEST_F(StoreTest, OnlyTheWriterSealsAndOnlyOnce) {
  const ArrayId reserved = reserve(kAlice, "reserved");
  EXPECT_THAT(store_->seal(kAlice, reserved, true, tick()), FailsWith(Errc::not_holder));
  const ArrayId id = write(kAlice, "x");
  EXPECT_THAT(store_->seal(kAlice2, id, true, tick()), FailsWith(Errc::not_holder));
  EXPECT_THAT(store_->seal(kAdmin, id, true, tick()), FailsWith(Errc::not_holder));
  EXPECT_THAT(store_->seal(kAlice, 12345, true, tick()), FailsWith(Errc::not_holder));
  seal(kAlice, id);
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), FailsWith(Errc::not_holder));
  store_->fail_backing(reserved);
}

TEST_F(StoreTest, ANameIsTakenWhileItIsWrittenAndAfterTheSeal) {
  const ArrayId id = write(kAlice, "x");
  EXPECT_THAT(try_reserve(kAlice2, "x"), FailsWith(Errc::already_exists));
  seal(kAlice, id);
  EXPECT_THAT(try_reserve(kAlice, "x"), FailsWith(Errc::already_exists));
  EXPECT_EQ(used_pages(), 3U);
}

TEST_F(StoreTest, AReplacedVersionDrainsUntilItsLastViewGoes) {
  const ArrayId old = put(kAlice, "x");
  EXPECT_EQ(attach(kAlice2, "x"), old);
  const ArrayId fresh = write(kAlice, "x", {.replace = true});
  EXPECT_EQ(record(fresh).version, 2U);
  EXPECT_EQ(attach(kAlice2, "x"), old);  // until the seal
  seal(kAlice, fresh);
  EXPECT_EQ(record(old).state, State::draining);
  EXPECT_TRUE(has_name(old)) << "the next daemon must find what is viewed";
  EXPECT_EQ(attach(kAlice2, "x"), fresh);
  release(kAlice2, old);
  EXPECT_TRUE(exists(old));
  release(kAlice2, old);
  EXPECT_FALSE(exists(old));
  EXPECT_EQ(used_pages(), 6U);
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
}

TEST_F(StoreTest, AnUnviewedVersionGoesAtOnceWhenItIsReplaced) {
  const ArrayId old = put(kAlice, "x");
  put(kAlice, "x", {.replace = true});
  EXPECT_FALSE(exists(old));
}

TEST_F(StoreTest, OfTwoWritersOfAName_TheHigherVersionCounts) {
  const ArrayId low = write(kAlice, "x", {.replace = true});
  const ArrayId high = write(kAlice2, "x", {.replace = true});
  seal(kAlice2, high);
  EXPECT_EQ(attach(kAlice, "x"), high);
  EXPECT_THAT(store_->seal(kAlice, low, true, tick()), testing::Optional(true));
  EXPECT_EQ(record(low).state, State::draining);  // its writer's view is all that it has
  EXPECT_EQ(attach(kAlice, "x"), high);
  release(kAlice, low);
  EXPECT_FALSE(exists(low));
}

TEST_F(StoreTest, ALowerVersionSealedLaterWithoutAViewIsGoneAtOnce) {
  const ArrayId low = write(kAlice, "x", {.replace = true});
  const ArrayId high = put(kAlice2, "x", {.replace = true});
  seal(kAlice, low);
  EXPECT_FALSE(exists(low));
  EXPECT_EQ(attach(kAlice, "x"), high);
}

TEST_F(StoreTest, WhoDidNotAskToReplaceIsRefusedAtTheSealToo) {
  const ArrayId first = write(kAlice, "x");
  const ArrayId second = put(kAlice2, "x", {.replace = true});
  EXPECT_THAT(store_->seal(kAlice, first, true, tick()), FailsWith(Errc::already_exists));
  EXPECT_EQ(record(first).state, State::writing);
  EXPECT_EQ(attach(kAlice, "x"), second);
  store_->abort(first);
  EXPECT_FALSE(exists(first));
}

TEST_F(StoreTest, ASealIsRefusedUntilNobodyCanWriteAnyMore) {
  const ArrayId id = write(kAlice, "x");
  auto writable =
      Mapping::map(record(id).segment.writer.get(), record(id).segment.size_bytes, Access::read_write);
  ASSERT_THAT(writable, Succeeds());
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), testing::Optional(false));
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), testing::Optional(false));
  EXPECT_EQ(record(id).state, State::writing);
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::not_found));
  writable = Mapping();
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), testing::Optional(true));
  EXPECT_EQ(attach(kAlice, "x"), id);
}

TEST_F(StoreTest, AnArrayWhoseWriterTamperedWithItsHeaderIsGone) {
  const ArrayId id = write(kAlice, "x");
  ASSERT_EQ(::pwrite(record(id).segment.writer.get(), "!", 1, 100), 1);
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), FailsWith(Errc::corrupted));
  EXPECT_FALSE(exists(id));
  EXPECT_EQ(store_->use_of(kAlice).writing, 0U);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

// ---- Names and types ----

TEST_F(StoreTest, RefusesNamesAndTypesThatCannotBe) {
  EXPECT_THAT(try_reserve(kAlice, ""), FailsWith(Errc::invalid_name));
  EXPECT_THAT(try_reserve(kAlice, std::string(256, 'x')), FailsWith(Errc::invalid_name));
  EXPECT_THAT(try_reserve(kAlice, "a\nb"), FailsWith(Errc::invalid_name));
  EXPECT_THAT(try_reserve(kAlice, "\xff"), FailsWith(Errc::invalid_name));
  auto wide = request("wide");
  wide.spec.shape.assign(33, 1);
  EXPECT_THAT(store_->reserve(kAlice, wide, tick()), FailsWith(Errc::invalid_shape));
  auto endless = request("endless");
  endless.spec.shape = {std::uint64_t{1} << 40U, std::uint64_t{1} << 40U};
  EXPECT_THAT(store_->reserve(kAlice, endless, tick()), FailsWith(Errc::invalid_shape));
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_EQ(store_->use_of(kAlice).writing, 0U);
}

TEST_F(StoreTest, ATypeWhoseTextDoesNotFitInTheHeaderIsRefused) {
  std::string text;
  for (int field = 0; field < 400; ++field)
    text += fmt::format("{}('field{:03}', '<f4')", field == 0 ? "[" : ", ", field);
  const auto dtype = Dtype::parse(text + "]");
  ASSERT_THAT(dtype, Succeeds());
  EXPECT_THAT(store_->reserve(kAlice, {.name = "x", .spec = {*dtype, {2}}}, tick()),
              FailsWith(Errc::invalid_dtype));
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreTest, ANameOf255BytesWithAnyCharacterIsFine) {
  const std::string odd = "../$(rm) */[\\" + std::string(242, 'x');
  ASSERT_EQ(odd.size(), 255U);
  const ArrayId id = put(kAlice, odd);
  EXPECT_EQ(attach(kAlice, odd), id);
}

TEST_F(StoreTest, AnEmptyArrayIsAnArray) {
  const ArrayId id = put(kAlice, "empty", {.pages = 2});
  EXPECT_EQ(record(id).data_bytes, 0U);
  EXPECT_EQ(attach(kAlice, "empty"), id);
}

// ---- Who may what ----

TEST_F(StoreTest, TheModeSaysWhoMayReadAndWrite) {
  put(kAlice, "private", {.mode = 0600});
  put(kAlice, "group", {.mode = 0640});
  put(kAlice, "all", {.mode = 0644});
  put(kAlice, "shared", {.mode = 0666});
  const Names all = {"private", "group", "all", "shared"};
  EXPECT_EQ(listed(kAlice2), all);
  EXPECT_EQ(listed(kRoot), all);
  EXPECT_EQ(listed(kAdmin), all);
  EXPECT_THAT(listed(kMate), ElementsAre("group", "all", "shared"));
  EXPECT_THAT(listed(kStranger), ElementsAre("all", "shared"));
  EXPECT_THAT(try_attach(kMate, {"private"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(try_attach(kStranger, {"group"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(store_->find(kStranger, "group"), FailsWith(Errc::permission_denied));
  EXPECT_THAT(try_attach(kMate, {"group"}), Succeeds());
  EXPECT_THAT(try_attach(kAdmin, {"private"}), Succeeds());
}

TEST_F(StoreTest, ReadingIsNotChanging) {
  put(kAlice, "x", {.mode = 0644});
  EXPECT_THAT(evict(kStranger, {"x"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(pin(kStranger, {"x"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(try_reserve(kStranger, "x", {.replace = true}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(evict(kStranger, {"*"}), FailsWith(Errc::not_found));
  EXPECT_THAT(evict_lru(kStranger, SIZE_MAX)->names, IsEmpty());
  EXPECT_THAT(evict(kRoot, {"x"}), Succeeds());
}

TEST_F(StoreTest, AModeWithoutTheOwnersBitsKeepsTheOwnerOut) {
  put(kAlice, "x", {.mode = 0044});
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(try_attach(kMate, {"x"}), Succeeds());
}

TEST_F(StoreTest, WhatAnotherUserIsWritingCannotBeOvertaken) {
  const ArrayId id = write(kAlice, "x");
  EXPECT_THAT(try_reserve(kStranger, "x", {.replace = true}), FailsWith(Errc::permission_denied));
  seal(kAlice, id);
  EXPECT_EQ(attach(kAlice, "x"), id);
}

// ---- Attaching ----

TEST_F(StoreTest, AttachIsAllOrNothing) {
  const ArrayId a = put(kAlice, "a");
  put(kMate, "b");
  EXPECT_THAT(try_attach(kAlice, {"a", "missing"}), FailsWith(Errc::not_found));
  EXPECT_THAT(try_attach(kAlice, {"a", "b"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(try_attach(kAlice, {"a"}, {999}), FailsWith(Errc::not_found));
  EXPECT_EQ(record(a).views, 0U);
  EXPECT_EQ(store_->use_of(kAlice).views, 0U);
  const auto found = try_attach(kAlice, {"a", "a"}, {a});
  ASSERT_THAT(found, Succeeds());
  EXPECT_THAT(*found, ElementsAre(&record(a), &record(a), &record(a)));
  EXPECT_EQ(store_->views_of(kAlice, a), 3U);
  EXPECT_EQ(store_->use_of(kAlice).view_bytes, 3 * kPageBytes);
}

TEST_F(StoreTest, FirstMissingIsTheFirstThatIsNotSealed) {
  put(kAlice, "a");
  write(kAlice, "b");
  const Names there = {"a", "a"};
  const Names some = {"a", "b", "c"};
  EXPECT_EQ(store_->first_missing(there), nullptr);
  EXPECT_EQ(store_->first_missing(some), &some[1]);
}

TEST_F(StoreTest, ReleasingWhatOneDoesNotHoldChangesNothing) {
  const ArrayId id = put(kAlice, "x");
  attach(kAlice2, "x");
  release(kAlice, id);
  release(kAlice, 999);
  EXPECT_EQ(record(id).views, 1U);
}

// They are counted at once: one by one it would take a minute, with the daemon standing still.
TEST_F(StoreTest, ASessionMaySayThatItHasVeryManyViews) {
  const ArrayId id = put(kAlice, "x");
  const auto start = std::chrono::steady_clock::now();
  store_->keep_only(kAlice, {{id, UINT32_MAX}}, {}, tick());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_GT(store_->views_of(kAlice, id), 4'000'000'000U);
  EXPECT_FALSE(store_->may_hold(kAlice2, id)) << "it has as many as one array may";
  store_->keep_only(kAlice, {}, {}, tick());
  EXPECT_EQ(record(id).views, 0U);
}

// ---- Evicting ----

TEST_F(StoreTest, EvictTakesTheNameNowAndTheMemoryWithTheLastView) {
  const ArrayId id = put(kAlice, "x");
  attach(kAlice2, "x");
  const auto evicted = evict(kAlice, {"x"});
  ASSERT_THAT(evicted, Succeeds());
  EXPECT_THAT(evicted->names, ElementsAre("x"));
  EXPECT_EQ(evicted->freed_bytes, 0U);
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::not_found));
  EXPECT_TRUE(has_name(id)) << "that of its file stays while it is viewed";
  EXPECT_EQ(store_->take_garbage().size(), 0U);
  const ArrayId again = put(kAlice, "x");
  EXPECT_EQ(record(again).version, 2U);
  release(kAlice2, id);
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 3 * kPageBytes);
  reclaim();
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 0U);
}

TEST_F(StoreTest, EvictSaysWhatItFreed) {
  put(kAlice, "a1");
  put(kAlice, "a2", {.pages = 5});
  put(kAlice, "b");
  const auto evicted = evict(kAlice, {"a*", "a1"});
  ASSERT_THAT(evicted, Succeeds());
  EXPECT_THAT(evicted->names, ElementsAre("a1", "a2"));
  EXPECT_EQ(evicted->freed_bytes, 8 * kPageBytes);
  EXPECT_THAT(listed(kAlice), ElementsAre("b"));
}

TEST_F(StoreTest, EvictIsAllOrNothing) {
  put(kAlice, "a");
  put(kAlice, "pinned");
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  put(kMate, "foreign");
  EXPECT_THAT(evict(kAlice, {"a", "missing"}), FailsWith(Errc::not_found));
  EXPECT_THAT(evict(kAlice, {"a", "missing*"}), FailsWith(Errc::not_found));
  EXPECT_THAT(evict(kAlice, {"a", "pinned"}), FailsWith(Errc::pinned));
  EXPECT_THAT(evict(kAlice, {"a", "foreign"}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(listed(kRoot), ElementsAre("a", "pinned", "foreign"));
}

TEST_F(StoreTest, AGlobPassesOverWhatIsPinned) {
  put(kAlice, "a1");
  put(kAlice, "a2");
  ASSERT_THAT(pin(kAlice, {"a1"}), Succeeds());
  EXPECT_THAT(evict(kAlice, {"a*"}), Succeeds());
  EXPECT_THAT(listed(kAlice), ElementsAre("a1"));
  EXPECT_THAT(evict(kAlice, {"a*"}), FailsWith(Errc::pinned));
  put(kAlice, "a3");
  ASSERT_THAT(pin(kAlice, {"a3"}), Succeeds());
  EXPECT_THAT(evict(kAlice, {"a*"}), FailsWith(Errc::pinned));
  ASSERT_THAT(unpin(kAlice, {"a*"}), Succeeds());
  EXPECT_THAT(evict(kAlice, {"a*"}), Succeeds());
  EXPECT_THAT(listed(kAlice), IsEmpty());
}

TEST_F(StoreTest, WhatIsBeingWrittenIsBusy) {
  write(kAlice, "x");
  EXPECT_THAT(evict(kAlice, {"x"}), FailsWith(Errc::busy));
  EXPECT_THAT(pin(kAlice, {"x"}), FailsWith(Errc::busy));
  EXPECT_THAT(evict(kAlice, {"*"}), FailsWith(Errc::not_found));
}

TEST_F(StoreTest, EvictLruTakesTheLeastRecentlyUsedUntilItIsEnough) {
  const ArrayId oldest = put(kAlice, "oldest");
  put(kAlice, "older");
  put(kAlice, "old");
  put(kAlice, "pinned");
  const ArrayId viewed = put(kAlice, "viewed");
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  attach(kAlice2, "viewed");
  attach(kAlice, "oldest");
  release(kAlice, oldest);  // now the most recent
  const auto evicted = evict_lru(kAlice, 3 * kPageBytes + 1);
  ASSERT_THAT(evicted, Succeeds());
  EXPECT_THAT(evicted->names, ElementsAre("older", "old"));
  EXPECT_EQ(evicted->freed_bytes, 6 * kPageBytes);
  EXPECT_THAT(evict_lru(kAlice, SIZE_MAX)->names, ElementsAre("oldest"));
  EXPECT_TRUE(exists(viewed));
  EXPECT_THAT(evict_lru(kAlice, SIZE_MAX)->names, IsEmpty());
}

// ---- Room ----

TEST_F(StoreTest, MakesRoomByEvictingTheLeastRecentlyUsed) {
  const ArrayId a = put(kAlice, "a", {.pages = 30, .evictable = true});
  const ArrayId b = put(kMate, "b", {.pages = 30, .evictable = true});
  const ArrayId c = put(kAlice, "c", {.pages = 30, .evictable = true});
  attach(kAlice, "a");
  release(kAlice, a);
  // Its memory is on its way back: the caller tries again when it has come.
  EXPECT_THAT(try_reserve(kStranger, "new", {.pages = 40}), FailsWith(Errc::out_of_memory));
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 30 * kPageBytes);
  EXPECT_FALSE(exists(b));
  reclaim();
  EXPECT_EQ(record(reserve(kStranger, "new", {.pages = 40})).name, "new");
  EXPECT_TRUE(exists(a) && exists(c));
  EXPECT_EQ(used_pages(), kCapacityPages);
  store_->fail_backing(store_->find(kRoot, "new").value()->id);
}

TEST_F(StoreTest, NobodyIsEvictedWhenThatWouldNotSuffice) {
  const ArrayId evictable = put(kAlice, "evictable", {.pages = 40, .evictable = true});
  put(kAlice, "plain", {.pages = 30});
  EXPECT_THAT(try_reserve(kAlice, "new", {.pages = 71}), FailsWith(Errc::out_of_memory));
  EXPECT_THAT(try_reserve(kAlice, "new", {.pages = 101}), FailsWith(Errc::out_of_memory));
  EXPECT_TRUE(exists(evictable));
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 0U);
}

TEST_F(StoreTest, PinnedViewedAndUnsealedArraysAreNotEvictedForRoom) {
  const Options options{.pages = 20, .evictable = true};
  put(kAlice, "pinned", options);
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  put(kAlice, "viewed", options);
  attach(kAlice2, "viewed");
  write(kAlice, "written", options);
  const ArrayId tampered = put(kAlice, "tampered", options);
  store_->mark_tampered(record(tampered).segment.lease.get());
  EXPECT_THAT(try_reserve(kAlice, "new", {.pages = 21}), FailsWith(Errc::out_of_memory));
  EXPECT_EQ(store_->size(), 4U);
  EXPECT_EQ(store_->memory_use().evictable_bytes, 0U);
}

TEST_F(StoreTest, OutOfMemorySaysWhereTheMemoryIs) {
  put(kAlice, "evictable", {.pages = 10, .evictable = true});
  put(kAlice, "pinned", {.pages = 20});
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  put(kAlice, "viewed", {.pages = 30});
  attach(kAlice2, "viewed");
  const auto refused = try_reserve(kAlice, "new", {.pages = 60});
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message,
              AllOf(HasSubstr("needs 240 KiB"), HasSubstr("capacity of 400 KiB"),
                    HasSubstr("160 KiB is free"), HasSubstr("40 KiB evictable"), HasSubstr("80 KiB pinned"),
                    HasSubstr("120 KiB viewed"), HasSubstr("held by process 12: 120 KiB")));
}

// The sizes that the sentence tells, in KiB: what is needed, the capacity, and its parts.
std::vector<std::uint64_t> sizes_in(const std::string& text) {
  std::vector<std::uint64_t> sizes;
  const std::regex size("([0-9]+) (B|KiB)[^:]");
  const std::string told = text.substr(0, text.find(" (held by"));
  for (std::sregex_iterator at(told.begin(), told.end(), size), end; at != end; ++at)
    sizes.push_back(std::stoull((*at)[1]));
  return sizes;
}

TEST_F(StoreTest, WhatOutOfMemorySaysAddsUpToTheCapacity) {
  put(kAlice, "evictable", {.pages = 10, .evictable = true});
  put(kAlice, "kept", {.pages = 11});
  put(kAlice, "pinned", {.pages = 12});
  ASSERT_THAT(pin(kAlice, {"pinned"}), Succeeds());
  put(kAlice, "viewed", {.pages = 13});
  attach(kAlice2, "viewed");
  put(kAlice, "drained", {.pages = 14});
  attach(kAlice2, "drained");
  ASSERT_THAT(evict(kAlice, {"drained"}), Succeeds());
  write(kAlice, "written", {.pages = 15});
  put(kAlice, "garbage", {.pages = 16});
  ASSERT_THAT(evict(kAlice, {"garbage"}), Succeeds());
  const auto slots = store_->take_room(kAliceUid, 2 * kPageBytes);
  ASSERT_THAT(slots, Succeeds());
  const auto refused = try_reserve(kAlice, "new", {.pages = 60});
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  const auto sizes = sizes_in(refused.error().message);
  ASSERT_GT(sizes.size(), 2U) << refused.error().message;
  EXPECT_EQ(std::accumulate(sizes.begin() + 2, sizes.end(), std::uint64_t{0}), sizes[1])
      << refused.error().message;
  EXPECT_THAT(refused.error().message,
              AllOf(HasSubstr("44 KiB kept"), HasSubstr("60 KiB being written"), HasSubstr("56 KiB draining"),
                    HasSubstr("8 KiB in result sets"), HasSubstr("64 KiB being given back")));
  reclaim();
}

TEST_F(StoreTest, TheAdviceFitsWhatTakesTheRoom) {
  const auto advice = [&](std::uint64_t pages) {
    const auto refused = try_reserve(kAlice, "new", {.pages = pages});
    const std::string message = refused ? "" : refused.error().message;
    return message.substr(std::min(message.size(), message.find("; ", message.find(';') + 1) + 2));
  };
  EXPECT_EQ(advice(kCapacityPages + 1), "start the daemon with a larger --capacity");
  put(kAlice, "kept", {.pages = 90});
  EXPECT_EQ(advice(kCapacityPages + 1), "start the daemon with a larger --capacity") << "whatever is evicted";
  EXPECT_EQ(advice(20),
            "evict arrays that are kept, or put them as evictable; or start the daemon with a larger "
            "--capacity");
  ASSERT_THAT(pin(kAlice, {"kept"}), Succeeds());
  EXPECT_EQ(advice(20), "unpin arrays; or start the daemon with a larger --capacity");
}

TEST_F(StoreTest, OutOfMemoryNamesTheThreeLargestHolders) {
  write(kAlice, "a", {.pages = 10});
  write(kAlice2, "b", {.pages = 20});
  write(kMate, "c", {.pages = 30});
  write(kStranger, "d", {.pages = 5});
  const auto refused = try_reserve(kRoot, "new", {.pages = 90});
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message,
              HasSubstr("(held by process 13: 120 KiB, process 12: 80 KiB, process 11: 40 KiB)"));
}

TEST_F(StoreTest, TheWholeCapacityCanBeUsed) {
  put(kAlice, "x", {.pages = kCapacityPages});
  EXPECT_THAT(try_reserve(kAlice, "y", {.pages = 2}), FailsWith(Errc::out_of_memory));
  EXPECT_EQ(store_->memory_use().used_bytes, store_->memory_use().capacity_bytes);
}

// ---- Quotas ----

class StoreWithQuota : public StoreTest {
 protected:
  StoreWithQuota()
      : StoreTest(kCapacityPages, {.owner_bytes = 20 * kPageBytes, .owner_arrays = 3, .owner_sessions = 9}) {}
};

TEST_F(StoreWithQuota, AnOwnerHoldsSoManyBytesAndArraysOverAllSessions) {
  put(kAlice, "a", {.pages = 15});
  EXPECT_THAT(try_reserve(kAlice2, "b", {.pages = 6}), FailsWith(Errc::quota_exceeded));
  write(kAlice2, "b", {.pages = 3});
  put(kMate, "other", {.pages = 20});
  put(kAlice, "c", {.pages = 2});
  EXPECT_THAT(try_reserve(kAlice2, "d", {.pages = 2}), FailsWith(Errc::quota_exceeded));
}

TEST_F(StoreWithQuota, EveryWayOutGivesTheQuotaBack) {
  const Options all{.pages = 20};
  store_->fail_backing(reserve(kAlice, "not backed", all));
  store_->abort(write(kAlice, "aborted", all));
  put(kAlice, "evicted", all);
  ASSERT_THAT(evict(kAlice, {"evicted"}), Succeeds());
  const ArrayId corrupted = write(kAlice, "corrupted", all);
  ASSERT_EQ(::pwrite(record(corrupted).segment.writer.get(), "!", 1, 0), 1);
  EXPECT_THAT(store_->seal(kAlice, corrupted, true, tick()), FailsWith(Errc::corrupted));
  reclaim();
  const ArrayId orphan = reserve(kAlice, "orphan", all);
  store_->abort(orphan);
  store_->fail_backing(orphan);
  write(kAlice2, "of a session that ends", all);
  store_->close_session(kAlice2);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
  put(kAlice, "last", all);
}

TEST_F(StoreWithQuota, WhatOutsidersKeepTakesRoomAndIsTheirOwnersUntilTheyGo) {
  const ArrayId id = put(kAlice, "x", {.pages = 20});
  UniqueFd outsider(::open(shm_path(record(id).segment.name).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  auto garbage = store_->take_garbage();
  ASSERT_EQ(garbage.size(), 1U);
  EXPECT_FALSE(env_.try_remove(garbage[0].segment));
  EXPECT_TRUE(store_->expects_room()) << "whoever has it may be just dying";
  store_->begin_outside(garbage[0]);
  EXPECT_FALSE(store_->expects_room());
  EXPECT_EQ(store_->memory_use().states.outside_bytes, 20 * kPageBytes);
  EXPECT_EQ(used_pages(), 20U);
  EXPECT_THAT(try_reserve(kAlice, "y"), FailsWith(Errc::quota_exceeded));
  outsider.reset();
  EXPECT_TRUE(env_.try_remove(garbage[0].segment));
  garbage.clear();
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_FALSE(has_name(id));
  write(kAlice, "y", {.pages = 20});
}

TEST_F(StoreWithQuota, ADrainingVersionIsChargedUntilItsLastViewGoes) {
  const ArrayId id = put(kAlice, "x", {.pages = 20});
  attach(kRoot, "x");
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_THAT(try_reserve(kAlice, "y"), FailsWith(Errc::quota_exceeded));
  release(kRoot, id);
  write(kAlice, "y");
}

TEST_F(StoreWithQuota, WhoMayNotHaveAnArrayDoesNotEvictOthersForIt) {
  for (const auto* name : {"a", "b", "c"}) put(kMate, name, {.pages = 6, .evictable = true});
  for (const auto* name : {"d", "e", "f"}) put(kStranger, name, {.pages = 6, .evictable = true});
  EXPECT_THAT(try_reserve(kAlice, "new", {.pages = 80}), FailsWith(Errc::quota_exceeded));
  EXPECT_EQ(store_->size(), 6U);
}

// ---- The end of a session ----

TEST_F(StoreTest, ASessionThatEndsDropsItsViews) {
  const ArrayId kept = put(kAlice, "kept");
  const ArrayId drained = put(kAlice, "drained");
  for (int i = 0; i < 2; ++i) attach(kAlice2, "kept");
  for (int i = 0; i < 2; ++i) attach(kAlice2, "drained");
  attach(kRoot, "kept");
  ASSERT_THAT(evict(kAlice, {"drained"}), Succeeds());
  store_->close_session(kAlice2);
  EXPECT_EQ(record(kept).views, 1U);
  EXPECT_FALSE(exists(drained));
}

TEST_F(StoreTest, AnUnsealedArrayGoesWithItsWriter) {
  const ArrayId id = write(kAlice, "x");
  store_->close_session(kAlice);
  EXPECT_FALSE(exists(id));
  reclaim();
  EXPECT_FALSE(has_name(id));
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreTest, ASealedArrayOutlivesItsWriter) {
  const ArrayId id = write(kAlice, "x");
  EXPECT_THAT(store_->seal(kAlice, id, true, tick()), testing::Optional(true));
  store_->close_session(kAlice);
  EXPECT_EQ(record(id).views, 0U);
  EXPECT_EQ(attach(kAlice2, "x"), id);
}

TEST_F(StoreTest, MemoryThatComesAfterItsSessionEndedIsGarbage) {
  const ArrayId id = reserve(kAlice, "x");
  auto segment = make_segment(id);
  store_->close_session(kAlice);
  EXPECT_FALSE(exists(id));
  EXPECT_EQ(used_pages(), 3U);  // it is being made, so it is taken
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 3 * kPageBytes);
  EXPECT_THAT(store_->back(id, std::move(segment)), FailsWith(Errc::not_found));
  EXPECT_EQ(used_pages(), 3U);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_FALSE(has_name(id));
}

TEST_F(StoreTest, MemoryThatCouldNotBeHadFreesItsRoomWithAndWithoutTheRecord) {
  const ArrayId alive = reserve(kAlice, "alive");
  store_->fail_backing(alive);
  EXPECT_FALSE(exists(alive));
  EXPECT_EQ(used_pages(), 0U);
  const ArrayId orphan = reserve(kAlice, "orphan");
  store_->close_session(kAlice);
  EXPECT_EQ(used_pages(), 3U);
  store_->fail_backing(orphan);
  EXPECT_EQ(used_pages(), 0U);
  EXPECT_EQ(store_->bytes(MemoryState::reclaiming), 0U);
}

// ---- Tampering ----

TEST_F(StoreTest, ATamperedArrayIsNotServedAndItsNameCanBeReplaced) {
  const ArrayId id = put(kAlice, "x");
  attach(kAlice2, "x");
  EXPECT_EQ(store_->mark_tampered(record(id).segment.lease.get()), &record(id));
  EXPECT_EQ(record(id).state, State::tampered);
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::tampered));
  EXPECT_THAT(try_attach(kAlice, {}, {id}), FailsWith(Errc::tampered));
  EXPECT_THAT(try_reserve(kAlice, "x"), FailsWith(Errc::already_exists));
  const ArrayId fresh = put(kAlice, "x", {.replace = true});
  EXPECT_EQ(attach(kAlice, "x"), fresh);
  EXPECT_THAT(try_attach(kAlice, {}, {id}), FailsWith(Errc::tampered));  // draining, and viewed still
  release(kAlice2, id);
  EXPECT_FALSE(exists(id));
}

TEST_F(StoreTest, ATamperedArrayCanBeEvicted) {
  const ArrayId id = put(kAlice, "x");
  store_->mark_tampered(record(id).segment.lease.get());
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_FALSE(exists(id));
}

TEST_F(StoreTest, AnOldVersionThatIsTamperedWithWhileItDrainsIsNotServedEither) {
  const ArrayId id = put(kAlice, "x");
  attach(kAlice, "x");
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_THAT(try_attach(kAlice, {}, {id}), Succeeds());
  EXPECT_EQ(store_->mark_tampered(record(id).segment.lease.get()), &record(id));
  EXPECT_THAT(try_attach(kAlice, {}, {id}), FailsWith(Errc::tampered));
}

TEST_F(StoreTest, ALeaseThatIsNoneOfOursMarksNothing) {
  const ArrayId reserved = reserve(kAlice, "reserved");
  put(kAlice, "sealed");
  EXPECT_EQ(store_->mark_tampered(-1), nullptr);
  EXPECT_EQ(store_->mark_tampered(0), nullptr);
  EXPECT_THAT(store_->take_changed_names(), Not(testing::Contains("reserved")));
  store_->fail_backing(reserved);
}

// ---- Looking ----

TEST_F(StoreTest, FindPrefersTheSealedVersion) {
  EXPECT_THAT(store_->find(kAlice, "x"), FailsWith(Errc::not_found));
  const ArrayId first = write(kAlice, "x");
  EXPECT_EQ(store_->find(kAlice, "x").value()->id, first);
  seal(kAlice, first);
  const ArrayId second = write(kAlice, "x", {.replace = true});
  EXPECT_EQ(store_->find(kAlice, "x").value()->id, first);
  seal(kAlice, second);
  EXPECT_EQ(store_->find(kAlice, "x").value()->id, second);
}

TEST_F(StoreTest, TellsWhichNamesChanged) {
  const ArrayId id = put(kAlice, "x");
  EXPECT_THAT(store_->take_changed_names(), testing::Contains("x"));
  EXPECT_THAT(store_->take_changed_names(), IsEmpty());
  attach(kAlice, "x");
  release(kAlice, id);
  EXPECT_THAT(store_->take_changed_names(), IsEmpty());
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_THAT(store_->take_changed_names(), testing::Contains("x"));
}

}  // namespace
}  // namespace cowmgr
