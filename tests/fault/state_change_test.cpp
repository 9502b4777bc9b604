// The daemon dies right after its k-th change of what outlives it, for every k of a scenario, and for every k
// of the start that follows a death. Whoever waits for an answer gets it from the next daemon, once.
#include <algorithm>
#include <array>
#include <csignal>
#include <iostream>
#include <optional>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

using testing::ElementsAre;

constexpr std::uint64_t kSmallBytes = 1000;
constexpr std::uint64_t kLargeBytes = 2'200'000;  // a huge page, and small ones
constexpr std::uint64_t kValueBytes = 10'000;     // a new set has room for one of these, and then grows
// With a sanitizer a start takes half a second.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 7;
#else
constexpr int kStride = 1;
#endif

ArraySpec bytes_spec(std::uint64_t size_bytes) {
  return {Dtype::of<std::uint8_t>(), {size_bytes}};
}

// Some of what is half made stays so long for who may come back to it, and the test waits for its end; but no
// machine holds up a client that comes back for as long as that.
const std::vector<std::string> kGrace = {"--grace", "4"};

class StateChange : public KeepingDaemonTest {
 protected:
  void SetUp() override {}

  // A daemon that dies at its `change`th.
  void start_dying(int change) {
    start_keeping({}, {.program = "cowmgr-dying",
                       .environment = {fmt::format("COWMGR_DIES_AT={}", change)},
                       .may_refuse = true});
  }

  // Does `work` while another thread starts an ordinary daemon as soon as this one has died. Whether it did.
  template <class Work>
  bool outliving(const Work& work) {
    const UniqueFd end(::eventfd(0, EFD_CLOEXEC));
    bool has_died = false;
    std::thread restarter([&] {
      const UniqueFd pidfd = open_pidfd(daemon_->pid());
      std::array<pollfd, 2> events{{{pidfd.get(), POLLIN, 0}, {end.get(), POLLIN, 0}}};
      EXPECT_GT(::poll(events.data(), events.size(), -1), 0);
      if (events[0].revents == 0) return;
      has_died = true;
      EXPECT_EQ(daemon_->wait(), -SIGKILL);
      start_keeping(kGrace);
    });
    work();
    EXPECT_EQ(::eventfd_write(end.get(), 1), 0);
    restarter.join();
    return has_died;
  }

  // ---- The scenario: each step knows what must be true once it is answered ----

  static void expect_bytes(const Array& array, std::uint64_t size_bytes, unsigned seed) {
    EXPECT_TRUE(copy_of(array.bytes()) == pattern_bytes(size_bytes, seed)) << array.name();
  }
  static Array put(const Client& client, const std::string& name, std::uint64_t size_bytes, unsigned seed,
                   bool replace = false) {
    auto array =
        client.put(name, bytes_spec(size_bytes), pattern_bytes(size_bytes, seed), {.replace = replace});
    EXPECT_THAT(array, Succeeds());
    if (array) expect_bytes(*array, size_bytes, seed);
    return *std::move(array);
  }
  static void expect_attached(const Client& client, const std::string& name, std::uint64_t size_bytes,
                              unsigned seed) {
    const auto array = client.attach(name);
    ASSERT_THAT(array, Succeeds());
    expect_bytes(*array, size_bytes, seed);
  }

  static void use_arrays(const Client& client) {
    const std::vector<std::string> small = {"small"};
    const Array first = put(client, "small", kSmallBytes, 1);
    put(client, "large", kLargeBytes, 2);
    EXPECT_THAT(client.pin(small), Succeeds());
    const Array second = put(client, "small", kSmallBytes + 1, 3, true);
    EXPECT_EQ(second.version(), 2U);
    EXPECT_TRUE(client.stat("small")->array.pinned) << "the name is pinned, whatever its version";
    EXPECT_THAT(client.evict(small), FailsWith(Errc::pinned));
    EXPECT_THAT(client.pin(small, false), Succeeds());
    expect_bytes(first, kSmallBytes, 1);
    EXPECT_THAT(client.evict(small), Succeeds());
    EXPECT_THAT(client.attach("small"), FailsWith(Errc::not_found));
    expect_bytes(second, kSmallBytes + 1, 3);
    expect_attached(client, "large", kLargeBytes, 2);
    (void)client.create("given up", bytes_spec(kSmallBytes));
  }

  static void use_dense_set(const Client& client) {
    auto set = client.create_results("dense", bytes_spec(3 * kSmallBytes), 3);
    ASSERT_THAT(set, Succeeds());
    for (unsigned slot = 0; slot < 3; ++slot) {
      auto leased = set->lease_slot(slot);
      ASSERT_THAT(leased, Succeeds());
      std::ranges::copy(pattern_bytes(kSmallBytes, slot), leased->bytes().begin());
      EXPECT_THAT(leased->commit(), Succeeds());
    }
    const auto out = set->wait(kDeadline);
    ASSERT_THAT(out, Succeeds());
    for (unsigned slot = 0; slot < 3; ++slot) {
      EXPECT_TRUE(copy_of(out->bytes().subspan(slot * kSmallBytes, kSmallBytes)) ==
                  pattern_bytes(kSmallBytes, slot));
    }
  }

  static void use_ragged_set(const Client& client) {
    auto set = client.create_ragged("ragged", 5);
    ASSERT_THAT(set, Succeeds());
    for (unsigned slot = 0; slot < 2; ++slot) {
      auto leased = set->lease_slot(slot);
      ASSERT_THAT(leased, Succeeds());
      ASSERT_THAT(leased->set_value(pattern_bytes(kValueBytes, slot)), Succeeds());
      EXPECT_THAT(leased->commit(), Succeeds());
    }
    {
      auto leased = set->lease_slot(2);
      ASSERT_THAT(leased, Succeeds());
      ASSERT_THAT(leased->allocate(bytes_spec(kSmallBytes)), Succeeds());
      std::ranges::copy(pattern_bytes(kSmallBytes, 2), leased->bytes().begin());
      EXPECT_THAT(leased->commit(), Succeeds());
    }
    {
      const auto given_back = set->lease_slot(3);
      EXPECT_THAT(given_back, Succeeds());
    }
    auto leased = set->lease_slot(3);
    ASSERT_THAT(leased, Succeeds());
    ASSERT_THAT(leased->set_value({}), Succeeds());
    auto next = leased->commit_and_lease();
    ASSERT_TRUE(next && *next);
    EXPECT_EQ((*next)->index(), 4U);
    EXPECT_THAT((*next)->fail("no luck"), Succeeds());
    EXPECT_THAT(set->wait_settled(), FailsWith(Errc::slot_failed));
    for (unsigned slot = 0; slot < 2; ++slot)
      EXPECT_TRUE(copy_of(*set->value(slot)) == pattern_bytes(kValueBytes, slot));
    const auto array = set->array(2);
    ASSERT_THAT(array, Succeeds());
    expect_bytes(*array, kSmallBytes, 2);
    EXPECT_EQ(set->slot(4)->reason, "no luck");
    EXPECT_EQ(set->info()->committed, 4U);
    EXPECT_THAT(set->forget(), Succeeds());
  }

  // What is there when all handles of the scenario are gone, and then is taken away.
  static void expect_what_stays(const Client& client) {
    expect_attached(client, "large", kLargeBytes, 2);
    std::vector<std::string> names;
    EXPECT_TRUE(eventually([&] {
      names.clear();
      for (const auto& array : arrays_of(client)) names.push_back(array.name);
      return names.size() == 2;
    })) << testing::PrintToString(names);
    EXPECT_THAT(names, ElementsAre("large", "dense"));
    EXPECT_THAT(client.evict(std::vector<std::string>{"large", "dense"}), Succeeds());
  }

  // Whether the daemon came to that change.
  bool run_scenario(int change) {
    start_dying(change);
    const bool has_died = outliving([&] {
      // A daemon may die before it serves for the first time.
      const auto client = Client::connect(
          {.socket = socket(), .command = "scenario", .reconnect = kDeadline, .wait = kDeadline});
      ASSERT_THAT(client, Succeeds());
      use_arrays(*client);
      use_dense_set(*client);
      use_ragged_set(*client);
      expect_what_stays(*client);
      EXPECT_TRUE(eventually([&] { return client->ping()->used_bytes == 0; }));
      EXPECT_THAT(shm_files(instance()), ElementsAre(fmt::format("cowmgr.{}.lock", instance())));
    });
    kill();
    return has_died;
  }

  // Whether the daemon came to that change of its start, and what follows it at once.
  bool run_start(int change) {
    start_keeping();
    const Client client = connect("holder", kDeadline);
    const Array viewed = put(client, "viewed", kSmallBytes, 1);
    EXPECT_THAT(client.evict(std::vector<std::string>{"viewed"}), Succeeds());
    put(client, "kept", kSmallBytes, 2);
    auto writer = *client.create("written", bytes_spec(kSmallBytes));
    auto set = *client.create_results("set", bytes_spec(2 * kSmallBytes), 2);
    auto ragged = *client.create_ragged("values", 2);
    auto mine = *set.lease();
    auto value = *ragged.lease();
    EXPECT_THAT(value->set_value(pattern_bytes(kSmallBytes, 4)), Succeeds());
    kill();
    start_dying(change);
    const bool has_died = outliving([&] {
      std::ranges::copy(pattern_bytes(kSmallBytes, 3), writer.bytes().begin());
      EXPECT_THAT(writer.seal(), Succeeds());
      expect_attached(client, "kept", kSmallBytes, 2);
      expect_attached(client, "written", kSmallBytes, 3);
      EXPECT_THAT(mine->commit(), Succeeds());
      EXPECT_THAT(value->commit(), Succeeds());
      EXPECT_TRUE(copy_of(*ragged.value(value->index())) == pattern_bytes(kSmallBytes, 4));
      auto last = *set.lease();
      EXPECT_THAT(last->commit(), Succeeds());
      EXPECT_THAT(set.wait(kDeadline), Succeeds());
      expect_bytes(viewed, kSmallBytes, 1);
    });
    // Not with one that would die while it stops.
    if (!has_died) kill_and_start();
    EXPECT_THAT(client.ping(), Succeeds()) << "it has come back: this is all that it had";
    EXPECT_THAT(client.shutdown(true), Succeeds());
    EXPECT_EQ(daemon_->wait(), 0);
    return has_died;
  }

  template <class Run>
  void sweep(const Run& run) {
    int change = 1;
    while (run(change) && !HasFailure()) change += kStride;
    start_keeping();  // what a kill leaves, the lock above all, goes with this one
    if (HasFailure()) ADD_FAILURE() << "when the daemon died at change " << change;
    EXPECT_GT(change, 20) << "the scenario changes more than that";
    std::cout << fmt::format("the daemon died after each of {} changes\n", change - 1);
  }
};

TEST_F(StateChange, KilledAtEachOfARunNothingIsLostOrDoneTwice) {
  sweep([&](int change) { return run_scenario(change); });
}

TEST_F(StateChange, KilledAtEachOfAStartNothingIsLost) {
  sweep([&](int change) { return run_start(change); });
}

}  // namespace
}  // namespace cowmgr::test
