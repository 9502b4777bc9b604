// Whose daemon a client trusts. Needs root, who alone can become somebody else.
#include <grp.h>
#include <sched.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "cowmgr/pool.hpp"
#include "proto/fd_socket.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/forked.hpp"

namespace cowmgr::test {
namespace {

using testing::HasSubstr;

constexpr uid_t kNobody = 65534;

void become_nobody() {
  ASSERT_EQ(::setgroups(0, nullptr), 0);
  ASSERT_EQ(::setgid(kNobody), 0);
  ASSERT_EQ(::setuid(kNobody), 0);
}

class ServerCheck : public DaemonLifeTest {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
    ASSERT_EQ(::chmod(directory_.path().c_str(), 0777), 0);
  }

  // A daemon of the user nobody, until it is told to end.
  [[nodiscard]] static Child nobodys_daemon(const std::string& socket, const std::string& instance) {
    Child server([&](const Link& test) {
      become_nobody();
      Daemon daemon(socket, instance, {"--purge"});
      test.say("serves");
      test.await_word();
      EXPECT_EQ(daemon.stop(SIGTERM), 0);
    });
    server.expect("serves");
    return server;
  }
  static void end(Child& server) {
    server.tell();
    EXPECT_EQ(server.wait(), 0);
  }
  [[nodiscard]] static Result<Client> connect_to(const std::string& socket, const std::string& user = "") {
    return Client::connect({.socket = socket, .reconnect = Milliseconds(0), .daemon_user = user});
  }
};

TEST_F(ServerCheck, RefusesADaemonOfSomebodyElse) {
  Child server = nobodys_daemon(socket(), instance());
  const auto client = connect_to(socket());
  ASSERT_THAT(client, FailsWith(Errc::permission_denied));
  EXPECT_THAT(client.error().message, HasSubstr("user 65534"));
  EXPECT_THAT(client.error().message, HasSubstr("COWMGR_DAEMON_USER=65534"));
  end(server);
}

TEST_F(ServerCheck, TakesTheUserThatIsNamed) {
  Child server = nobodys_daemon(socket(), instance());
  EXPECT_THAT(connect_to(socket(), "65534"), Succeeds());
  EXPECT_THAT(connect_to(socket(), "nobody"), Succeeds());
  EXPECT_THAT(connect_to(socket(), "daemon"), FailsWith(Errc::permission_denied));
  EXPECT_THAT(connect_to(socket(), "no such user"), FailsWith(Errc::invalid_argument));
  ::setenv("COWMGR_DAEMON_USER", "nobody", 1);
  const auto client = connect_to(socket());
  ::unsetenv("COWMGR_DAEMON_USER");
  ASSERT_THAT(client, Succeeds());
  const auto pool = Pool::start(*client, {.workers = 1});
  EXPECT_THAT(pool->apply([] { return 1; }), testing::Optional(1)) << "its workers trust whom it trusts";
  end(server);
}

TEST_F(ServerCheck, TakesOneOfItsOwnUserAndOfRoot) {
  start();
  EXPECT_THAT(connect_to(socket()), Succeeds());
  Child other([&](const Link&) {
    become_nobody();
    EXPECT_THAT(connect_to(socket()), Succeeds()) << "root's";
  });
  EXPECT_EQ(other.wait(), 0);
  Child owner([&](const Link&) {
    become_nobody();
    Daemon daemon(directory_.file("own"), unique_instance(), {"--purge"});
    EXPECT_THAT(connect_to(directory_.file("own")), Succeeds()) << "its own";
    EXPECT_EQ(daemon.stop(SIGTERM), 0);
  });
  EXPECT_EQ(owner.wait(), 0);
}

// As a package makes it: /run/cowmgr is the service's, and nobody but root can write to /run.
TEST_F(ServerCheck, TakesTheOwnerOfADirectoryThatRootMade) {
  std::string directory = "/run/cowmgr-test-XXXXXX";
  ASSERT_NE(::mkdtemp(directory.data()), nullptr);
  ASSERT_EQ(::chown(directory.c_str(), kNobody, kNobody), 0);
  Child server = nobodys_daemon(directory + "/s", instance());
  EXPECT_THAT(connect_to(directory + "/s"), Succeeds());
  // Another user's socket there is not the service's.
  ASSERT_EQ(::chown(directory.c_str(), 1, 1), 0);
  EXPECT_THAT(connect_to(directory + "/s"), FailsWith(Errc::permission_denied));
  ASSERT_EQ(::chown(directory.c_str(), kNobody, kNobody), 0);
  end(server);
  EXPECT_EQ(::rmdir(directory.c_str()), 0);
}

TEST_F(ServerCheck, IsDoneAgainWhenAnotherDaemonTakesItsPlace) {
  start();
  const Client client = connect("persistent", kDeadline);
  ASSERT_THAT(client.ping(), Succeeds());
  stop();
  Child stranger([&](const Link& test) {
    become_nobody();
    const auto listener = listen_at(socket(), 0666);
    ASSERT_THAT(listener, Succeeds());
    test.say("listens");
    test.await_word();
    EXPECT_EQ(::unlink(socket().c_str()), 0);
  });
  stranger.expect("listens");
  EXPECT_THAT(client.ping(), FailsWith(Errc::permission_denied));
  end(stranger);
}

// From within a user namespace, nobody can tell the users outside from each other.
TEST_F(ServerCheck, TakesNobodyFromOutsideAUserNamespaceUnlessNamed) {
  Child server = nobodys_daemon(socket(), instance());
  Child inside([&](const Link&) {
    if (::unshare(CLONE_NEWUSER) != 0) return;  // not allowed here
    write_file("/proc/self/uid_map", "0 0 1");
    const auto client = connect_to(socket());
    ASSERT_THAT(client, FailsWith(Errc::permission_denied));
    EXPECT_THAT(client.error().message, HasSubstr("outside this user namespace"));
    EXPECT_THAT(connect_to(socket(), "65534"), Succeeds());
  });
  EXPECT_EQ(inside.wait(), 0);
  end(server);
}

}  // namespace
}  // namespace cowmgr::test
