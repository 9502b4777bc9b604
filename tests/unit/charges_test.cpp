#include "daemon/store/charges.hpp"

#include <algorithm>
#include <cstdint>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "daemon/shm/descriptors.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::HasSubstr;

constexpr uid_t kUid = 1000;
constexpr uid_t kOther = 1001;

TEST(ChargesTest, CountBytesOfEachOwner) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 10, .owner_sessions = 10});
  EXPECT_THAT(charges.array(kUid, 101), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(charges.array(kUid, UINT64_MAX), FailsWith(Errc::quota_exceeded));
  auto first = charges.array(kUid, 60);
  EXPECT_THAT(first, Succeeds());
  EXPECT_THAT(charges.array(kUid, 41), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(charges.array(kUid, UINT64_MAX), FailsWith(Errc::quota_exceeded));
  const auto second = charges.array(kUid, 40);
  EXPECT_THAT(second, Succeeds());
  EXPECT_THAT(charges.array(kUid, 1), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(charges.array(kOther, 100), Succeeds());
  first->give_back();
  first->give_back();  // once is enough
  EXPECT_THAT(charges.array(kUid, 60), Succeeds());
}

TEST(ChargesTest, CountArraysHoweverSmall) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 2, .owner_sessions = 10});
  auto first = charges.array(kUid, 0);
  const auto second = charges.array(kUid, 0);
  const auto refused = charges.array(kUid, 0);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("user 1000 holds 2 arrays"));
  first = Charge();
  EXPECT_THAT(charges.array(kUid, 0), Succeeds());
}

TEST(ChargesTest, CountConnectionsApartFromArrays) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 2});
  auto first = charges.connection(kUid);
  {
    const auto array = charges.array(kUid, 100);
    EXPECT_THAT(array, Succeeds());
    EXPECT_THAT(charges.connection(kUid), Succeeds());
  }
  const auto second = charges.connection(kUid);
  EXPECT_THAT(second, Succeeds());
  EXPECT_THAT(charges.connection(kUid), FailsWith(Errc::quota_exceeded)) << "the array's end forgot none";
  EXPECT_THAT(charges.connection(kOther), Succeeds());
  first->give_back();
  EXPECT_THAT(charges.connection(kUid), Succeeds());
}

TEST(ChargesTest, CountTheConnectionsOfAll) {
  Charges charges({.owner_sessions = 2, .sessions = 3});
  auto first = charges.connection(kUid);
  const auto second = charges.connection(kUid);
  const auto third = charges.connection(kOther);
  EXPECT_THAT(third, Succeeds());
  const auto refused = charges.connection(kOther);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("LimitNOFILE="));
  first->give_back();
  EXPECT_THAT(charges.connection(kOther), Succeeds());
}

// ---- Where the limits come from ----

TEST(Descriptors, AreSharedOutWhateverTheLimit) {
  for (const std::uint64_t limit :
       {0ULL, 1ULL, 47ULL, 64ULL, 256ULL, 1024ULL, 20'000ULL, 1'048'576ULL, 1ULL << 40U, ~0ULL}) {
    const DescriptorPlan plan = plan_descriptors(limit);
    const QuotaLimits limits = limits_within(plan, {.owner_arrays = 0, .owner_sessions = 0});
    EXPECT_GE(plan.connections, 1U) << limit;
    EXPECT_LE(48 + plan.segments + 3 * std::uint64_t{plan.connections}, std::max<std::uint64_t>(limit, 51))
        << limit;
    EXPECT_LE(std::uint64_t{limits.owner_arrays} * 3, std::max<std::uint64_t>(plan.segments, 3)) << limit;
    EXPECT_LE(limits.owner_sessions, plan.connections) << limit;
    EXPECT_TRUE(plan.connections < 4 || limits.owner_sessions < plan.connections) << "others can connect";
  }
}

TEST(Descriptors, GiveTheUsualQuotasWhereTheyArePlenty) {
  const QuotaLimits limits =
      limits_within(plan_descriptors(1'048'576), {.owner_arrays = 0, .owner_sessions = 0});
  EXPECT_EQ(limits.owner_arrays, 65536U);
  EXPECT_EQ(limits.owner_sessions, 4096U);
  const QuotaLimits asked = limits_within(plan_descriptors(256), {.owner_arrays = 1000, .owner_sessions = 7});
  EXPECT_EQ(asked.owner_arrays, 1000U);
  EXPECT_EQ(asked.owner_sessions, 7U);
}

TEST(ChargesTest, WhatGrowsIsChargedBytesButNoArray) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  auto array = charges.array(kUid, 10);
  EXPECT_THAT(array->grow(60), Succeeds());
  const auto refused = array->grow(31);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("user 1000 holds 70"));
  EXPECT_THAT(array->grow(UINT64_MAX), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(array->grow(30), Succeeds());
  EXPECT_THAT(charges.array(kOther, 100), Succeeds());
  array->shrink(30);
  EXPECT_THAT(charges.array(kUid, 0), FailsWith(Errc::quota_exceeded)) << "there is one still";
  array->give_back();
  EXPECT_THAT(charges.array(kUid, 100), Succeeds());
}

TEST(ChargesTest, ARefusalTakesNothing) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  for (int i = 0; i < 5; ++i) EXPECT_THAT(charges.array(kUid, 101), FailsWith(Errc::quota_exceeded));
  auto array = charges.array(kUid, 10);
  EXPECT_THAT(charges.array(kUid, 10), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(array->grow(90), Succeeds());
}

// What is there already counts, and may pass the limits.
TEST(ChargesTest, WhatIsThereAlreadyIsNotRefused) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  auto found = charges.array_there_is(kUid, 500);
  const auto another = charges.array_there_is(kUid, 500);
  EXPECT_THAT(charges.array(kUid, 0), FailsWith(Errc::quota_exceeded));
  found = {};
  EXPECT_THAT(charges.array(kUid, 0), FailsWith(Errc::quota_exceeded));
}

TEST(ChargesTest, AChargeIsGivenBackOnceWhereverItGoes) {
  Charges charges({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  {
    auto array = charges.array(kUid, 100);
    const Charge moved = *std::move(array);
    EXPECT_THAT(charges.array(kUid, 0), FailsWith(Errc::quota_exceeded)) << "it is in `moved`";
    EXPECT_EQ(moved.user(), kUid);
  }
  EXPECT_THAT(charges.array(kUid, 100), Succeeds());
}

TEST(ChargesDeathTest, GivingBackWhatWasNotChargedIsABug) {
  Charges charges({});
  auto array = charges.array(kUid, 1);
  EXPECT_DEATH(array->shrink(2), "does not hold");
}

}  // namespace
}  // namespace cowmgr
