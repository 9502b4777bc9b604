#include "daemon/quota.hpp"

#include <cstdint>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
