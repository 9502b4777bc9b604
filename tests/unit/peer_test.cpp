#include "daemon/store/peer.hpp"

#include <csignal>
#include <cstdio>
#include <functional>
#include <string>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/unique_fd.hpp"

namespace cowmgr {
namespace {

constexpr uid_t kAdmin = 900;
constexpr gid_t kGroup = 50;

// "rw", "r-", "-w" or "--".
std::string rights(const Peer& peer, std::uint32_t mode) {
  const Ownership owned{.uid = 1000, .gid = kGroup, .mode = mode};
  std::string text = is_allowed(peer, owned, Right::read, kAdmin) ? "r" : "-";
  return text + (is_allowed(peer, owned, Right::write, kAdmin) ? "w" : "-");
}

const Peer kOwner{.pid = 1, .uid = 1000, .gid = 77};
const Peer kMember{.pid = 2, .uid = 1001, .gid = kGroup};
const Peer kSideMember{.pid = 3, .uid = 1001, .gid = 1001, .groups = {4, kGroup}};
const Peer kStranger{.pid = 4, .uid = 1002, .gid = 1002, .groups = {1000}};

TEST(Peer, EachClassHasItsOwnBits) {
  EXPECT_EQ(rights(kOwner, 0600), "rw");
  EXPECT_EQ(rights(kMember, 0600), "--");
  EXPECT_EQ(rights(kStranger, 0600), "--");
  EXPECT_EQ(rights(kOwner, 0462), "r-");
  EXPECT_EQ(rights(kMember, 0462), "rw");
  EXPECT_EQ(rights(kSideMember, 0462), "rw");
  EXPECT_EQ(rights(kStranger, 0462), "-w");
}

TEST(Peer, TheFirstClassThatFitsDecides) {
  EXPECT_EQ(rights(kOwner, 0066), "--");
  EXPECT_EQ(rights(kMember, 0606), "--");
  EXPECT_EQ(rights(kSideMember, 0606), "--");
  EXPECT_EQ(rights(kStranger, 0660), "--");
  const Peer owner_in_group{.uid = 1000, .gid = kGroup};
  EXPECT_EQ(rights(owner_in_group, 0060), "--");
}

TEST(Peer, ExecuteBitsMeanNothing) {
  EXPECT_EQ(rights(kOwner, 0111), "--");
  EXPECT_EQ(rights(kStranger, 0111), "--");
}

TEST(Peer, RootAndTheDaemonsUserMayDoEverything) {
  EXPECT_EQ(rights({.uid = 0}, 0000), "rw");
  EXPECT_EQ(rights({.uid = kAdmin, .gid = 5}, 0000), "rw");
  EXPECT_EQ(rights({.uid = 5, .gid = 0, .groups = {0, kAdmin}}, 0000), "--");  // a group is no user
}

// ---- What became of a process ----

// A child that has run `work` and ended, and that nobody has waited for yet: a zombie, until this goes.
class Zombie {
 public:
  explicit Zombie(const std::function<void()>& work) : pid_(::fork()) {
    if (pid_ == 0) {
      work();
      ::_exit(0);
    }
    siginfo_t info{};
    EXPECT_EQ(::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT), 0);
  }
  Zombie(const Zombie&) = delete;
  Zombie& operator=(const Zombie&) = delete;
  ~Zombie() { reap(); }

  [[nodiscard]] pid_t pid() const noexcept { return pid_; }
  void reap() {
    if (!is_reaped_) ::waitpid(pid_, nullptr, 0);
    is_reaped_ = true;
  }

 private:
  pid_t pid_;
  bool is_reaped_ = false;
};

TEST(EndOf, TellsTheSignalThatKilledAProcess) {
  const Zombie killed([] { ::raise(SIGKILL); });
  EXPECT_EQ(end_of(killed.pid()), fmt::format("process {} was killed by signal 9 (Killed)", killed.pid()));
}

TEST(EndOf, TellsTheExitCode) {
  const Zombie failed([] { ::_exit(3); });
  EXPECT_EQ(end_of(failed.pid()), fmt::format("process {} exited with 3", failed.pid()));
}

TEST(EndOf, IsNotMisledByTheNameOfTheCommand) {
  const Zombie failed([] {
    ::prctl(PR_SET_NAME, "a) Z 1 (b");
    ::_exit(200);
  });
  EXPECT_EQ(end_of(failed.pid()), fmt::format("process {} exited with 200", failed.pid()));
}

TEST(EndOf, OtherwiseTheProcessWentAway) {
  EXPECT_EQ(end_of(::getpid()), fmt::format("process {} went away", ::getpid()));  // it runs
  const Zombie good([] {});
  EXPECT_EQ(end_of(good.pid()), fmt::format("process {} went away", good.pid()));
  Zombie reaped([] { ::_exit(3); });
  reaped.reap();
  EXPECT_EQ(end_of(reaped.pid()), fmt::format("process {} went away", reaped.pid()));
}

bool is_linux_since(int major, int minor) {
  utsname kernel{};
  int has_major = 0;
  int has_minor = 0;
  EXPECT_EQ(::uname(&kernel), 0);
  EXPECT_EQ(std::sscanf(kernel.release, "%d.%d", &has_major, &has_minor), 2);
  return std::pair(has_major, has_minor) >= std::pair(major, minor);
}

// Its parent may be faster than the daemon.
TEST(EndOf, IsToldByThePidfdWhenTheProcessWasWaitedFor) {
  Zombie killed([] { ::raise(SIGKILL); });
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, killed.pid(), 0)));
  const std::string before = fmt::format("process {} was killed by signal 9 (Killed)", killed.pid());
  EXPECT_EQ(end_of(killed.pid(), pidfd.get()), before);
  killed.reap();
  EXPECT_EQ(end_of(killed.pid(), pidfd.get()),
            is_linux_since(6, 15) ? before : fmt::format("process {} went away", killed.pid()));
}

}  // namespace
}  // namespace cowmgr
