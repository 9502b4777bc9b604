// An array whose file lost its name, while everything else may happen to it.
#include <string>
#include <unistd.h>

#include "proto/unique_fd.hpp"
#include "tests/support/store_fixture.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class StoreRewrite : public StoreTest {
 protected:
  // Sealed, viewed by Alice, and its file is gone.
  ArrayId put_unlinked(const std::string& name, const Options& options) {
    const ArrayId id = put(kAlice, name, options);
    attach(kAlice, name);
    remove_file(id);
    EXPECT_TRUE(store_->note_unlinked(id));
    return id;
  }
  ArrayId put_unlinked(const std::string& name) { return put_unlinked(name, Options()); }
  void remove_file(ArrayId id) { ASSERT_EQ(::unlink(file_of(id).c_str()), 0); }
  [[nodiscard]] std::string file_of(ArrayId id) const { return "/dev/shm" + record(id).segment.name; }
  [[nodiscard]] Segment copy_of(ArrayId id) const {
    const ArrayRecord& from = record(id);
    auto copy = env_.rewrite(from.segment, id, *header_of(from), trailer_page(from), never_);
    EXPECT_THAT(copy, Succeeds());
    return *std::move(copy);
  }
  void begin(ArrayId id) { EXPECT_THAT(store_->begin_rewrite(id), Succeeds()); }
  [[nodiscard]] Segment begin_copy(ArrayId id) {
    begin(id);
    return copy_of(id);
  }
  [[nodiscard]] std::uint64_t used_pages() const { return store_->memory_use().used_bytes / kPageBytes; }
  // Gives back what is garbage, as the pool does.
  void reclaim() {
    for (Garbage& garbage : store_->take_garbage()) {
      EXPECT_TRUE(env_.try_remove(garbage.segment)) << "nobody else has it";
    }
  }
};

TEST_F(StoreRewrite, AFileThatIsThereIsNotUnlinked) {
  const ArrayId id = put(kAlice, "x");
  EXPECT_FALSE(store_->note_unlinked(id));
  EXPECT_FALSE(store_->note_unlinked(12345));
  const ArrayId reserved = reserve(kAlice, "reserved");
  EXPECT_FALSE(store_->note_unlinked(reserved)) << "it has no file yet";
  store_->fail_backing(reserved);
  EXPECT_THAT(store_->unlinked(), IsEmpty());
}

TEST_F(StoreRewrite, ARemovalIsToldOnce) {
  const ArrayId id = put_unlinked("x");
  EXPECT_FALSE(store_->note_unlinked(id));
  EXPECT_THAT(store_->unlinked(), ElementsAre(id));
  EXPECT_EQ(record(id).state, State::sealed) << "it is served on";
}

TEST_F(StoreRewrite, TheOldMemoryIsChargedUntilItsLastViewGoes) {
  const ArrayId id = put_unlinked("x");
  EXPECT_EQ(used_pages(), 3U);
  begin(id);
  EXPECT_EQ(used_pages(), 6U);
  EXPECT_TRUE(store_->end_rewrite(id, copy_of(id)));
  EXPECT_THAT(store_->unlinked(), IsEmpty());
  EXPECT_FALSE(record(id).is_unlinked);
  reclaim();
  EXPECT_EQ(used_pages(), 6U);
  release(kAlice, id);
  reclaim();
  EXPECT_EQ(used_pages(), 3U);
  EXPECT_EQ(::access(file_of(id).c_str(), F_OK), 0) << "the old memory had no name to take away";
}

TEST_F(StoreRewrite, WithoutACopyAllStaysAsItWas) {
  const ArrayId id = put_unlinked("x");
  begin(id);
  EXPECT_FALSE(store_->end_rewrite(id, std::nullopt));
  EXPECT_EQ(used_pages(), 3U);
  EXPECT_THAT(store_->unlinked(), ElementsAre(id));
  EXPECT_THAT(try_attach(kAlice2, {"x"}), Succeeds());
}

TEST_F(StoreRewrite, WithoutRoomNothingIsTaken) {
  const ArrayId id = put_unlinked("x", {.pages = 51});
  EXPECT_THAT(store_->begin_rewrite(id), FailsWith(Errc::out_of_memory));
  EXPECT_EQ(used_pages(), 51U);
}

TEST_F(StoreRewrite, NothingIsEvictedForACopyNotEvenTheArrayItself) {
  const ArrayId id = put(kAlice, "x", {.pages = 51, .evictable = true});
  const ArrayId other = put(kAlice, "y", {.pages = 40, .evictable = true});
  remove_file(id);
  EXPECT_TRUE(store_->note_unlinked(id));
  EXPECT_THAT(store_->begin_rewrite(id), FailsWith(Errc::out_of_memory));
  EXPECT_TRUE(exists(id));
  EXPECT_TRUE(exists(other));
}

TEST_F(StoreRewrite, AFileThatIsThereAgainIsAsGoodAsBefore) {
  const ArrayId id = put(kAlice, "x");
  const std::string aside = file_of(id) + ".aside";
  ASSERT_EQ(::rename(file_of(id).c_str(), aside.c_str()), 0);
  EXPECT_TRUE(store_->note_unlinked(id));
  ASSERT_EQ(::rename(aside.c_str(), file_of(id).c_str()), 0);
  EXPECT_THAT(store_->begin_rewrite(id), FailsWith(Errc::already_exists));
  EXPECT_THAT(store_->unlinked(), IsEmpty());
  EXPECT_FALSE(record(id).is_unlinked);
}

// Else a daemon that is killed here would leave a sealed array that was evicted before.
TEST_F(StoreRewrite, ACopyCountsForTheNextDaemonOnlyOnceItIsTaken) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  EXPECT_EQ(env_.find(id)->file.kind, SegmentFile::Kind::unsealed);
  EXPECT_TRUE(store_->end_rewrite(id, std::move(copy)));
  EXPECT_EQ(env_.find(id)->file.kind, SegmentFile::Kind::sealed);
}

TEST_F(StoreRewrite, ACopyThatLostItsNameTooIsNotTaken) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  remove_file(id);
  EXPECT_FALSE(store_->end_rewrite(id, std::move(copy)));
  EXPECT_THAT(store_->unlinked(), ElementsAre(id));
  reclaim();
  begin(id);
  EXPECT_TRUE(store_->end_rewrite(id, copy_of(id)));
}

// The name of what is garbage may be another file's by the time that it is given back.
TEST_F(StoreRewrite, GarbageHasNoName) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  store_->mark_tampered(record(id).segment.lease.get());
  EXPECT_FALSE(store_->end_rewrite(id, std::move(copy)));
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  release(kAlice, id);
  for (const Garbage& garbage : store_->take_garbage()) EXPECT_EQ(garbage.segment.name, "");
}

// Where a descriptor of it is kept: the kept ones are told later than its file.
TEST_F(StoreRewrite, WhatIsEvictedSaysSoItself) {
  const ArrayId id = put(kAlice, "x");
  const UniqueFd kept(::dup(record(id).segment.reader.get()));
  const ArrayId rewritten = put_unlinked("y");
  const UniqueFd older(::dup(record(rewritten).segment.reader.get()));
  begin(rewritten);
  EXPECT_TRUE(store_->end_rewrite(rewritten, copy_of(rewritten)));
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_TRUE(env_.find(id, kept)->file.is_draining);
  EXPECT_TRUE(env_.find(rewritten, older)->file.is_draining);
}

TEST_F(StoreRewrite, ACopyOfWhatWasEvictedMeanwhileGoes) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  const std::string file = file_of(id);
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_FALSE(store_->end_rewrite(id, std::move(copy)));
  reclaim();
  EXPECT_EQ(used_pages(), 3U) << "the view keeps what it has";
  EXPECT_NE(::access(file.c_str(), F_OK), 0);
  release(kAlice, id);
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreRewrite, ACopyOfWhatWasDroppedMeanwhileGoes) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  release(kAlice, id);
  ASSERT_THAT(evict(kAlice, {"x"}), Succeeds());
  EXPECT_FALSE(exists(id));
  EXPECT_FALSE(store_->end_rewrite(id, std::move(copy)));
  reclaim();
  EXPECT_EQ(used_pages(), 0U);
}

TEST_F(StoreRewrite, ACopyOfWhatWasTamperedWithMeanwhileGoes) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  store_->mark_tampered(record(id).segment.lease.get());
  EXPECT_FALSE(store_->end_rewrite(id, std::move(copy)));
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::tampered));
}

TEST_F(StoreRewrite, APinThatCameMeanwhileIsInTheCopy) {
  const ArrayId id = put_unlinked("x");
  Segment copy = begin_copy(id);
  EXPECT_THAT(pin(kAlice, {"x"}), Succeeds());
  EXPECT_TRUE(store_->end_rewrite(id, std::move(copy)));
  const auto found = env_.find(id);
  ASSERT_THAT(found, Succeeds());
  EXPECT_TRUE(found->file.is_pinned);
}

TEST_F(StoreRewrite, WhoWritesToTheOldMemoryTampersWithTheArray) {
  const ArrayId id = put_unlinked("x");
  const int lease = record(id).segment.lease.get();
  begin(id);
  EXPECT_TRUE(store_->end_rewrite(id, copy_of(id)));
  EXPECT_EQ(store_->mark_tampered(lease), &record(id)) << "a view may still be of it";
}

TEST_F(StoreRewrite, WhatLosesItsFileBeforeTheSealIsToBeRewrittenAfter) {
  const ArrayId id = write(kAlice, "x");
  remove_file(id);
  EXPECT_TRUE(store_->note_unlinked(id));
  EXPECT_THAT(store_->unlinked(), IsEmpty());
  seal(kAlice, id);
  EXPECT_THAT(store_->unlinked(), ElementsAre(id));
}

TEST_F(StoreRewrite, APinGoesWithTheSealOfTheNextVersion) {
  put(kAlice, "x");
  EXPECT_THAT(pin(kAlice, {"x"}), Succeeds());
  const ArrayId next = put(kAlice, "x", {.replace = true});
  EXPECT_TRUE(record(next).pinned);
  EXPECT_TRUE(env_.find(next)->file.is_pinned) << "the next daemon is to know";
}

TEST_F(StoreRewrite, CorruptedDataIsNotServed) {
  const ArrayId id = put(kAlice, "x");
  EXPECT_EQ(store_->mark_corrupted(id), &record(id));
  EXPECT_EQ(record(id).state, State::tampered);
  EXPECT_THAT(try_attach(kAlice, {"x"}), FailsWith(Errc::tampered));
  EXPECT_EQ(store_->mark_corrupted(12345), nullptr);
}

}  // namespace
}  // namespace cowmgr
