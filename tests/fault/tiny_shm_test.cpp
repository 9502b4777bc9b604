// A /dev/shm that holds less than the daemon was promised: out of memory is an answer, never a SIGBUS.
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <sched.h>
#include <string>
#include <sys/mount.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

void write_file(const char* path, const std::string& text) {
  std::ofstream(path) << text;
}

// Gives this process, and the children to come, a /dev/shm of 64 MiB. False where the system forbids it.
bool enter_tiny_shm() {
  const uid_t uid = ::geteuid();
  if (::unshare(uid == 0 ? CLONE_NEWNS : CLONE_NEWNS | CLONE_NEWUSER) != 0) return false;
  if (uid != 0) {
    write_file("/proc/self/setgroups", "deny");
    write_file("/proc/self/uid_map", "0 " + std::to_string(uid) + " 1");
  }
  if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
  return ::mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=1777") == 0;
}

class TinyShm : public DaemonLifeTest {
 protected:
  // Runs `script` where /dev/shm is small, with a daemon that may use 1 GiB.
  void in_tiny_shm(const std::function<void(const Client&)>& script) {
    Child child([&](const Link& test) {
      if (!enter_tiny_shm()) {
        std::cout << "a mount namespace is not to be had: " << std::strerror(errno)
                  << "; nothing is tested here\n";
        test.say("no namespace");
        return;
      }
      Daemon daemon(socket(), instance(), {"--capacity", "1GiB", "--purge"});
      script(connect());
      EXPECT_EQ(daemon.stop(SIGTERM), 0);
      EXPECT_THAT(shm_files(instance()), testing::IsEmpty());
    });
    EXPECT_EQ(child.wait(), 0);
  }
  [[nodiscard]] static ArraySpec spec(std::uint64_t size_bytes) {
    return {Dtype::of<std::uint8_t>(), {size_bytes}};
  }
  [[nodiscard]] static Result<Array> put(const Client& client, const std::string& name,
                                         std::uint64_t size_bytes) {
    return client.put(name, spec(size_bytes), pattern_bytes(size_bytes));
  }
};

TEST_F(TinyShm, RefusesWhatDoesNotFit) {
  in_tiny_shm([&](const Client& client) {
    for (int round = 0; round < 3; ++round) {
      EXPECT_THAT(client.create("large", spec(100 * kMiB)), FailsWith(Errc::out_of_memory));
      EXPECT_THAT(client.create_results("large", spec(100 * kMiB), 10), FailsWith(Errc::out_of_memory));
      EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
      EXPECT_THAT(shm_files(instance()), testing::SizeIs(1)) << "the lock";
    }
    EXPECT_THAT(put(client, "fits", 50 * kMiB), Succeeds()) << "the daemon goes on";
    EXPECT_THAT(put(client, "more", 50 * kMiB), FailsWith(Errc::out_of_memory));
    EXPECT_EQ(copy_of(client.attach("fits")->bytes()), pattern_bytes(50 * kMiB));
  });
}

TEST_F(TinyShm, IsFilledToTheBrim) {
  in_tiny_shm([&](const Client& client) {
    int count = 0;
    Result<Array> last = put(client, "0", kMiB);
    while (last) {
      ++count;
      last = put(client, std::to_string(count), kMiB + static_cast<std::uint64_t>(count) * 100'000);
    }
    EXPECT_THAT(last, FailsWith(Errc::out_of_memory));
    EXPECT_GT(count, 10);
    for (std::uint64_t size = kMiB; size > 0; size /= 2) {
      while (put(client, "small " + std::to_string(++count), size)) {
      }
    }
    for (const auto& info : arrays_of(client)) {
      const auto array = client.attach(info.name);
      ASSERT_THAT(array, Succeeds());
      EXPECT_TRUE(copy_of(array->bytes()) == pattern_bytes(info.data_bytes)) << info.name;
    }
    EXPECT_THAT(client.evict(std::vector<std::string>{"*"}), Succeeds());
    EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
    EXPECT_THAT(put(client, "again", 50 * kMiB), Succeeds());
  });
}

}  // namespace
}  // namespace cowmgr::test
