// Hierarchies of control groups, made up of plain files.
#include "daemon/shm/cgroup.hpp"

#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

using testing::AllOf;
using testing::HasSubstr;

constexpr std::uint64_t kMib = std::uint64_t{1} << 20U;

class CgroupTest : public testing::Test {
 protected:
  CgroupTest() : root_(fs::temp_directory_path() / ("cowmgr-cgroup-" + std::to_string(::getpid()))) {
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const fs::path& file, const std::string& text) const {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text << "\n";
  }
  [[nodiscard]] MemoryGroups groups_of(const std::string& own) const {
    write("self", own);
    return MemoryGroups(root_, root_ / "self");
  }
  // A group of version 2.
  void group(const fs::path& path, const std::string& max, std::uint64_t current_mib,
             const std::string& stat = "") const {
    write("cgroup.controllers", "cpu memory");
    write(path / "memory.max", max);
    write(path / "memory.current", std::to_string(current_mib * kMib));
    write(path / "memory.stat", stat);
  }

  fs::path root_;
};

TEST_F(CgroupTest, WithoutGroupsNothingIsLimited) {
  EXPECT_EQ(groups_of("").lowest_limit().limit_bytes, UINT64_MAX);
  EXPECT_EQ(MemoryGroups(root_ / "none", root_ / "none").least_left().left_bytes, UINT64_MAX);
  group("a", "max", 10);
  EXPECT_EQ(groups_of("0::/a").least_left().left_bytes, UINT64_MAX);
}

TEST_F(CgroupTest, TheLowestLimitUpToTheRootCounts) {
  group("a", std::to_string(100 * kMib), 10);
  group("a/b", std::to_string(300 * kMib), 20);
  group("a/b/c", "max", 5);
  const auto lowest = groups_of("12:pids:/x\n0::/a/b/c").lowest_limit();
  EXPECT_EQ(lowest.limit_bytes, 100 * kMib);
  EXPECT_EQ(lowest.group, root_ / "a");
}

TEST_F(CgroupTest, WhatTheFullestGroupLeavesCounts) {
  group("a", std::to_string(100 * kMib), 10);
  group("a/b", std::to_string(300 * kMib), 280);
  const auto least = groups_of("0::/a/b").least_left();
  EXPECT_EQ(least.left_bytes, 20 * kMib);
  EXPECT_EQ(least.group, root_ / "a/b");
}

TEST_F(CgroupTest, CleanPagesOfFilesAreRoom) {
  group("a", std::to_string(100 * kMib), 90,
        "anon 1000\nfile 99999999\nshmem 88888888\ninactive_file 20971520\nactive_file 10485760\nfile_dirty "
        "1048576\n"
        "file_writeback 0");
  EXPECT_EQ(groups_of("0::/a").least_left().left_bytes, 39 * kMib);
}

TEST_F(CgroupTest, ThrottlingIsALimitToo) {
  group("a", std::to_string(100 * kMib), 10);
  write("a/memory.high", std::to_string(50 * kMib));
  EXPECT_EQ(groups_of("0::/a").lowest_limit().limit_bytes, 50 * kMib);
}

TEST_F(CgroupTest, AContainerThatShowsItsOwnGroupAsTheRootIsLimitedByThat) {
  group("", std::to_string(64 * kMib), 4);
  EXPECT_EQ(groups_of("0::/").lowest_limit().limit_bytes, 64 * kMib) << "a cgroup namespace";
  EXPECT_EQ(groups_of("0::/docker/abc").lowest_limit().limit_bytes, 64 * kMib)
      << "a mount of the group alone";
  EXPECT_EQ(groups_of("0::/../sibling").lowest_limit().limit_bytes, 64 * kMib) << "outside of the namespace";
}

TEST_F(CgroupTest, Version1HasOtherFiles) {
  write("memory/a/memory.limit_in_bytes", "9223372036854771712");
  write("memory/a/b/memory.limit_in_bytes", std::to_string(100 * kMib));
  write("memory/a/b/memory.usage_in_bytes", std::to_string(60 * kMib));
  write("memory/a/b/memory.stat",
        "inactive_file 1\ntotal_inactive_file 10485760\ntotal_active_file 0\ntotal_dirty 0");
  const auto groups = groups_of("5:cpu,cpuacct:/other\n4:memory:/a/b\n0::/");
  EXPECT_EQ(groups.lowest_limit().limit_bytes, 100 * kMib);
  EXPECT_EQ(groups.least_left().left_bytes, 50 * kMib);
}

TEST_F(CgroupTest, ABudgetRefusesWhatTheGroupsDoNotLeave) {
  group("a", std::to_string(100 * kMib), 20);
  const auto groups = groups_of("0::/a");
  const auto refused = GroupBudget(groups, 70 * kMib).take(8 * kMib);
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message, AllOf(HasSubstr("needs 70 MiB"), HasSubstr((root_ / "a").string()),
                                             HasSubstr("limit of 100 MiB"), HasSubstr("room for 64 MiB")));
  EXPECT_THAT(GroupBudget(groups, 60 * kMib).take(8 * kMib), Succeeds());
}

TEST_F(CgroupTest, ABudgetStopsWhenOthersOfTheGroupTakeWhatWasLeft) {
  group("a", std::to_string(100 * kMib), 20);
  const auto groups = groups_of("0::/a");
  GroupBudget budget(groups, 60 * kMib);
  EXPECT_THAT(budget.take(16 * kMib), Succeeds());
  group("a", std::to_string(100 * kMib), 60);
  EXPECT_THAT(budget.take(8 * kMib), FailsWith(Errc::out_of_memory)) << "44 MiB more";
}

}  // namespace
}  // namespace cowmgr
