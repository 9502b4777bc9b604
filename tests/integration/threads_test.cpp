// One client in many threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr unsigned kThreads = 8;

template <class Work>
void in_threads(const Work& work) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) threads.emplace_back([&work, i] { work(i); });
  for (auto& thread : threads) thread.join();
}

class Threads : public DaemonTest {
 protected:
  [[nodiscard]] static ArraySpec spec(std::uint64_t size_bytes = 20'000) {
    return {Dtype::of<std::uint8_t>(), {size_bytes}};
  }
};

TEST_F(Threads, AskSideBySide) {
  constexpr int kRounds = 60;
  const Client client = connect();
  const auto data = pattern_bytes(20'000);
  const auto shared = client.put("shared", spec(), data);
  in_threads([&](unsigned thread) {
    std::mt19937 random(thread);
    for (int round = 0; round < kRounds; ++round) {
      const std::string own = "own " + std::to_string(thread);
      EXPECT_THAT(client.put(own, spec(), data, {.replace = true}), Succeeds());
      const auto views = client.attach(std::vector<std::string>{"shared", own});
      ASSERT_THAT(views, Succeeds());
      EXPECT_TRUE(std::equal(data.begin(), data.end(), (*views)[1].bytes().begin()));
      if (random() % 2 == 0) {
        EXPECT_THAT(client.list(), Succeeds());
      }
      if (random() % 4 == 0) {
        EXPECT_THAT(client.stat("shared"), Succeeds());
      }
      if (random() % 4 == 0) {
        EXPECT_THAT(client.evict(std::vector<std::string>{own}), Succeeds());
      }
      EXPECT_THAT(client.attach("shared", {.view = View::copy_on_write}), Succeeds());
    }
  });
  EXPECT_TRUE(eventually([&] { return client.stat("shared")->array.views == 1; }));
  EXPECT_EQ(client.ping()->sessions, 1U) << "all threads are one session";
  EXPECT_LE(client.clients()->front().channels, kThreads + 1);
  ASSERT_THAT(client.evict_matching("*"), Succeeds());
  EXPECT_TRUE(eventually([&] { return client.list()->size() == 1; })) << "the shared one drains";
}

TEST_F(Threads, WaitWithoutHoldingOthersUp) {
  const Client client = connect();
  std::atomic<unsigned> seen{0};
  std::vector<std::thread> waiters;
  for (unsigned i = 0; i < kThreads; ++i) {
    waiters.emplace_back([&, i] {
      const auto array = client.attach("late " + std::to_string(i), {.wait = kForever});
      EXPECT_THAT(array, Succeeds());
      ++seen;
    });
  }
  for (unsigned i = 0; i < kThreads; ++i) {
    EXPECT_THAT(client.ping(), Succeeds());
    EXPECT_THAT(client.put("late " + std::to_string(i), spec(), pattern_bytes(20'000)), Succeeds());
  }
  for (auto& waiter : waiters) waiter.join();
  EXPECT_EQ(seen, kThreads);
  for (const auto& array : arrays_of(client)) {
    EXPECT_TRUE(eventually([&] { return client.stat(array.name)->array.views == 0; })) << array.name;
  }
}

// The 65th call is answered although 64 threads wait: it does not wait for one of them to ask again, which
// they do after 20 s.
TEST_F(Threads, AskAlthough64OthersWait) {
  constexpr std::uint32_t kWaiters = 64;
  const Client client = connect();
  const Client witness = connect("witness");
  const auto in_time = std::chrono::steady_clock::now() + std::chrono::seconds(15);
  std::vector<std::thread> waiters;
  for (std::uint32_t i = 0; i < kWaiters; ++i)
    waiters.emplace_back([&] { EXPECT_THAT(client.attach("late", {.wait = kForever}), Succeeds()); });
  EXPECT_TRUE(eventually([&] { return witness.clients()->front().channels == kWaiters; }));
  auto answered = std::async(std::launch::async, [&] {
    EXPECT_THAT(client.ping(), Succeeds());
    EXPECT_THAT(client.put("a", spec(), pattern_bytes(20'000)), Succeeds());
  });
  EXPECT_EQ(answered.wait_until(in_time), std::future_status::ready);
  EXPECT_THAT(witness.put("late", spec(), pattern_bytes(20'000)), Succeeds());
  for (auto& waiter : waiters) waiter.join();
}

// Nor does the 65th that waits.
TEST_F(Threads, WaitAlthough64OthersDo) {
  constexpr std::uint32_t kWaiters = 64;
  const Client client = connect();
  const Client witness = connect("witness");
  const auto in_time = std::chrono::steady_clock::now() + std::chrono::seconds(15);
  std::vector<std::thread> waiters;
  for (std::uint32_t i = 0; i < kWaiters; ++i)
    waiters.emplace_back([&] { EXPECT_THAT(client.attach("late", {.wait = kForever}), Succeeds()); });
  EXPECT_TRUE(eventually([&] { return witness.clients()->front().channels == kWaiters; }));
  std::vector<std::future<void>> more;
  for (int i = 0; i < 20; ++i) {
    more.push_back(std::async(std::launch::async,
                              [&] { EXPECT_THAT(client.attach("soon", {.wait = kForever}), Succeeds()); }));
  }
  EXPECT_THAT(witness.put("soon", spec(), pattern_bytes(20'000)), Succeeds());
  for (auto& one : more) EXPECT_EQ(one.wait_until(in_time), std::future_status::ready);
  EXPECT_THAT(witness.put("late", spec(), pattern_bytes(20'000)), Succeeds());
  for (auto& waiter : waiters) waiter.join();
}

TEST_F(Threads, MayBeMoreThanTheConnectionsOfAClient) {
  const Client client = connect();
  std::vector<std::thread> threads;
  for (int i = 0; i < 100; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round)
        EXPECT_THAT(client.attach("a", {.wait = Milliseconds(200)}), testing::_);
    });
  }
  EXPECT_THAT(client.put("a", spec(), pattern_bytes(20'000)), Succeeds());
  for (auto& thread : threads) thread.join();
  EXPECT_LE(client.clients()->front().channels, 80U);
}

// The last commit tells the daemon, beside its own request, that the set's memory is not mapped any more.
TEST_F(Threads, NeedOneConnectionForACommit) {
  constexpr std::uint32_t kOthers = 63;  // with the one that commits, as many as a client has connections
  const Client client = connect();
  const Client witness = connect("witness");
  auto set = client.create_results("set", spec(), 1);
  ASSERT_THAT(set, Succeeds());
  auto slot = set->lease();
  ASSERT_THAT(slot, Succeeds());
  // Each of the others lets go of its connection for a moment when it asks again, after 20 s.
  const auto in_time = std::chrono::steady_clock::now() + std::chrono::seconds(15);
  std::vector<std::thread> others;
  for (std::uint32_t i = 0; i < kOthers; ++i)
    others.emplace_back([&] { EXPECT_THAT(client.attach("late", {.wait = kForever}), Succeeds()); });
  EXPECT_TRUE(eventually([&] { return witness.clients()->front().channels == kOthers; }));
  auto next = std::async(std::launch::async, [&] { return (*slot)->commit_and_lease(); });
  EXPECT_EQ(next.wait_until(in_time), std::future_status::ready);
  EXPECT_THAT(witness.put("late", spec(), pattern_bytes(20'000)), Succeeds());
  for (auto& thread : others) thread.join();
  EXPECT_THAT(next.get(), Succeeds());
}

TEST_F(Threads, FillOneArrayTogether) {
  constexpr std::uint64_t kSize = 1 << 20;
  const Client client = connect();
  auto writer = client.create("a", spec(kSize));
  const auto data = pattern_bytes(kSize);
  in_threads([&](unsigned thread) {
    const std::size_t part = kSize / kThreads;
    std::copy_n(data.begin() + static_cast<std::ptrdiff_t>(thread * part), part,
                writer->bytes().begin() + static_cast<std::ptrdiff_t>(thread * part));
  });
  const auto array = writer->seal();
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(copy_of(array->bytes()), data);
}

TEST_F(Threads, WorkOnOneResultSet) {
  const Client client = connect();
  for (int round = 0; round < 10; ++round) {
    auto set = client.create_results("set", {Dtype::of<std::uint32_t>(), {3000}}, 101, {.replace = true});
    ASSERT_THAT(set, Succeeds());
    std::atomic<std::uint64_t> done{0};
    in_threads([&](unsigned thread) {
      std::mt19937 random(thread);
      ResultSet own = thread % 2 == 0 ? *set : *client.open_results("set");
      auto slot = own.lease();
      while (slot && *slot) {
        const auto items = *(*slot)->as<std::uint32_t>();
        for (std::size_t i = 0; i < items.size(); ++i)
          items[i] = static_cast<std::uint32_t>((*slot)->rows().begin + i);
        if (random() % 8 == 0) {  // gives it back
          slot->reset();
          slot = own.lease();
          continue;
        }
        ++done;
        if (random() % 2 == 0) {
          slot = (*slot)->commit_and_lease();
        } else {
          EXPECT_THAT((*slot)->commit(), Succeeds());
          slot = own.lease();
        }
      }
      EXPECT_THAT(slot, Succeeds());
    });
    EXPECT_EQ(done, 101U);
    const auto array = set->wait();
    ASSERT_THAT(array, Succeeds());
    const auto items = *array->as<std::uint32_t>();
    for (std::uint32_t i = 0; i < items.size(); ++i) ASSERT_EQ(items[i], i);
  }
}

TEST_F(Threads, SeeTheDaemonGo) {
  const Client client = connect();
  std::atomic<unsigned> waiting{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      ++waiting;
      EXPECT_THAT(client.attach("never", {.wait = kForever}), FailsWith(Errc::disconnected));
    });
  }
  while (waiting < kThreads) std::this_thread::yield();
  stop();
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(client.ping(), FailsWith(Errc::disconnected));
}

TEST_F(Threads, DoNotDisturbAFork) {
  const Client client = connect();
  const auto array = client.put("a", spec(), pattern_bytes(20'000));
  std::atomic<bool> is_over{false};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      while (!is_over) EXPECT_THAT(client.attach("a"), Succeeds());
    });
  }
  for (int round = 0; round < 20; ++round) {
    std::optional<Array> view;  // the child ends with it, without a release
    Child child([&](const Link&) {
      view = client.attach("a").value();
      EXPECT_EQ(view->bytes().size(), 20'000U);
    });
    EXPECT_EQ(child.wait(), 0);
  }
  is_over = true;
  for (auto& thread : threads) thread.join();
}

}  // namespace
}  // namespace cowmgr::test
