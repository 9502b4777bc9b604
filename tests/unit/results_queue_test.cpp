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
  EXPECT_EQ(results_->open_queued(kAlice, "q"), nullptr);
  make(kAlice, "elsewhere", 1);
  const ArrayId first = make_ragged(kAlice, "first", 1, {}, in_queue);
  const ArrayId second = make(kAlice, "second", 2, {}, in_queue);
  EXPECT_EQ(results_->open_queued(kAlice2, "q")->id, first);
  EXPECT_EQ(results_->open_queued(kAlice2, "another"), nullptr);
  lease(kAlice2, first);
  EXPECT_EQ(results_->open_queued(kAlice2, "q")->id, second);
  lease(kAlice2, second, 2, false);
  EXPECT_EQ(results_->open_queued(kAlice2, "q"), nullptr);
  EXPECT_THAT(results_->give_back(kAlice2, set(first), 0, now().time), Succeeds());
  EXPECT_EQ(results_->open_queued(kAlice2, "q")->id, first) << "what came back is older";
}

// To take work from a queue is to do what its maker says: that must not be a stranger's word, whatever the
// mode.
TEST_F(ResultSetsTest, AQueueGivesNobodyAnotherUsersSets) {
  make(kAlice, "r", 1, {.mode = 0666}, {.queue = "q"});
  for (const SessionId other : {kMate, kStranger, kRoot, kAdmin})
    EXPECT_EQ(results_->open_queued(other, "q"), nullptr) << other;
  EXPECT_NE(results_->open_queued(kAlice2, "q"), nullptr);
}

TEST_F(ResultSetsTest, AQueueForgetsSetsThatHaveEnded) {
  const ArrayId cancelled = make(kAlice, "r", 1, {}, {.queue = "q"});
  EXPECT_THAT(results_->cancel(kAlice, set(cancelled), false), Succeeds());
  EXPECT_EQ(results_->open_queued(kAlice, "q"), nullptr);
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
