// Forked children: what they inherit, what they must get for themselves, and what their parent keeps.
#include <algorithm>
#include <atomic>
#include <csignal>
#include <fstream>
#include <optional>
#include <string>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr std::size_t kSize = 100'000;

class Fork : public DaemonTest {
 protected:
  [[nodiscard]] static ArraySpec spec() { return {Dtype::of<std::uint8_t>(), {kSize}}; }
  // Whether a thread of this process waits for what a socket brings (proc(5), /proc/PID/syscall).
  [[nodiscard]] static bool is_receiving(pid_t thread) {
    long call = -1;
    std::ifstream(fmt::format("/proc/self/task/{}/syscall", thread)) >> call;
    return call == SYS_recvmsg || call == SYS_poll;
  }
};

TEST_F(Fork, LeavesTheClientUsable) {
  const Client client = connect();
  const auto array = client.put("a", spec(), pattern_bytes(kSize));
  Child child([&](const Link&) {
    EXPECT_EQ(copy_of(client.attach("a")->bytes()), pattern_bytes(kSize));
    EXPECT_THAT(client.put("b", spec(), pattern_bytes(kSize, 2)), Succeeds());
    EXPECT_EQ(client.ping()->sessions, 2U) << "one of its own";
  });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_EQ(copy_of(client.attach("b")->bytes()), pattern_bytes(kSize, 2));
}

TEST_F(Fork, LetsChildrenReadInheritedViews) {
  const Client client = connect();
  const auto array = client.put("a", spec(), pattern_bytes(kSize));
  auto copy = client.attach("a", {.view = View::copy_on_write});
  Child child([&](const Link&) {
    EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize));
    copy->mutable_bytes()->front() = std::byte{99};
    const auto again = client.attach("a");
    EXPECT_EQ(again->bytes().data(), array->bytes().data()) << "one mapping, here too";
  });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_EQ(copy_of(copy->bytes()), pattern_bytes(kSize)) << "private to the child";
}

TEST_F(Fork, DoesNotReleaseTheParentsViews) {
  const Client client = connect();
  auto array = client.put("a", spec(), pattern_bytes(kSize));
  Child child([&](const Link&) {
    const Array gone = *std::move(array);
    EXPECT_EQ(client.stat("a")->array.views, 1U);
  });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
  EXPECT_EQ(client.stat("a")->array.views, 1U);
  EXPECT_EQ(copy_of(array->bytes()), pattern_bytes(kSize));
}

TEST_F(Fork, MakesNoSecondWriter) {
  const Client client = connect();
  auto writer = client.create("a", spec());
  auto set = client.create_results("set", spec(), 2);
  auto slot = set->lease_slot(0);
  ASSERT_THAT(slot, Succeeds());
  Child child([&](const Link&) {
    EXPECT_THAT(writer->seal(), FailsWith(Errc::wrong_process));
    EXPECT_THAT(slot->commit(), FailsWith(Errc::wrong_process));
    EXPECT_THAT(slot->fail("not mine"), FailsWith(Errc::wrong_process));
    EXPECT_THAT(slot->commit_and_lease(), FailsWith(Errc::wrong_process));
    { const ArrayWriter gone = *std::move(writer); }
    { const Slot gone = *std::move(slot); }
  });
  EXPECT_EQ(child.wait(), 0);
  const auto data = pattern_bytes(kSize);
  std::copy(data.begin(), data.end(), writer->bytes().begin());
  const auto array = writer->seal();
  ASSERT_THAT(array, Succeeds()) << "the parent's writer is as it was";
  EXPECT_EQ(copy_of(array->bytes()), data);
  EXPECT_THAT(slot->commit(), Succeeds());
}

TEST_F(Fork, LetsAChildDropTheClient) {
  std::optional<Client> client = connect();
  std::optional<Array> array = *client->put("a", spec(), pattern_bytes(kSize));
  // Releases are told by a thread of the library, if no request takes them along: let it come to rest.
  array.reset();
  EXPECT_TRUE(eventually([&] { return connect().stat("a")->array.views == 0; }));
  Child child([&](const Link&) { client.reset(); });
  EXPECT_EQ(child.wait(), 0);
  Child busy([&](const Link&) {
    for (int i = 0; i < 50; ++i) {
      (void)client->attach("a");
      EXPECT_TRUE(eventually([&] { return connect().stat("a")->array.views == 0; }))
          << "told without a request";
    }
    client.reset();
  });
  EXPECT_EQ(busy.wait(), 0);
  EXPECT_THAT(client->attach("a"), Succeeds());
}

TEST_F(Fork, LetsAChildLeaseSlotsOfItsOwn) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 2);
  auto mine = set->lease();
  ASSERT_THAT(mine, Succeeds());
  Child child([&](const Link&) {
    auto slot = set->lease();
    ASSERT_THAT(slot, Succeeds());
    EXPECT_EQ((*slot)->index(), 1U);
    std::fill((*slot)->bytes().begin(), (*slot)->bytes().end(), std::byte{2});
    EXPECT_THAT((*slot)->commit(), Succeeds());
  });
  EXPECT_EQ(child.wait(), 0);
  std::fill((*mine)->bytes().begin(), (*mine)->bytes().end(), std::byte{1});
  EXPECT_THAT((*mine)->commit(), Succeeds());
  const auto array = set->wait();
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(array->bytes().front(), std::byte{1});
  EXPECT_EQ(array->bytes().back(), std::byte{2});
}

// Other threads may be anywhere in the library at a fork: the child finds nothing locked by them.
TEST_F(Fork, LetsAChildWorkThoughAThreadOfItsParentWaitsForAnAnswer) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 4);
  auto first = set->lease();
  auto second = set->lease();
  ASSERT_THAT(second, Succeeds());
  ASSERT_EQ(::kill(daemon_->pid(), SIGSTOP), 0);
  std::atomic<pid_t> thread{0};
  std::thread waiting([&] {
    thread = ::gettid();
    EXPECT_THAT((*first)->commit(), Succeeds());
  });
  EXPECT_TRUE(eventually([&] { return thread != 0 && is_receiving(thread); }));
  Child child([&](const Link& test) {
    test.await_word();
    { const Slot gone = *std::move(*first); }
    EXPECT_THAT((*second)->commit(), FailsWith(Errc::wrong_process));
    { const Slot gone = *std::move(*second); }
    auto slot = set->lease();
    ASSERT_THAT(slot, Succeeds());
    EXPECT_THAT((*slot)->commit(), Succeeds());
    { const auto given_back = set->lease(); }
    EXPECT_THAT((*set->lease())->fail("no more"), Succeeds());
    test.say("done");
  });
  ASSERT_EQ(::kill(daemon_->pid(), SIGCONT), 0);
  waiting.join();
  child.tell();
  child.expect("done");
  child.kill();
}

TEST_F(Fork, LetsNoChildKeepWhatItsDeadParentHeld) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 1);
  Child parent([&](const Link& test) {
    const Client own = connect();
    auto slot = own.open_results("set")->lease();
    const auto half = own.create("half", spec());
    ASSERT_THAT(half, Succeeds());
    const Child grandchild([&](const Link& link) {
      ::prctl(PR_SET_PDEATHSIG, 0);
      test.say("leased");
      (void)link.hear();  // its parent's end
      test.say("alive");
      test.await_word();
    });
    ::pause();
  });
  parent.expect("leased");
  EXPECT_THAT(set->lease_slot(0), FailsWith(Errc::busy));
  parent.kill();
  parent.expect("alive");
  auto slot = set->lease(kForever);
  ASSERT_THAT(slot, Succeeds());
  EXPECT_EQ((*slot)->attempt(), 2U);
  EXPECT_TRUE(eventually([&] { return !client.stat("half").has_value(); }));
  EXPECT_THAT((*slot)->commit(), Succeeds());
  EXPECT_THAT(set->wait(), Succeeds()) << "the grandchild has no writable mapping";
  parent.tell();
}

}  // namespace
}  // namespace cowmgr::test
