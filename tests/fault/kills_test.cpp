// Clients, makers of result sets and the daemon, killed at random instants, hundreds of times: nothing leaks.
// Workers are in result_kills_test.cpp.
//
// The seed is fixed, the instants are not: they hang on the scheduler. Each run tries others.
#include <algorithm>
#include <csignal>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr std::size_t kWorkers = 4;

class Kills : public DaemonTest {
 protected:
  [[nodiscard]] std::size_t below(std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(random_);
  }

  // Kills one of `children`, and starts another in its place.
  template <class Start>
  void replace_one(std::vector<Child>& children, const Start& start) {
    const std::size_t victim = below(children.size());
    children[victim].kill();
    children.erase(children.begin() + static_cast<std::ptrdiff_t>(victim));
    children.push_back(start());
  }

  std::mt19937 random_{20240611};
};

constexpr std::uint32_t value_of(std::uint64_t row) {
  return static_cast<std::uint32_t>(row * 2654435761U + 1);
}

// Fills in two passes, so that a kill between them leaves a slot half written.
void fill(const Slot& slot) {
  const auto items = *slot.as<std::uint32_t>();
  for (auto& item : items) item = 0xDEADBEEF;
  for (std::size_t i = 0; i < items.size(); ++i) items[i] = value_of(slot.rows().begin + i);
}

// Puts, attaches, releases and evicts until it is killed.
void live(const Client& client, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Array> views;
  for (;;) {
    const std::string name = "array " + std::to_string(random() % 6);
    const std::uint64_t size_bytes = random() % 3 == 0 ? 3'000'000 : random() % 20'000;
    switch (random() % 6) {
      case 0:
      case 1:
        if (auto array = client.put(name, {Dtype::of<std::uint8_t>(), {size_bytes}},
                                    pattern_bytes(size_bytes), {.replace = true})) {
          views.push_back(*std::move(array));
        }
        break;
      case 2:
        if (auto array = client.attach(name)) views.push_back(*std::move(array));
        break;
      case 3:
        (void)client.evict(std::vector<std::string>{name});
        break;
      case 4:
        if (const auto writer = client.create("own " + std::to_string(::getpid()),
                                              {Dtype::of<std::uint8_t>(), {size_bytes}})) {
          std::fill(writer->bytes().begin(), writer->bytes().end(), std::byte{1});
        }
        break;
      default:
        if (!views.empty()) views.erase(views.begin() + static_cast<std::ptrdiff_t>(random() % views.size()));
    }
    if (views.size() > 12) views.clear();
  }
}

TEST_F(Kills, OfClientsLeakNothing) {
  constexpr int kKills = 200;
  unsigned seed = 0;
  const auto start_client = [&] {
    ++seed;
    return Child([&](const Link&) { live(connect(), seed); });
  };
  std::vector<Child> others;
  for (std::size_t i = 0; i < kWorkers; ++i) others.push_back(start_client());
  const Client client = connect();
  for (int kills = 0; kills < kKills; ++kills) {
    for (std::size_t asks = below(40); asks > 0; --asks) ASSERT_THAT(client.ping(), Succeeds());
    replace_one(others, start_client);
  }
  others.clear();

  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; })) << "ours alone is left";
  EXPECT_EQ(client.ping()->viewed_bytes, 0U);
  const auto left_bytes = [&] {
    std::uint64_t sum = 0;
    for (const auto& array : arrays_of(client)) {
      EXPECT_EQ(array.views, 0U) << array.name;
      EXPECT_EQ(array.state, ArrayState::sealed) << array.name;
      sum += array.segment_bytes;
    }
    return sum;
  };
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == left_bytes(); }));
  EXPECT_EQ(shm_files(instance()).size(), client.list()->size() + 1) << "and the lock";
  for (const auto& info : arrays_of(client)) {
    const auto array = client.attach(info.name);
    ASSERT_THAT(array, Succeeds());
    EXPECT_TRUE(copy_of(array->bytes()) == pattern_bytes(info.data_bytes)) << "what was sealed is whole";
  }
  (void)client.evict_matching("*");
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_THAT(shm_files(instance()), testing::SizeIs(1)) << "the lock";
}

// Makers of result sets die while others work for them.
TEST_F(Kills, OfMakersLeaveNoSet) {
  constexpr int kKills = 60;
  const auto start_maker = [&] {
    return Child([&](const Link& test) {
      const Client own = connect();
      const std::string name = "set " + std::to_string(::getpid());
      auto set = own.create_results(name, {Dtype::of<std::uint32_t>(), {1000}}, 20);
      test.say(name);
      for (;;) {
        auto slot = set->lease();
        if (!slot || !*slot) break;
        fill(**slot);
      }
    });
  };
  const Client client = connect();
  for (int kills = 0; kills < kKills; ++kills) {
    Child maker = start_maker();
    auto set = client.open_results(maker.hear());
    ASSERT_THAT(set, Succeeds());
    std::vector<Slot> slots;
    for (std::size_t i = below(5); i > 0; --i) {
      if (auto slot = set->lease(Milliseconds(0)); slot && *slot) slots.push_back(std::move(**slot));
    }
    for (std::size_t asks = below(10); asks > 0; --asks) ASSERT_THAT(client.ping(), Succeeds());
    maker.kill();
    EXPECT_TRUE(eventually([&] { return !set->info().has_value(); }));
    for (Slot& slot : slots) EXPECT_THAT(slot.commit(), FailsWith(Errc::not_found));
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_EQ(client.ping()->result_sets, 0U);
}

// The daemon itself is killed; every time the next one starts, and takes the leftovers away.
TEST_F(Kills, OfTheDaemonLeaveNothing) {
  for (int kills = 0; kills < 20; ++kills) {
    std::vector<Child> others;
    for (std::size_t i = 0; i < kWorkers; ++i) {
      others.emplace_back([&](const Link& test) {
        const Client client = connect();
        test.say("here");
        live(client, 7);
      });
    }
    for (const Child& other : others) other.expect("here");
    for (std::size_t asks = below(60); asks > 0; --asks) ASSERT_THAT(connect().ping(), Succeeds());
    EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
    others.clear();
    start();
    EXPECT_EQ(connect().ping()->used_bytes, 0U);
    EXPECT_THAT(shm_files(instance()), testing::SizeIs(1)) << "the lock";
  }
}

}  // namespace
}  // namespace cowmgr::test
