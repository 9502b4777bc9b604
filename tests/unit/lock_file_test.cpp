#include "proto/lock_file.hpp"

#include <fcntl.h>
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/forked.hpp"
#include "tests/support/lock_fixture.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::HasSubstr;

class LockFileTest : public LockTest {
 protected:
  [[nodiscard]] std::string path() const { return directory_ + "/lock"; }
  [[nodiscard]] Result<LockFile> acquire() const { return LockFile::acquire(path()); }
  [[nodiscard]] bool exists() const { return std::filesystem::exists(path()); }
};

TEST_F(LockFileTest, TheSecondIsRefusedWithThePidOfTheFirst) {
  const auto lock = acquire();
  ASSERT_THAT(lock, Succeeds());
  const auto second = acquire();
  ASSERT_THAT(second, FailsWith(Errc::busy));
  EXPECT_THAT(second.error().message, HasSubstr(fmt::format("held by process {}", ::getpid())));
  const auto said = say_in_fork([&] { return acquire() ? std::string("taken") : acquire().error().message; });
  EXPECT_EQ(said, second.error().message);
}

TEST_F(LockFileTest, TheFileGoesWithTheLock) {
  {
    const auto lock = acquire();
    EXPECT_TRUE(exists());
  }
  EXPECT_FALSE(exists());
  EXPECT_THAT(acquire(), Succeeds());
}

TEST_F(LockFileTest, WhoIsRefusedLeavesTheFile) {
  const auto lock = acquire();
  EXPECT_THAT(acquire(), FailsWith(Errc::busy));
  EXPECT_TRUE(exists());
}

TEST_F(LockFileTest, MovesWithItsOwner) {
  std::optional<LockFile> second;
  {
    auto first = acquire();
    ASSERT_THAT(first, Succeeds());
    second.emplace(*std::move(first));
  }
  EXPECT_TRUE(exists());
  EXPECT_THAT(acquire(), FailsWith(Errc::busy));
  second.reset();
  EXPECT_FALSE(exists());
}

TEST_F(LockFileTest, DeathFreesIt) {
  Pipe held;
  Forked holder([&] {
    const auto lock = acquire();
    write_all(held.writer.get(), lock ? "held" : "refused");
    ::pause();
    return std::string();
  });
  held.writer.reset();
  ASSERT_EQ(read_some(held.reader.get()), "held");
  const auto refused = acquire();
  ASSERT_THAT(refused, FailsWith(Errc::busy));
  EXPECT_THAT(refused.error().message, HasSubstr(fmt::format("held by process {}", holder.pid())));
  holder.kill();
  EXPECT_TRUE(exists());
  const auto lock = acquire();
  ASSERT_THAT(lock, Succeeds());
  EXPECT_THAT(acquire().error().message, testing::EndsWith(fmt::format("held by process {}", ::getpid())));
}

TEST_F(LockFileTest, ADirectoryThatIsNotThereIsAnError) {
  EXPECT_THAT(LockFile::acquire(directory_ + "/missing/lock"), FailsWith(Errc::not_found));
}

TEST_F(LockFileTest, FollowsNoLink) {
  const std::string target = directory_ + "/target";
  std::filesystem::create_symlink(target, path());
  EXPECT_THAT(acquire(), FailsWith(Errc::os_failure));
  EXPECT_FALSE(std::filesystem::exists(target));
}

TEST_F(LockFileTest, NeverHasTwoHoldersAmongThreads) {
  std::vector<std::future<std::string>> threads;
  for (int i = 0; i < 4; ++i)
    threads.push_back(
        std::async(std::launch::async, [this] { return take_turns(200, [this] { return acquire(); }); }));
  for (auto& thread : threads) EXPECT_EQ(thread.get(), "one holder at a time");
  EXPECT_FALSE(exists());
}

TEST_F(LockFileTest, NeverHasTwoHoldersAmongProcesses) {
  std::vector<std::unique_ptr<Forked>> processes;
  for (int i = 0; i < 4; ++i)
    processes.push_back(
        std::make_unique<Forked>([this] { return take_turns(200, [this] { return acquire(); }); }));
  for (auto& process : processes) EXPECT_EQ(process->said(), "one holder at a time");
  EXPECT_FALSE(exists());
}

}  // namespace
}  // namespace cowmgr
