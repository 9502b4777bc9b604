// Queues of result sets, and the jobs that their makers leave for workers.
#include <span>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/results_fixture.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

// ---- Queues ----

TEST_F(ResultSetsTest, AQueueGivesItsOldestSetThatHasAFreeSlot) {
  const Terms in_queue{.queue = "q"};
  EXPECT_EQ(results_->open_queued(kAlice, "q", now()), nullptr);
  make(kAlice, "elsewhere", 1);
  const ArrayId first = make_ragged(kAlice, "first", 1, {}, in_queue);
  const ArrayId second = make(kAlice, "second", 2, {}, in_queue);
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now())->id, first);
  EXPECT_EQ(results_->open_queued(kAlice2, "another", now()), nullptr);
  lease(kAlice2, first);
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now())->id, second);
  lease(kAlice2, second, 2, false);
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now()), nullptr);
  EXPECT_THAT(results_->give_back(kAlice2, set(first), 0, now().time), Succeeds());
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now())->id, first) << "what came back is older";
}

// To take work from a queue is to do what its maker says: that must not be a stranger's word, whatever the
// mode.
TEST_F(ResultSetsTest, AQueueGivesNobodyAnotherUsersSets) {
  make(kAlice, "r", 1, {.mode = 0666}, {.queue = "q"});
  for (const SessionId other : {kMate, kStranger, kRoot, kAdmin})
    EXPECT_EQ(results_->open_queued(other, "q", now()), nullptr) << other;
  EXPECT_NE(results_->open_queued(kAlice2, "q", now()), nullptr);
}

TEST_F(ResultSetsTest, AQueueForgetsSetsThatHaveEnded) {
  const ArrayId cancelled = make(kAlice, "r", 1, {}, {.queue = "q"});
  EXPECT_THAT(results_->cancel(kAlice, set(cancelled), false), Succeeds());
  EXPECT_EQ(results_->open_queued(kAlice, "q", now()), nullptr);
}

// Who found a set through its queue is expected to ask for a slot, so nobody else is woken for that; until it
// asks, or dies, or its time is over.
TEST_F(ResultSetsTest, AQueueSendsOneWorkerForASlot) {
  const ArrayId first = make(kAlice, "first", 1, {}, {.queue = "q"});
  const ArrayId second = make(kAlice, "second", 1, {}, {.queue = "q"});
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 2U);
  EXPECT_EQ(results_->open_queued(kAlice, "q", now())->id, first);
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 1U);
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now())->id, second) << "another's, though the first is free";
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 0U);
  lease(kAlice, first);
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 0U);
  ignore_changes();
  end_session(kAlice2);
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 1U);
  EXPECT_EQ(changes_of(second), "changed free") << "so that the next one is woken";
}

TEST_F(ResultSetsTest, AQueueSendsAnotherWorkerWhenOneDoesNotCome) {
  const ArrayId id = make(kAlice, "r", 1, {}, {.queue = "q"});
  EXPECT_EQ(results_->open_queued(kAlice2, "q", now())->id, id);
  ASSERT_TRUE(results_->next_deadline());
  ignore_changes();
  pass(199);
  results_->expire(now());
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 0U);
  pass(1);
  results_->expire(now());
  EXPECT_EQ(results_->free_in_queue(kAliceUid, "q"), 1U);
  EXPECT_EQ(changes_of(id), "changed free");
  EXPECT_FALSE(results_->next_deadline());
}

// ---- Jobs ----

TEST_F(ResultSetsTest, AJobLiesInTheSetsSegmentAndNowhereElse) {
  const std::string text = "what to do";
  const auto bytes = std::as_bytes(std::span(text));
  const ArrayId id = make_ragged(kAlice, "r", 3, {}, {.job = {bytes.begin(), bytes.end()}});
  const auto job = seen(id).job();
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(job.data()), job.size()), text);
  EXPECT_TRUE(set(id).terms.job.empty()) << "the daemon keeps no second copy";
  lease(kMate, id, 3, false);
  for (SlotIndex slot = 0; slot < 3; ++slot) EXPECT_THAT(commit_value(kMate, id, slot, "value"), Succeeds());
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(job.data()), job.size()), text);
  EXPECT_EQ(this->text(id, 2), "value");
}

TEST_F(ResultSetsTest, AJobThatIsTooLongIsRefused) {
  ResultTerms terms{.slots = 1, .is_ragged = true};
  terms.job.resize(kMaxJobBytes);
  EXPECT_THAT(ResultSets::check(request("r"), terms), Succeeds());
  terms.job.resize(kMaxJobBytes + 1);
  EXPECT_THAT(ResultSets::check(request("r"), terms), FailsWith(Errc::invalid_argument));
}

}  // namespace
}  // namespace cowmgr
