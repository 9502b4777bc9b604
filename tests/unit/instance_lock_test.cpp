#include "proto/instance_lock.hpp"

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <sys/mount.h>
#include <thread>
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

namespace fs = std::filesystem;

using testing::HasSubstr;

class InstanceLockTest : public LockTest {
 protected:
  [[nodiscard]] Result<InstanceLock> acquire(std::string_view instance = "x") const {
    return InstanceLock::acquire(instance, directory_);
  }
  [[nodiscard]] std::optional<pid_t> holder() const { return InstanceLock::holder_of("x", directory_); }
  [[nodiscard]] std::string file() const { return directory_ + "/cowmgr.x.lock"; }
  bool remove_file() const {
    std::error_code ignored;
    return fs::remove(file(), ignored);
  }
};

TEST_F(InstanceLockTest, HoldsWithoutItsFile) {
  const auto lock = acquire();
  ASSERT_THAT(lock, Succeeds());
  EXPECT_TRUE(remove_file());
  const auto second = acquire();
  ASSERT_THAT(second, FailsWith(Errc::busy));
  EXPECT_THAT(second.error().message, HasSubstr(fmt::format("process {}", ::getpid())));
  EXPECT_EQ(holder(), ::getpid());
  EXPECT_FALSE(fs::exists(file())) << "whoever is refused leaves nothing";
}

TEST_F(InstanceLockTest, IsGoneWithItsHolder) {
  {
    const auto lock = acquire();
    EXPECT_TRUE(fs::exists(file()));
    EXPECT_TRUE(remove_file());
  }
  EXPECT_EQ(holder(), std::nullopt);
  EXPECT_THAT(acquire(), Succeeds());
  Pipe held;
  Forked other([&] {
    const auto lock = acquire();
    remove_file();
    write_all(held.writer.get(), lock ? "held" : "refused");
    ::pause();
    return std::string();
  });
  held.writer.reset();
  ASSERT_EQ(read_some(held.reader.get()), "held");
  EXPECT_EQ(holder(), other.pid());
  EXPECT_THAT(acquire(), FailsWith(Errc::busy));
  other.kill();
  EXPECT_THAT(acquire(), Succeeds());
}

TEST_F(InstanceLockTest, LeavesTheFileOfWhoCameAfter) {
  auto first = acquire();
  EXPECT_TRUE(remove_file());
  const auto file_of_another = LockFile::acquire(file());
  ASSERT_THAT(file_of_another, Succeeds());
  { const auto gone = *std::move(first); }
  EXPECT_TRUE(fs::exists(file()));
}

TEST_F(InstanceLockTest, IsOfOneInstance) {
  const auto lock = acquire();
  EXPECT_THAT(acquire("y"), Succeeds());
  EXPECT_THAT(acquire("x-2"), Succeeds());
}

TEST_F(InstanceLockTest, NeverHasTwoHoldersThoughSomebodyRemovesTheFile) {
  std::vector<std::unique_ptr<Forked>> processes;
  for (int i = 0; i < 3; ++i)
    processes.push_back(
        std::make_unique<Forked>([this] { return take_turns(100, [this] { return acquire(); }); }));
  std::atomic<bool> is_over = false;
  std::thread remover([&] {
    while (!is_over) {
      remove_file();
      std::this_thread::yield();
    }
  });
  for (auto& process : processes) EXPECT_EQ(process->said(), "one holder at a time");
  is_over = true;
  remover.join();
}

// What keeps a daemon from starting is said in words, with the cure.
TEST_F(InstanceLockTest, SaysWhatIsWrongWithTheDirectory) {
  const auto missing = InstanceLock::acquire("x", directory_ + "/missing");
  ASSERT_FALSE(missing);
  EXPECT_THAT(missing.error().message, HasSubstr("there is no " + directory_ + "/missing"));
  const std::string said = say_in_fork([&]() -> std::string {
    if (!enter_private_mounts()) return "no mounts, mounted read-only";
    if (::mount("tmpfs", directory_.c_str(), "tmpfs", MS_RDONLY, "mode=1777") != 0)
      return "no mounts, mounted read-only";
    const auto read_only = acquire();
    return read_only ? "acquired" : read_only.error().message;
  });
  EXPECT_THAT(said, HasSubstr("mounted read-only"));
}

// A file system that takes no byte, and no file, more.
TEST_F(InstanceLockTest, NeedsNoRoom) {
  const auto in_full_directory = [&](const char* options) {
    return say_in_fork([&]() -> std::string {
      if (!enter_private_mounts()) return "held alone";
      if (::mount("tmpfs", directory_.c_str(), "tmpfs", 0, options) != 0) return "held alone";
      for (int i = 0; i < 100; ++i) {
        const UniqueFd filler(
            ::open(fmt::format("{}/{}", directory_, i).c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
        const std::string page(4096, 'x');
        if (!filler || ::write(filler.get(), page.data(), page.size()) < 0) break;
      }
      const auto lock = acquire();
      if (!lock) return lock.error().message;
      const auto second = acquire();
      return second.has_value() ? "held by two" : "held alone";
    });
  };
  EXPECT_EQ(in_full_directory("mode=1777,size=64k"), "held alone");
  EXPECT_EQ(in_full_directory("mode=1777,nr_inodes=16"), "held alone");
}

}  // namespace
}  // namespace cowmgr
