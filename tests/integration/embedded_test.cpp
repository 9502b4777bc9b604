// A daemon that a program starts for itself: it lives and dies with it.
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

class Embedded : public testing::Test {
 protected:
  void SetUp() override {
    ::setenv("XDG_RUNTIME_DIR", directory_.path().c_str(), 1);
    options_.program = program_path("cowmgr");
  }
  void TearDown() override { EXPECT_THAT(directory_.files(), testing::IsEmpty()); }

  [[nodiscard]] static Result<Array> put(const Client& client, unsigned seed = 1) {
    return client.put("a", {Dtype::of<std::uint8_t>(), {5000}}, pattern_bytes(5000, seed));
  }

  TemporaryDirectory directory_;
  EmbeddedOptions options_;
};

TEST_F(Embedded, LivesAsLongAsItsObject) {
  std::string instance;
  std::optional<Array> array;
  pid_t pid = 0;
  {
    const auto daemon = EmbeddedDaemon::start(options_);
    ASSERT_THAT(daemon, Succeeds());
    pid = daemon->pid();
    const auto client = daemon->connect();
    ASSERT_THAT(client, Succeeds());
    array = *put(*client);
    instance = client->ping()->instance;
    EXPECT_EQ(client->ping()->pid, pid);
    EXPECT_EQ(client->socket(), daemon->socket());
  }
  EXPECT_NE(::kill(pid, 0), 0) << "it has ended, and was reaped";
  EXPECT_THAT(shm_files(instance), testing::IsEmpty());
  EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(5000)) << "views stay valid";
}

TEST_F(Embedded, LivesBesideAnother) {
  const auto one = EmbeddedDaemon::start(options_);
  const auto two = EmbeddedDaemon::start(options_);
  ASSERT_THAT(two, Succeeds());
  EXPECT_NE(one->socket(), two->socket());
  const auto first = put(*one->connect(), 1);
  const auto second = put(*two->connect(), 2);
  EXPECT_EQ(copy_of(one->connect()->attach("a")->bytes()), pattern_bytes(5000, 1));
  EXPECT_EQ(copy_of(two->connect()->attach("a")->bytes()), pattern_bytes(5000, 2));
}

TEST_F(Embedded, TakesItsCapacityFromTheCaller) {
  options_.capacity_bytes = 3 << 20;
  const auto daemon = EmbeddedDaemon::start(options_);
  EXPECT_EQ(daemon->connect()->ping()->capacity_bytes, 3U << 20U);
}

// As batch systems, su(1) and long paths leave it.
TEST_F(Embedded, StartsWhereTheRuntimeDirectoryIsOfNoUse) {
  const std::string long_name = directory_.file(std::string(90, 'x'));
  ASSERT_TRUE(std::filesystem::create_directory(long_name));
  std::vector<std::string> useless = {directory_.file("missing"), long_name, "relative", ""};
  if (::geteuid() == 0) {
    useless.push_back(directory_.file("another user's"));
    std::filesystem::create_directory(useless.back());
    ASSERT_EQ(::chown(useless.back().c_str(), 65534, 65534), 0);
  }
  for (const auto& path : useless) {
    ::setenv("XDG_RUNTIME_DIR", path.c_str(), 1);
    const auto daemon = EmbeddedDaemon::start(options_);
    ASSERT_THAT(daemon, Succeeds()) << path;
    EXPECT_THAT(daemon->connect(), Succeeds());
    const auto directory = std::filesystem::path(daemon->socket()).parent_path();
    EXPECT_EQ(directory.parent_path(), "/tmp") << path;
    struct stat status {};
    ASSERT_EQ(::stat(directory.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777U, 0700U);
  }
  std::filesystem::remove(long_name);
  std::filesystem::remove(directory_.file("another user's"));
}

TEST_F(Embedded, EndsWithAParentThatIsKilled) {
  Child parent([&](const Link& test) {
    const auto daemon = EmbeddedDaemon::start(options_);
    const auto client = daemon->connect();
    const auto array = put(*client);
    test.say(std::to_string(daemon->pid()) + " " + client->ping()->instance);
    test.await_word();
  });
  const std::string word = parent.hear();
  const auto space = word.find(' ');
  ASSERT_NE(space, std::string::npos);
  const UniqueFd daemon = open_pidfd(std::stoi(word));
  const std::string instance = word.substr(space + 1);
  EXPECT_THAT(shm_files(instance), testing::Not(testing::IsEmpty()));
  parent.kill();
  EXPECT_TRUE(wait_readable(daemon.get())) << "the daemon ends";
  EXPECT_THAT(shm_files(instance), testing::IsEmpty());
}

TEST_F(Embedded, EndsWithItsParentThoughAChildLivesOn) {
  Child parent([&](const Link& test) {
    const auto daemon = EmbeddedDaemon::start(options_);
    const auto client = daemon->connect();
    const Child grandchild([](const Link& link) {
      ::prctl(PR_SET_PDEATHSIG, 0);
      (void)link.hear();  // until its parent is gone
    });
    test.say(std::to_string(daemon->pid()));
    test.await_word();
  });
  const UniqueFd daemon = open_pidfd(std::stoi(parent.hear()));
  parent.kill();
  EXPECT_TRUE(wait_readable(daemon.get()));
}

TEST_F(Embedded, IsNotThere) {
  options_.program = "/nowhere/cowmgr";
  const auto missing = EmbeddedDaemon::start(options_);
  EXPECT_THAT(missing, FailsWith(Errc::not_found));
  EXPECT_THAT(missing.error().message, testing::HasSubstr("/nowhere/cowmgr"));
  options_.program = "/bin/false";
  const auto ended = EmbeddedDaemon::start(options_);
  EXPECT_THAT(ended, FailsWith(Errc::no_daemon));
  EXPECT_THAT(ended.error().message, testing::StartsWith("cowmgr ended with exit status 1; its log"));
}

TEST_F(Embedded, IsStoppedOnRequest) {
  auto daemon = EmbeddedDaemon::start(options_);
  const pid_t pid = daemon->pid();
  const std::string instance = daemon->connect()->ping()->instance;
  EXPECT_THAT(daemon->stop(), Succeeds());
  EXPECT_NE(::kill(pid, 0), 0);
  EXPECT_THAT(shm_files(instance), testing::IsEmpty());
  EXPECT_THAT(daemon->stop(), Succeeds()) << "once is enough";
}

TEST_F(Embedded, EndsThoughSomebodyStoppedIt) {
  auto daemon = EmbeddedDaemon::start(options_);
  ::kill(daemon->pid(), SIGSTOP);
  EXPECT_THAT(daemon->stop(), Succeeds());
}

TEST_F(Embedded, TellsHowItEnded) {
  auto daemon = EmbeddedDaemon::start(options_);
  ::kill(daemon->pid(), SIGKILL);
  const auto stopped = daemon->stop();
  ASSERT_THAT(stopped, FailsWith(Errc::no_daemon));
  EXPECT_EQ(stopped.error().message, "cowmgr was killed by signal 9 (Killed)");
}

TEST_F(Embedded, IsNotStoppedByAForkOfItsParent) {
  auto daemon = EmbeddedDaemon::start(options_);
  Child child([&](const Link&) { EXPECT_THAT(daemon->stop(), Succeeds()); });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_THAT(daemon->connect(), Succeeds());
}

TEST_F(Embedded, ObeysSignalsThatItsParentBlocks) {
  sigset_t blocked;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  const auto daemon = EmbeddedDaemon::start(options_);
  ::pthread_sigmask(SIG_UNBLOCK, &blocked, nullptr);
  const UniqueFd ended = open_pidfd(daemon->pid());
  ::kill(daemon->pid(), SIGTERM);
  EXPECT_TRUE(wait_readable(ended.get()));
}

TEST_F(Embedded, OutlivesItsParentIfItIsKept) {
  options_.may_outlive = true;
  std::string socket;
  {
    Child parent([&](const Link& test) {
      auto daemon = EmbeddedDaemon::start(options_);
      (void)put(*daemon->connect());
      daemon->keep();
      test.say(daemon->socket());
      test.say(daemon->log_file());
    });
    socket = parent.hear();
    EXPECT_TRUE(std::filesystem::exists(parent.hear()));
    EXPECT_EQ(parent.wait(), 0);
  }
  const auto client = Client::connect({.socket = socket, .command = {}});
  ASSERT_THAT(client, Succeeds());
  EXPECT_THAT(client->attach("a"), Succeeds());
  const auto info = *client->ping();
  const UniqueFd ended = open_pidfd(info.pid);
  EXPECT_THAT(client->shutdown(), Succeeds());
  EXPECT_TRUE(wait_readable(ended.get()));
  EXPECT_THAT(shm_files(info.instance), testing::IsEmpty());
  std::filesystem::remove_all(std::filesystem::path(socket).parent_path());  // with the log
}

TEST_F(Embedded, EndsWithItsObjectThoughItCouldBeKept) {
  options_.may_outlive = true;
  UniqueFd ended;
  {
    const auto daemon = EmbeddedDaemon::start(options_);
    ASSERT_THAT(daemon, Succeeds());
    ended = open_pidfd(daemon->pid());
  }
  EXPECT_TRUE(wait_readable(ended.get()));
}

TEST_F(Embedded, IsCleanedUpAfterIfItWasKilled) {
  std::string instance;
  {
    const auto daemon = EmbeddedDaemon::start(options_);
    const auto client = daemon->connect();
    const auto array = put(*client);
    instance = client->ping()->instance;
    ::kill(daemon->pid(), SIGKILL);
    const UniqueFd ended = open_pidfd(daemon->pid());
    ASSERT_TRUE(wait_readable(ended.get()));
    EXPECT_THAT(client->ping(), FailsWith(Errc::disconnected));
    EXPECT_THAT(shm_files(instance), testing::Not(testing::IsEmpty()));
  }
  EXPECT_THAT(shm_files(instance), testing::IsEmpty());
}

}  // namespace
}  // namespace cowmgr::test
