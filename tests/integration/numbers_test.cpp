// Numbers that mean something inside the daemon, said by a stranger: they are only numbers.
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <fstream>
#include <functional>
#include <limits>
#include <linux/sched.h>
#include <sched.h>
#include <string>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/session.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

constexpr pid_t kLastPid = (1 << kPidBits) - 1;  // of all that Linux can give: all bits of a session's pid

auto ping() {
  return [](Builder& b) { return wire::CreatePing(b); };
}
auto resume(std::uint64_t session) {
  return [=](Builder& b) { return wire::CreateHelloDirect(b, kProtocolVersion, "raw", session, true); };
}

class Numbers : public DaemonTest {};

// A number that no daemon gives names no session that was lost: whoever says it gets a new one.
TEST_F(Numbers, ThatNoDaemonGivesOpenNoSession) {
  const SessionId own = session_id(77, ::getpid());
  for (const SessionId bit : {std::uint64_t{1} << 53U, std::uint64_t{1} << 62U, std::uint64_t{1} << 63U}) {
    RawPeer peer(socket());
    const auto* welcome = peer.ask<wire::Welcome>(resume(own | bit));
    ASSERT_NE(welcome, nullptr);
    EXPECT_NE(welcome->session(), own | bit);
    EXPECT_LT(welcome->session(), std::uint64_t{1} << 53U);
    EXPECT_NE(peer.ask<wire::Pong>(ping()), nullptr);
  }
  RawPeer peer(socket());
  const auto* welcome = peer.ask<wire::Welcome>(resume(own));
  ASSERT_NE(welcome, nullptr);
  EXPECT_EQ(welcome->session(), own) << "a number of its own the process gets back";
}

// Each number of each request may be one with a meaning: nothing, anything, the last there is.
TEST_F(Numbers, OfEveryRequestAreOnlyNumbers) {
  const Client client = connect();
  ASSERT_THAT(client.put<std::uint8_t>("a", std::vector<std::uint8_t>{1}, {1}), Succeeds());
  auto set = client.create_ragged("set", 3);
  ASSERT_THAT(set, Succeeds());
  const std::uint64_t id = set->info()->id;
  RawPeer peer = RawPeer::greeted(socket());
  ASSERT_NE(peer.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, id, 1); }), nullptr);
  const auto is_refused = [&](const auto& build) { return peer.refusal(build).code != Errc{}; };
  for (const std::uint64_t odd :
       {std::uint64_t{0}, std::uint64_t{1} << 31U, std::uint64_t{1} << 32U, std::uint64_t{1} << 63U,
        std::numeric_limits<std::uint64_t>::max() - 1, std::numeric_limits<std::uint64_t>::max()}) {
    SCOPED_TRACE(odd);
    const std::vector<std::uint64_t> ids = {odd};
    const std::vector<std::uint32_t> attempts = {static_cast<std::uint32_t>(odd)};
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateSealArray(b, odd, odd); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateAbortArray(b, odd); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateAttachDirect(b, nullptr, &ids); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateLeaseSlots(b, odd); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateCommitSlotsDirect(b, odd, &ids); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateFailSlotDirect(b, odd, odd, "why"); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateWaitResults(b, odd); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateCancelResults(b, odd); }));
    // A set that is there, and a slot, an attempt, a shape that is not.
    const std::uint64_t slot = odd == 0 ? 2 : odd;
    EXPECT_TRUE(
        is_refused([&](Builder& b) { return wire::CreateAllocateSlotDirect(b, id, slot, "|u1", &ids); }));
    EXPECT_TRUE(is_refused([&](Builder& b) { return wire::CreateFailSlotDirect(b, id, slot, "why"); }));
    EXPECT_TRUE(is_refused([&](Builder& b) {
      const std::vector<std::uint64_t> slots = {slot};
      return wire::CreateGiveBackSlotsDirect(b, id, &slots, false, &attempts);
    }));
    EXPECT_TRUE(is_refused([&](Builder& b) {
      const std::vector<std::uint64_t> shape = {std::uint64_t{1} << 33U, std::uint64_t{1} << 33U, odd | 1U};
      return wire::CreateMakeArrayDirect(b, "x", "<f8", &shape);
    }));
    if (odd == 0 || odd >= std::uint64_t{1} << 32U) {
      EXPECT_TRUE(is_refused([&](Builder& b) {
        return wire::CreateMakeResultsDirect(b, "y", "|u1", nullptr, odd, false, false, 0600, true);
      }));
    }
    // What has an answer for every number has one for these.
    EXPECT_NE(
        peer.ask<wire::Arrays>([&](Builder& b) { return wire::CreateListArraysDirect(b, "", odd, ~0U); }),
        nullptr);
    EXPECT_NE(peer.ask<wire::Clients>([&](Builder& b) { return wire::CreateListClients(b, odd, ~0U); }),
              nullptr);
    EXPECT_NE(
        peer.ask<wire::Results>([&](Builder& b) { return wire::CreateListResultsDirect(b, "", odd, ~0U); }),
        nullptr);
    EXPECT_NE(peer.ask<wire::Results>([&](Builder& b) { return wire::CreateWaitResults(b, id, odd, odd); }),
              nullptr);
    EXPECT_NE(peer.ask<wire::Done>([&](Builder& b) {
      const auto holding = wire::CreateHoldingDirect(b, odd, &ids, &attempts);
      const auto writing = wire::CreateWriting(
          b, odd, wire::CreateMakeArrayDirect(b, "z", "|u1", &ids, wire::ByteOrder{9}, false, false, ~0U));
      const std::vector<flatbuffers::Offset<wire::Holding>> holdings = {holding};
      const std::vector<flatbuffers::Offset<wire::Writing>> writings = {writing};
      return wire::CreateHoldDirect(b, &ids, &writings, &holdings);
    }),
              nullptr);
    EXPECT_TRUE(peer.request([&](Builder& b) { return wire::CreateUnmapped(b, odd); }));
  }
  EXPECT_EQ(peer.ask<wire::Pong>(ping())->arrays(), 1U);
  EXPECT_EQ(set.value().info()->leased, 1U) << "what the peer holds it holds still";
}

// ---- The process with the last pid ----

// A child with that pid in the caller's pid namespace: as fork(2), or -1.
pid_t fork_as(pid_t pid) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<std::uintptr_t>(&pid);
  arguments.set_tid_size = 1;
  return static_cast<pid_t>(::syscall(SYS_clone3, &arguments, sizeof arguments));
}

// Whether processes of a pid namespace may have the last pid, which may be seen to for this namespace alone
// (Linux 6.14: kernel.pid_max is each namespace's own).
bool allow_last_pid() {
  std::uint64_t limit = 0;
  std::ifstream("/proc/sys/kernel/pid_max") >> limit;
  if (limit > kLastPid) return true;
  utsname name{};
  int major = 0;
  int minor = 0;
  if (::uname(&name) != 0 || std::sscanf(name.release, "%d.%d", &major, &minor) != 2) return false;
  if (major < 6 || (major == 6 && minor < 14)) return false;
  std::ofstream("/proc/sys/kernel/pid_max") << kLastPid + 1 << std::endl;
  std::ifstream("/proc/sys/kernel/pid_max") >> limit;
  return limit > kLastPid;
}

int exit_code_of(const std::function<void()>& script) {
  script();
  return testing::Test::HasFailure() ? 1 : 0;
}

// Runs `script` in a process of its own that has the last pid of a pid namespace that is all its daemon's.
// Returns how it ended, or 77 where the kernel does not give such a pid.
int as_last_process(const std::function<void(const Daemon&)>& script) {
  const TemporaryDirectory directory;
  const std::string instance = unique_instance();
  Child outer([&](const Link&) {
    if (::unshare(CLONE_NEWPID) != 0) ::_exit(77);
    const pid_t init = ::fork();
    if (init != 0) ::_exit(reap(init) & 0xFF);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!allow_last_pid()) ::_exit(77);
    int rc = 1;
    {
      Daemon daemon(directory.file("s"), instance, {"--purge"});
      const pid_t last = fork_as(kLastPid);
      if (last == 0) ::_exit(exit_code_of([&] { script(daemon); }));
      int status = 0;
      rc = last < 0 ? 77
                    : (::waitpid(last, &status, 0) == last && WIFEXITED(status) ? WEXITSTATUS(status) : 1);
      if (daemon.stop(SIGTERM) != 0) rc = 2;
    }
    ::_exit(rc);
  });
  return outer.wait();
}

TEST(LastPid, DoesNotMakeTheDaemonsOwnSessionItsProcesses) {
  const int rc = as_last_process([](const Daemon& daemon) {
    ASSERT_EQ(::getpid(), kLastPid);
    for (const SessionId session : {~SessionId{0}, ~SessionId{0} >> 11U, SessionId{1} << 63U | kLastPid}) {
      RawPeer peer(daemon.socket());
      const auto* welcome = peer.ask<wire::Welcome>(resume(session));
      ASSERT_NE(welcome, nullptr) << session;
      EXPECT_LT(welcome->session(), std::uint64_t{1} << 53U);
      EXPECT_NE(peer.ask<wire::Pong>(ping()), nullptr);
    }
  });
  if (rc == 77) GTEST_SKIP() << "no process can have pid " << kLastPid << " here";
  EXPECT_EQ(rc, 0) << "1: the process was not served, 2: the daemon did not end well";
}

}  // namespace
}  // namespace cowmgr::test
