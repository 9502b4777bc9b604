// Clients whose daemon goes away, and comes back: they find it by themselves, and nothing that they hold is
// lost.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <grp.h>
#include <numeric>
#include <poll.h>
#include <random>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "cowmgr/pool.hpp"
#include "proto/fd_socket.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/insist.hpp"

namespace cowmgr::test {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr uid_t kNobody = 65534;

class Reconnect : public KeepingDaemonTest {
 protected:
  [[nodiscard]] Client persistent() const { return connect("persistent", kDeadline); }
  static Result<Array> put(const Client& client, const std::string& name, std::uint64_t size_bytes,
                           unsigned seed = 1) {
    return client.put(name, {Dtype::of<std::uint8_t>(), {size_bytes}}, pattern_bytes(size_bytes, seed),
                      {.replace = true});
  }
  // Whether a process waits for time to pass, or for another thread (proc(5), /proc/PID/syscall).
  [[nodiscard]] static bool pauses(pid_t pid) {
    long call = -1;
    std::ifstream(fmt::format("/proc/{}/syscall", pid)) >> call;
    return call == SYS_futex;
  }
  [[nodiscard]] static bool has_ended(pid_t pid) {
    pollfd end{open_pidfd(pid).release(), POLLIN, 0};
    const UniqueFd closes(end.fd);
    return ::poll(&end, 1, 0) == 1;
  }
  [[nodiscard]] static std::uint32_t views_of(const Client& client, const std::string& name) {
    const auto details = client.stat(name);
    EXPECT_THAT(details, Succeeds());
    return details ? details->array.views : 0;
  }
};

TEST_F(Reconnect, IsDoneByTheNextCall) {
  const Client client = persistent();
  ASSERT_THAT(put(client, "x", 1000), Succeeds());
  for (int i = 0; i < 3; ++i) {
    kill_and_start();
    const auto array = client.attach("x");
    ASSERT_THAT(array, Succeeds());
    EXPECT_TRUE(copy_of(array->bytes()) == pattern_bytes(1000));
  }
  EXPECT_EQ(client.ping()->sessions, 1U);
}

// As a program does that becomes a service. Descriptors that it opens then have the same numbers.
TEST_F(Reconnect, IsDoneWhereTheProgramClosedTheConnection) {
  Child program([&](const Link& test) {
    const Client client = persistent();
    const auto array = put(client, "x", 1000);
    const auto writer =
        client.create("y", {Dtype::of<std::uint8_t>(), {10}});  // and so the daemon is watched
    std::vector<int> sockets;
    for (int fd = 3; fd < 1024; ++fd) {
      sockaddr_un address{};
      socklen_t size_bytes = sizeof address;
      const bool is_socket = ::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size_bytes) == 0;
      if (is_socket && address.sun_path == socket()) sockets.push_back(fd);
    }
    ASSERT_FALSE(sockets.empty());
    const UniqueFd file(::memfd_create("the program's own", MFD_CLOEXEC));
    for (const int fd : sockets) ASSERT_EQ(::dup2(file.get(), fd), fd);
    ASSERT_THAT(client.ping(), Succeeds());
    EXPECT_TRUE(copy_of(client.attach("x")->bytes()) == pattern_bytes(1000));
    struct stat status {};
    for (const int fd : sockets) EXPECT_EQ(::fstat(fd, &status), 0) << "it is the program's";
    EXPECT_EQ(status.st_size, 0) << "nothing is written there";
    test.say("done");
  });
  EXPECT_EQ(program.hear(), "done");
  EXPECT_EQ(program.wait(), 0);
}

TEST_F(Reconnect, SaysWhatThisProcessViews) {
  const Client client = persistent();
  auto twice = std::vector<Array>();
  twice.push_back(*put(client, "twice", 1000));
  twice.push_back(*client.attach("twice"));
  auto once = std::make_optional(*put(client, "once", 1000));
  (void)put(client, "not at all", 1000);
  kill_and_start();
  EXPECT_EQ(views_of(client, "twice"), 2U);
  EXPECT_EQ(views_of(client, "once"), 1U);
  EXPECT_EQ(views_of(client, "not at all"), 0U);
  once.reset();
  twice.pop_back();
  EXPECT_TRUE(eventually([&] { return views_of(client, "once") == 0 && views_of(client, "twice") == 1; }));
  const auto again = client.attach("once");
  EXPECT_EQ(views_of(client, "once"), 1U);
  EXPECT_THAT(client.evict(std::vector<std::string>{"twice"}), Succeeds());
  EXPECT_EQ(client.stat("twice")->array.state, ArrayState::draining) << "somebody views it";
  twice.clear();
  EXPECT_TRUE(eventually([&] { return !client.stat("twice"); }));
}

// Whoever comes first may look at it and leave: the others have yet to say that they view it.
TEST_F(Reconnect, KeepsWhatWasEvictedForThoseWhoHaveNotComeBackYet) {
  const Client client = persistent();
  const auto old = put(client, "x", 1000);
  EXPECT_THAT(client.evict(std::vector<std::string>{"x"}), Succeeds());
  kill_and_start();
  const Client first = connect();
  { const auto view = first.attach_id(old->id()); }
  EXPECT_THAT(first.ping(), Succeeds()) << "which tells of the release, if nothing else has";
  EXPECT_THAT(client.attach_id(old->id()), Succeeds());
}

// The name of what was evicted or replaced is gone, for the next daemon too; who views it keeps it.
TEST_F(Reconnect, KeepsWhatIsViewedThoughItWasEvictedBefore) {
  const Client client = persistent();
  const auto old = put(client, "x", 1000, 1);
  const auto replaced = put(client, "x", 1000, 2);
  EXPECT_THAT(client.evict(std::vector<std::string>{"x"}), Succeeds());
  for (int i = 0; i < 2; ++i) {
    kill_and_start();
    EXPECT_THAT(client.attach("x"), FailsWith(Errc::not_found));
    EXPECT_TRUE(copy_of(client.attach_id(old->id())->bytes()) == pattern_bytes(1000, 1));
    EXPECT_TRUE(copy_of(client.attach_id(replaced->id())->bytes()) == pattern_bytes(1000, 2));
  }
  EXPECT_THAT(put(client, "x", 1000, 3), Succeeds());
  EXPECT_EQ(arrays_of(client).size(), 3U);
  EXPECT_EQ(client.ping()->used_bytes, 3 * client.stat("x")->array.segment_bytes);
}

TEST_F(Reconnect, ForgetsWhatIsEvictedWhenItsViewersDoNotComeBack) {
  {
    const Client client = connect();
    const auto old = put(client, "x", 1000);
    EXPECT_THAT(client.evict(std::vector<std::string>{"x"}), Succeeds());
    kill_and_start({"--grace", "0"});
    const Client other = connect();
    EXPECT_TRUE(eventually([&] { return other.ping()->memory.outside_bytes > 0; })) << "only mapped";
    EXPECT_TRUE(copy_of(old->bytes()) == pattern_bytes(1000)) << "the view is as it was";
  }
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 1; })) << "the lock";
}

// The kernel says that nobody has it: there is nobody to wait for. Else a daemon that is killed again and
// again within the grace period would keep all that was ever evicted.
TEST_F(Reconnect, ForgetsAtOnceWhatIsEvictedWhenItsViewersAreDead) {
  const Client client = persistent();
  if (client.ping()->protection == Protection::advisory) return;
  ASSERT_THAT(put(client, "x", 1000), Succeeds());
  Child viewer([&](const Link& test) {
    const auto view = persistent().attach("x");
    test.say("viewed");
    test.await_word();
  });
  viewer.expect("viewed");
  EXPECT_THAT(client.evict(std::vector<std::string>{"x"}), Succeeds());
  kill();
  viewer.kill();
  start_keeping({"--grace", "3600"});
  EXPECT_THAT(arrays_of(client), IsEmpty());
  EXPECT_EQ(shm_files(instance()).size(), 1U) << "the lock";
}

TEST_F(Reconnect, ForgetsWhatWasReleasedWhileNobodyListened) {
  const Client client = persistent();
  auto array = std::make_optional(*put(client, "x", 1000));
  kill();
  array.reset();
  start_keeping();
  EXPECT_EQ(views_of(client, "x"), 0U);
}

TEST_F(Reconnect, GoesOnWithAWaitThatWasUnderWay) {
  Child waiter([&](const Link& test) {
    const Client client = persistent();
    test.say("waiting");
    const auto array = client.attach("late", {.wait = kForever});
    ASSERT_THAT(array, Succeeds());
    EXPECT_EQ(array->bytes().size(), 77U);
  });
  waiter.expect("waiting");
  kill_and_start();
  kill_and_start();
  EXPECT_THAT(put(connect(), "late", 77), Succeeds());
  EXPECT_EQ(waiter.wait(), 0);
}

TEST_F(Reconnect, EndsAtItsDeadline) {
  const Client patient = connect("patient", Milliseconds(200));
  const Client not_at_all = connect();
  kill();
  const auto start = std::chrono::steady_clock::now();
  const auto refused = patient.ping();
  EXPECT_GE(std::chrono::steady_clock::now() - start, Milliseconds(200));
  ASSERT_THAT(refused, FailsWith(Errc::disconnected));
  EXPECT_THAT(refused.error().message, HasSubstr("none came within 200 ms"));
  EXPECT_THAT(not_at_all.ping(), FailsWith(Errc::disconnected));
  EXPECT_THAT(not_at_all.ping(), FailsWith(Errc::disconnected));
  start_keeping();
  EXPECT_THAT(patient.ping(), Succeeds()) << "the next call tries again";
}

TEST_F(Reconnect, WaitsForADaemonThatIsNotThereYet) {
  kill();
  const auto refused = Client::connect({.socket = socket(), .command = {}, .wait = Milliseconds(50)});
  ASSERT_THAT(refused, FailsWith(Errc::no_daemon));
  EXPECT_THAT(refused.error().message, HasSubstr("none came within 50 ms"));
  Child early([&](const Link& test) {
    test.say("waiting");
    EXPECT_THAT(Client::connect({.socket = socket(), .command = {}, .wait = kDeadline}), Succeeds());
  });
  early.expect("waiting");
  start_keeping();
  EXPECT_EQ(early.wait(), 0);
}

// A daemon that is just starting may have a socket that nobody may connect to yet (EACCES).
TEST_F(Reconnect, WaitsForASocketThatItMayNotConnectToYet) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become a user whom a mode keeps out";
  Child other([&](const Link& test) {
    ASSERT_EQ(::setgroups(0, nullptr), 0);
    ASSERT_EQ(::setgid(kNobody), 0);
    ASSERT_EQ(::setuid(kNobody), 0);
    const Client client = persistent();
    test.say("connected");
    test.await_word();
    EXPECT_THAT(client.ping(), Succeeds());
  });
  other.expect("connected");
  kill();
  {
    const auto not_yet = listen_at(socket(), 0);
    other.tell();
    EXPECT_TRUE(eventually([&] { return pauses(other.pid()) || has_ended(other.pid()); }));
  }
  ::unlink(socket().c_str());
  start_keeping();
  EXPECT_EQ(other.wait(), 0);
}

TEST_F(Reconnect, DoesNotHoldUpWhatIsGivenUp) {
  const Client client = persistent();
  auto writer = std::make_optional(*client.create("x", {Dtype::of<std::uint8_t>(), {1000}}));
  auto set = client.create_ragged("set", 2);
  auto slot = std::make_optional(*set->lease());
  auto array = std::make_optional(*put(client, "y", 1000));
  kill();
  const auto start = std::chrono::steady_clock::now();
  writer.reset();
  slot.reset();
  array.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - start, kDeadline) << "nobody waited for a daemon";
  start_keeping();
}

TEST_F(Reconnect, TellsThatAWriterIsGoneWhenItCameTooLate) {
  const Client client = persistent();
  auto writer = client.create("x", {Dtype::of<std::uint8_t>(), {1000}});
  kill_and_start({"--grace", "0"});
  // Whoever else is first: what nobody came back to is gone by then.
  const Client other = connect();
  EXPECT_TRUE(eventually([&] { return other.ping()->memory.outside_bytes > 0; })) << "only mapped";
  EXPECT_THAT(writer->seal(), FailsWith(Errc::not_holder));
  EXPECT_THAT(put(client, "x", 1000), Succeeds()) << "the name is free";
}

// The daemon dies while several threads of one client put, attach and release; no call fails but those that
// two daemons in a row were at when they died, and what was put is there.
TEST_F(Reconnect, AtAnyInstantFailsNoCallAndLosesNothing) {
  constexpr int kKills = 40;
  constexpr unsigned kThreads = 3;
  const Client client = persistent();
  std::atomic<bool> is_over{false};
  std::array<std::pair<std::uint64_t, unsigned>, kThreads> last{};  // size and seed of what each put last
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      const std::string mine = fmt::format("array {}", thread);
      for (unsigned seed = 1; !is_over; ++seed) {
        const std::uint64_t size_bytes = random() % 4 == 0 ? 2'500'000 : random() % 9000;
        const auto array = insist([&] { return put(client, mine, size_bytes, seed); });
        ASSERT_THAT(array, Succeeds());
        last.at(thread) = {size_bytes, seed};
        const auto again = insist([&] { return client.attach(mine); });
        ASSERT_THAT(again, Succeeds());
        ASSERT_TRUE(copy_of(again->bytes()) == pattern_bytes(size_bytes, seed));
        ASSERT_TRUE(copy_of(array->bytes()) == pattern_bytes(size_bytes, seed));
      }
    });
  }
  std::mt19937 random(7);
  for (int kills = 0; kills < kKills; ++kills) {
    for (auto asks = random() % 40; asks > 0; --asks) EXPECT_THAT(connect().ping(), Succeeds());
    kill_and_start();
  }
  is_over = true;
  for (auto& thread : threads) thread.join();
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    const auto array = client.attach(fmt::format("array {}", thread));
    ASSERT_THAT(array, Succeeds());
    EXPECT_TRUE(copy_of(array->bytes()) == pattern_bytes(last.at(thread).first, last.at(thread).second));
  }
  EXPECT_TRUE(eventually([&] {
    const auto arrays = arrays_of(client);
    return arrays.size() == kThreads &&
           std::all_of(arrays.begin(), arrays.end(), [](const ArrayInfo& array) { return array.views == 0; });
  }));
}

// The arguments do not fit the job, and are an array of their own; the input is known by its id alone; what
// the chunks fill is one array too. The daemon dies all the while.
// Whoever computes for longer than the grace period without a call keeps its slot, a forked child too.
TEST_F(Reconnect, IsDoneByAForkedChildThatHasASlot) {
  const Client client = persistent();
  Child child([&](const Link& test) {
    auto set = client.create_ragged("r", 1);
    const auto slot = set->lease();
    ASSERT_THAT(slot, Succeeds());
    test.say("leased");
    test.await_word();
  });
  child.expect("leased");
  kill_and_start();
  const Client other = connect();
  EXPECT_TRUE(eventually([&] {
    const auto clients = other.clients();
    return clients && std::ranges::any_of(*clients, [&](const auto& one) { return one.pid == child.pid(); });
  })) << "without a call of its own";
  child.tell();
  EXPECT_EQ(child.wait(), 0);
}

// Threads that all find the daemon gone wait together, and not one after the other: that would take them half
// a minute here.
TEST_F(Reconnect, IsInVainForAllThreadsAtOnce) {
  const Client client = connect("impatient", std::chrono::seconds(1));
  kill();
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < 32; ++i)
    threads.emplace_back([&] { EXPECT_THAT(client.ping(), FailsWith(Errc::disconnected)); });
  for (auto& thread : threads) thread.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(16));
  start_keeping();
}

TEST_F(Reconnect, OfAPoolLetsARunningJobFinish) {
  constexpr std::size_t kItems = 20'000;
  const Client client = persistent();
  const auto pool = Pool::start(client, {.workers = 2});
  ASSERT_THAT(pool, Succeeds());
  std::vector<std::tuple<std::string>> sets;
  for (std::size_t i = 0; i < 400; ++i) sets.emplace_back(std::string(400 + i, 'x'));
  std::vector<std::uint32_t> items(kItems);
  std::iota(items.begin(), items.end(), 0U);
  auto input = client.put<std::uint32_t>("input", items, {kItems});
  EXPECT_THAT(client.evict(std::vector<std::string>{"input"}), Succeeds());
  std::atomic<bool> is_over{false};
  std::thread killer([&] {
    std::mt19937 random(5);
    while (!is_over) {
      for (auto asks = 50 + random() % 200; asks > 0; --asks) (void)connect().ping();
      kill_and_start();
    }
  });
  const auto run_jobs = [&] {
    const auto sizes = pool->starmap([](const std::string& text) { return text.size(); }, sets);
    ASSERT_THAT(sizes, Succeeds());
    for (std::size_t i = 0; i < sets.size(); ++i) ASSERT_EQ(sizes->at(i), 400 + i);
    const auto doubled = pool->map(
        *input,
        [](std::span<const std::uint32_t> in, std::span<std::uint32_t> out) {
          for (std::size_t i = 0; i < in.size(); ++i) out[i] = in[i] * 2;
        },
        MapOptions{.chunks = 200});
    ASSERT_THAT(doubled, Succeeds());
    const auto result = *doubled->template as<std::uint32_t>();
    for (std::uint32_t i = 0; i < kItems; ++i) ASSERT_EQ(result[i], i * 2);
  };
  for (int round = 0; round < 5 && !HasFailure(); ++round) run_jobs();
  is_over = true;
  killer.join();
  EXPECT_EQ(pool->restarts(), 0U) << "no worker was lost";
}

TEST_F(Reconnect, OfAPoolsWorkersLetsTheNextJobRun) {
  const Client client = persistent();
  const auto pool = Pool::start(client, {.workers = 2});
  ASSERT_THAT(pool, Succeeds());
  const auto answer = [](int one) { return one + 1; };
  EXPECT_THAT(pool->apply(answer, 1), testing::Optional(2));
  for (int i = 0; i < 3; ++i) {
    kill_and_start();
    EXPECT_THAT(pool->apply(answer, i), testing::Optional(i + 1));
  }
  EXPECT_EQ(pool->restarts(), 0U) << "the workers found the daemon, too";
}

}  // namespace
}  // namespace cowmgr::test
