// Somebody removes the instance's lock file from /dev/shm. The segments still have one daemon.
#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/forked.hpp"

namespace cowmgr::test {
namespace {

constexpr std::size_t kSize = 50'000;

class InstanceLockLost : public KeepingDaemonTest {
 protected:
  [[nodiscard]] std::string lock_path() const { return fmt::format("/dev/shm/cowmgr.{}.lock", instance()); }
  bool remove_lock() const {
    std::error_code ignored;
    return std::filesystem::remove(lock_path(), ignored);
  }

  // What one more daemon of this instance writes, which must not serve.
  [[nodiscard]] std::string log_of_another() const {
    const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
    Daemon another(directory_.file("another"), instance(), {}, {.log = log.get(), .may_refuse = true});
    EXPECT_FALSE(another.serves());
    std::array<char, 4096> text{};
    const auto bytes = ::pread(log.get(), text.data(), text.size(), 0);
    return {text.data(), static_cast<std::size_t>(std::max<ssize_t>(bytes, 0))};
  }

  // A process that starts a daemon of this instance at `socket` when it is told to, in a mount namespace of
  // its own if `is_apart`; says whether that serves, and ends it when it is told again.
  [[nodiscard]] Child starter(const std::string& socket, bool is_apart) const {
    return Child([this, socket, is_apart](const Link& test) {
      if (is_apart && !enter_private_mounts())
        std::cout << "a mount namespace is not to be had: " << std::strerror(errno)
                  << "; only a socket differs\n";
      test.say("ready");
      test.await_word();
      Daemon daemon(socket, instance(), {}, {.may_refuse = true});
      test.say(daemon.serves() ? "serves" : "refused");
      test.await_word();
      const bool serves = daemon.serves();
      EXPECT_EQ(serves ? daemon.stop(SIGTERM) : daemon.wait(), serves ? 0 : 1);
    });
  }
  // What two daemons say that start at once, while somebody removes the lock file again and again.
  [[nodiscard]] std::vector<std::string> start_two() const {
    std::array<Child, 2> starters = {starter(directory_.file("one"), false),
                                     starter(directory_.file("two"), true)};
    for (const Child& one : starters) one.expect("ready");
    std::atomic<bool> is_over = false;
    std::thread remover([&] {
      while (!is_over) {
        remove_lock();
        std::this_thread::yield();
      }
    });
    for (const Child& one : starters) one.tell();
    std::vector<std::string> said;
    for (const Child& one : starters) said.push_back(one.hear());
    is_over = true;
    remover.join();
    for (const Child& one : starters) one.tell();
    for (Child& one : starters) EXPECT_EQ(one.wait(), 0);
    return said;
  }
};

TEST_F(InstanceLockLost, NobodyElseServesTheSameSegments) {
  const Client client = connect();
  ASSERT_THAT(client.put("a", {Dtype::of<std::uint8_t>(), {kSize}}, pattern_bytes(kSize)), Succeeds());
  EXPECT_TRUE(remove_lock());
  EXPECT_THAT(start_two(), testing::Each("refused")) << "while the first lives";
  EXPECT_THAT(client.put("b", {Dtype::of<std::uint8_t>(), {kSize}}, pattern_bytes(kSize)), Succeeds());
  const std::string log = log_of_another();
  EXPECT_THAT(log, testing::HasSubstr("instance '" + instance() + "' is in use"));
  EXPECT_THAT(log, testing::HasSubstr("process " + std::to_string(daemon_->pid())));
  kill_and_start();
  EXPECT_EQ(connect().list()->size(), 2U);
}

TEST_F(InstanceLockLost, OfTwoThatStartAtOnceOneServes) {
  ASSERT_THAT(connect().put("a", {Dtype::of<std::uint8_t>(), {kSize}}, pattern_bytes(kSize)), Succeeds());
  EXPECT_TRUE(remove_lock());
  kill();
  for (int round = 0; round < 10; ++round)
    EXPECT_THAT(start_two(), testing::UnorderedElementsAre("serves", "refused")) << round;
  start_keeping();
  EXPECT_THAT(connect().attach("a"), Succeeds());
}

}  // namespace
}  // namespace cowmgr::test
