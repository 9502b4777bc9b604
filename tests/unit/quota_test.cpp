#include "daemon/quota.hpp"

#include <algorithm>
#include <cstdint>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "daemon/descriptors.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::HasSubstr;

constexpr uid_t kUid = 1000;
constexpr uid_t kOther = 1001;

TEST(Quota, CountsBytesOfEachOwner) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 10, .owner_sessions = 10});
  EXPECT_THAT(quota.charge_array(kUid, 101), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kUid, UINT64_MAX), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kUid, 60), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 41), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kUid, UINT64_MAX), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kUid, 40), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 1), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kOther, 100), Succeeds());
  quota.release_array(kUid, 60);
  EXPECT_THAT(quota.charge_array(kUid, 60), Succeeds());
}

TEST(Quota, CountsArraysHoweverSmall) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 2, .owner_sessions = 10});
  EXPECT_THAT(quota.charge_array(kUid, 0), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 0), Succeeds());
  const auto refused = quota.charge_array(kUid, 0);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("user 1000 holds 2 arrays"));
  quota.release_array(kUid, 0);
  EXPECT_THAT(quota.charge_array(kUid, 0), Succeeds());
}

TEST(Quota, CountsSessionsApartFromArrays) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 2});
  EXPECT_THAT(quota.charge_session(kUid), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 100), Succeeds());
  EXPECT_THAT(quota.charge_session(kUid), Succeeds());
  EXPECT_THAT(quota.charge_session(kUid), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_session(kOther), Succeeds());
  quota.release_array(kUid, 100);  // does not forget the sessions
  EXPECT_THAT(quota.charge_session(kUid), FailsWith(Errc::quota_exceeded));
  quota.release_session(kUid);
  EXPECT_THAT(quota.charge_session(kUid), Succeeds());
}

TEST(Quota, CountsTheConnectionsOfAll) {
  Quota quota({.owner_sessions = 2, .sessions = 3});
  EXPECT_THAT(quota.charge_session(kUid), Succeeds());
  EXPECT_THAT(quota.charge_session(kUid), Succeeds());
  EXPECT_THAT(quota.charge_session(kOther), Succeeds());
  const auto refused = quota.charge_session(kOther);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("LimitNOFILE="));
  quota.release_session(kUid);
  EXPECT_THAT(quota.charge_session(kOther), Succeeds());
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

TEST(Quota, WhatGrowsIsChargedBytesButNoArray) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  EXPECT_THAT(quota.charge_array(kUid, 10), Succeeds());
  EXPECT_THAT(quota.charge_bytes(kUid, 60), Succeeds());
  const auto refused = quota.charge_bytes(kUid, 31);
  ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(refused.error().message, HasSubstr("user 1000 holds 70"));
  EXPECT_THAT(quota.charge_bytes(kUid, UINT64_MAX), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_bytes(kUid, 30), Succeeds());
  EXPECT_THAT(quota.charge_bytes(kOther, 100), Succeeds());
  quota.release_bytes(kUid, 30);
  EXPECT_THAT(quota.charge_array(kUid, 0), FailsWith(Errc::quota_exceeded));  // there is one still
  quota.release_array(kUid, 70);
  EXPECT_THAT(quota.charge_array(kUid, 100), Succeeds());
}

TEST(Quota, ARefusedArrayTakesNoBytes) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 1, .owner_sessions = 1});
  EXPECT_THAT(quota.charge_array(kUid, 10), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 10), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_bytes(kUid, 90), Succeeds());
}

TEST(Quota, ARefusalChangesNothing) {
  Quota quota({.owner_bytes = 100, .owner_arrays = 2, .owner_sessions = 1});
  for (int i = 0; i < 5; ++i) EXPECT_THAT(quota.charge_array(kUid, 101), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(quota.charge_array(kUid, 50), Succeeds());
  EXPECT_THAT(quota.charge_array(kUid, 50), Succeeds());
}

TEST(QuotaDeathTest, GivingBackWhatWasNotChargedIsABug) {
  Quota quota({});
  EXPECT_DEATH(quota.release_array(kUid, 1), "does not hold");
  EXPECT_DEATH(quota.release_bytes(kUid, 1), "does not hold");
  EXPECT_DEATH(quota.release_session(kUid), "does not hold");
}

}  // namespace
}  // namespace cowmgr
