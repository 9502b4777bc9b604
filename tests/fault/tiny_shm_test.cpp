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

// Gives this process, and the children to come, mounts of its own. False where the system forbids it.
bool enter_own_mounts() {
  const uid_t uid = ::geteuid();
  if (::unshare(uid == 0 ? CLONE_NEWNS : CLONE_NEWNS | CLONE_NEWUSER) != 0) return false;
  if (uid != 0) {
    write_file("/proc/self/setgroups", "deny");
    write_file("/proc/self/uid_map", "0 " + std::to_string(uid) + " 1");
  }
  return ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
}

bool mount_at(const char* directory, const char* options, unsigned long flags = 0) {
  return ::mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV | flags, options) == 0;
}

class TinyShm : public DaemonLifeTest {
 protected:
  // Runs `script` where `mounted()` says so, in mounts of its own.
  static void apart(const std::function<bool()>& mounted, const std::function<void()>& script) {
    Child child([&](const Link&) {
      if (enter_own_mounts() && mounted()) return script();
      std::cout << "a mount namespace is not to be had: " << std::strerror(errno)
                << "; nothing is tested here\n";
    });
    EXPECT_EQ(child.wait(), 0);
  }
  // Where /dev/shm has 64 MiB.
  static void in_tiny_shm(const std::function<void()>& script) {
    apart([] { return mount_at("/dev/shm", "size=64m,mode=1777"); }, script);
  }
  // The same with a daemon that may use 1 GiB.
  void in_tiny_shm(const std::function<void(const Client&)>& script) {
    in_tiny_shm([&] {
      Daemon daemon(socket(), instance(), {"--capacity", "1GiB", "--purge"});
      script(connect());
      EXPECT_EQ(daemon.stop(SIGTERM), 0);
      EXPECT_THAT(shm_files(instance()), testing::IsEmpty());
    });
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
    EXPECT_THAT(client.evict_matching("*"), Succeeds());
    EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
    EXPECT_THAT(put(client, "again", 50 * kMiB), Succeeds());
  });
}

// To free memory one must be able to start the daemon.
TEST_F(TinyShm, ThatIsFullDoesNotKeepADaemonFromStarting) {
  in_tiny_shm([&] {
    {
      Daemon daemon(socket(), instance(), {"--capacity", "1GiB"});
      EXPECT_THAT(put(connect(), "a", 40 * kMiB), Succeeds());
      auto set = connect().create_ragged("set", 3, {.is_detached = true});
      EXPECT_THAT(set, Succeeds());
      EXPECT_EQ(daemon.stop(SIGTERM), 0);
    }
    std::ofstream filler("/dev/shm/filler");
    const std::string page(4096, 'x');
    while (filler.write(page.data(), static_cast<std::streamsize>(page.size())).flush()) {
    }
    Daemon daemon(socket(), instance(), {"--capacity", "1GiB"}, {.may_refuse = true});
    ASSERT_TRUE(daemon.serves());
    const Client client = connect();
    {
      const auto array = client.attach("a");
      ASSERT_THAT(array, Succeeds());
      EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(40 * kMiB));
    }
    EXPECT_THAT(client.create("b", spec(40 * kMiB)), FailsWith(Errc::out_of_memory));
    EXPECT_THAT(client.evict(std::vector<std::string>{"a"}), Succeeds());
    EXPECT_TRUE(eventually([&] { return client.create("b", spec(30 * kMiB)).has_value(); }));
    EXPECT_THAT(client.shutdown(true), Succeeds());
    EXPECT_EQ(daemon.wait(), 0);
  });
}

// What is wrong with /dev/shm is said, with the cure; another instance would not be one.
TEST_F(TinyShm, ThatIsNotThereOrReadOnlyIsNamed) {
  const auto refused = [&](const std::string& why) {
    const Ended ended = run_daemon({"--socket", socket(), "--instance", instance()});
    EXPECT_EQ(ended.exit_code, 1);
    EXPECT_THAT(ended.log, testing::HasSubstr(why));
    EXPECT_THAT(ended.log, testing::Not(testing::HasSubstr("--instance")));
  };
  apart([] { return mount_at("/dev/shm", "mode=1777", MS_RDONLY); }, [&] { refused("mounted read-only"); });
  apart([] { return mount_at("/dev", "mode=755"); }, [&] { refused("there is no /dev/shm"); });
}

}  // namespace
}  // namespace cowmgr::test
