// A daemon's life: start, stop, being killed, and coming after one that was.
#include <csignal>
#include <fcntl.h>
#include <fstream>
#include <iterator>
#include <string>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

constexpr std::size_t kSize = 50'000;

class DaemonLife : public DaemonLifeTest {
 protected:
  [[nodiscard]] static Result<Array> put(const Client& client, const std::string& name) {
    return client.put(name, {Dtype::of<std::uint8_t>(), {kSize}}, pattern_bytes(kSize));
  }
};

TEST_F(DaemonLife, EndsInGoodOrder) {
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) {
    start();
    const Client client = connect();
    const auto array = put(client, "a");
    const auto writer = client.create("half", {Dtype::of<std::uint8_t>(), {kSize}});
    auto set = client.create_results("set", {Dtype::of<std::uint8_t>(), {kSize}}, 2);
    auto slot = set->lease();
    ASSERT_THAT(slot, Succeeds());
    EXPECT_EQ(daemon_->stop(signal), 0);
    EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize)) << "views stay valid";
    EXPECT_THAT(client.ping(), FailsWith(Errc::disconnected));
    EXPECT_THAT((*slot)->commit(), FailsWith(Errc::disconnected));
    EXPECT_THAT(set->wait(), FailsWith(Errc::disconnected));
    EXPECT_THAT(Client::connect({.socket = socket(), .command = {}}), FailsWith(Errc::no_daemon));
    EXPECT_THAT(shm_files(instance()), testing::IsEmpty());
    EXPECT_THAT(directory_.files(), testing::IsEmpty());
    daemon_.reset();
  }
}

TEST_F(DaemonLife, EndsWhenAskedTo) {
  Daemon& daemon = start();
  const Client client = connect();
  const auto array = put(client, "a");
  EXPECT_THAT(client.shutdown(), Succeeds());
  EXPECT_EQ(daemon.wait(), 0);
  daemon_.reset();
  EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize));
}

// It looks for more requests before it sleeps, but not for long.
TEST_F(DaemonLife, SleepsWhenNobodyAsks) {
  const Daemon& daemon = start();
  const Client client = connect();
  for (int i = 0; i < 100; ++i) EXPECT_THAT(client.ping(), Succeeds());
  EXPECT_TRUE(eventually([&] {
    std::ifstream stat(fmt::format("/proc/{0}/task/{0}/stat", daemon.pid()));
    std::string pid;
    std::string command;
    char state = 0;
    return stat >> pid >> command >> state && state == 'S';
  }));
}

TEST_F(DaemonLife, EndsThoughPeersWait) {
  start();
  std::vector<RawPeer> peers;
  peers.reserve(6);
  for (int i = 0; i < 6; ++i) peers.push_back(RawPeer::greeted(socket()));
  const RawPeer silent(socket());
  using Builder = RawPeer::Builder;
  peers[0].request([](Builder& b) {
    const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString("never")};
    return wire::CreateAttachDirect(b, &names, nullptr, ~0U);
  });
  peers[1].request([](Builder& b) { return wire::CreateOpenResultsDirect(b, "never", ~0U); });
  const Client client = connect();
  auto set = client.create_results("set", {Dtype::of<std::uint8_t>(), {kSize}}, 1);
  const auto slot = set->lease();
  const std::uint64_t id = client.list_results()->front().id;
  peers[2].request([&](Builder& b) { return wire::CreateLeaseSlots(b, id, -1, 1, false, ~0U); });
  peers[3].request(
      [&](Builder& b) { return wire::CreateWaitResults(b, id, set->info()->revision, UINT64_MAX, ~0U); });
  peers[4].request([&](Builder& b) { return wire::CreatePing(b); });
  EXPECT_THAT(client.ping(), Succeeds());
  stop();
  for (RawPeer& peer : peers) EXPECT_TRUE(peer.is_hung_up());
}

// The end of a process is known before a frame that its forked child sends in its name.
TEST_F(DaemonLife, DoesNothingForTheDead) {
  start({"--owner-sessions", "3"});
  const Client client = connect();
  for (int round = 0; round < 4; ++round) {
    Child dead([&](const Link&) {
      RawPeer peer = RawPeer::greeted(socket());
      const UniqueFd own_end = open_pidfd(::getpid());
      ::kill(daemon_->pid(), SIGSTOP);
      if (::fork() != 0) return;
      (void)wait_readable(own_end.get());
      const std::vector<std::uint64_t> shape = {1};
      (void)peer.request(
          [&](RawPeer::Builder& b) { return wire::CreateMakeArrayDirect(b, "a", "|u1", &shape); });
      ::kill(daemon_->pid(), SIGCONT);
      ::_exit(0);
    });
    EXPECT_EQ(dead.wait(), 0);
    EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
    EXPECT_THAT(arrays_of(client), testing::IsEmpty());
  }
  EXPECT_TRUE(eventually([&] { return Client::connect({.socket = socket(), .command = {}}).has_value(); }))
      << "their connections are not charged any more";
  stop();
}

TEST_F(DaemonLife, IsMissedByItsClients) {
  start();
  const Client client = connect();
  const auto array = put(client, "a");
  EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
  EXPECT_THAT(client.ping(), FailsWith(Errc::disconnected));
  EXPECT_THAT(client.attach("a"), FailsWith(Errc::disconnected));
  EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize)) << "readers do not notice";
  EXPECT_THAT(Client::connect({.socket = socket(), .command = {}}), FailsWith(Errc::no_daemon));
  start();  // and takes its leftovers away
}

TEST_F(DaemonLife, IsMissedByWhoWaits) {
  start();
  Child waiter([&](const Link& test) {
    const Client client = connect();
    test.say("waiting");
    EXPECT_THAT(client.attach("never", {.wait = kForever}), FailsWith(Errc::disconnected));
  });
  waiter.expect("waiting");
  stop();
  EXPECT_EQ(waiter.wait(), 0);
  daemon_.reset();
}

// ---- One daemon for each instance, and for each socket ----

TEST_F(DaemonLife, IsTheOnlyOneOfItsInstance) {
  start();
  const auto second = run_daemon({"--socket", directory_.file("other"), "--instance", instance()});
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_THAT(second.log, testing::HasSubstr("instance '" + instance() + "' is in use"));
  EXPECT_THAT(second.log, testing::HasSubstr("process " + std::to_string(daemon_->pid())));
  EXPECT_THAT(connect().ping(), Succeeds());
  EXPECT_THAT(directory_.files(), testing::UnorderedElementsAre("s.lock", "s"))
      << "nothing of the second one";
}

TEST_F(DaemonLife, IsTheOnlyOneAtItsSocket) {
  start();
  const std::string other = unique_instance();
  const auto second = run_daemon({"--socket", socket(), "--instance", other});
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_THAT(second.log, testing::HasSubstr(socket()));
  EXPECT_THAT(second.log, testing::HasSubstr("process " + std::to_string(daemon_->pid())));
  EXPECT_THAT(connect().ping(), Succeeds());
  EXPECT_THAT(shm_files(other), testing::IsEmpty());
}

TEST_F(DaemonLife, DoesNotTakeASocketThatServes) {
  auto listener = listen_at(socket(), 0600);
  ASSERT_THAT(listener, Succeeds());
  const auto refused = run_daemon({"--socket", socket(), "--instance", instance()});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.log, testing::HasSubstr(socket()));
  EXPECT_THAT(connect_to(socket()), Succeeds()) << "it still serves";
  listener->reset();
  start();  // now it is nobody's
}

TEST_F(DaemonLife, DoesNotTakeAFile) {
  std::ofstream(socket()) << "precious";
  const auto refused = run_daemon({"--socket", socket(), "--instance", instance()});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.log, testing::HasSubstr("is not a socket"));
  std::string text;
  std::ifstream(socket()) >> text;
  EXPECT_EQ(text, "precious");
  ::unlink(socket().c_str());
}

TEST_F(DaemonLife, BeginsWhereAnotherWasKilled) {
  for (int round = 0; round < 3; ++round) {
    start();
    const Client client = connect();
    const auto array = put(client, "a");
    const auto writer = client.create("half", {Dtype::of<std::uint8_t>(), {kSize}});
    EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
    EXPECT_THAT(shm_files(instance()), testing::SizeIs(3)) << "two segments and the lock";
    start();
    EXPECT_EQ(connect().ping()->used_bytes, 0U);
    EXPECT_THAT(shm_files(instance()), testing::SizeIs(1)) << "the lock";
    EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize)) << "of the daemon before";
    EXPECT_THAT(put(connect(), "a"), Succeeds());
    stop();
  }
}

TEST_F(DaemonLife, LeavesOtherInstancesAlone) {
  start();
  const auto array = put(connect(), "a");
  const std::string longer = instance() + "-2";
  {
    Daemon other(directory_.file("other"), longer, {});
    EXPECT_EQ(other.stop(SIGKILL), -SIGKILL);
  }
  {
    Daemon other(directory_.file("other"), longer, {});
    EXPECT_EQ(other.stop(SIGTERM), 0);
  }
  EXPECT_THAT(shm_files(longer), testing::IsEmpty());
  EXPECT_THAT(connect().ping(), Succeeds());
}

// ---- Whoever started it ----

TEST_F(DaemonLife, SurvivesALogThatNobodyReads) {
  int ends[2] = {-1, -1};
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const int saved = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
  ::dup2(ends[1], STDERR_FILENO);
  ::close(ends[1]);
  start({"--log-level", "trace"});
  ::dup2(saved, STDERR_FILENO);
  ::close(saved);
  ::close(ends[0]);
  EXPECT_THAT(put(connect(), "a"), Succeeds());
}

// What it opens first must not become its log: that is the file that says which process has the instance.
TEST_F(DaemonLife, NeedsNoStandardError) {
  start_keeping({"--purge", "--log-level", "trace"}, {.log = kClosed});
  EXPECT_THAT(put(connect(), "a"), Succeeds());
  std::ifstream lock(fmt::format("/dev/shm/cowmgr.{}.lock", instance()));
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(lock), {}), std::to_string(daemon_->pid()));
}

TEST_F(DaemonLife, ThatIsEmbeddedEndsThoughItsParentIsGoneAtOnce) {
  int ends[2] = {-1, -1};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  ::close(ends[0]);
  const std::string own = directory_.file("own");
  ASSERT_EQ(::mkdir(own.c_str(), 0700), 0);
  const auto ended =
      run_daemon({"--socket", own + "/s", "--instance", instance(), "--parent-fd", std::to_string(ends[1])});
  ::close(ends[1]);
  EXPECT_EQ(ended.exit_code, 0) << ended.log;
}

}  // namespace
}  // namespace cowmgr::test
