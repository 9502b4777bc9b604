// A daemon that does not answer (SIGSTOP): no call takes longer than its caller allows, and what the daemon
// grants when it goes on goes back to it.
#include <chrono>
#include <csignal>
#include <cstdint>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr Milliseconds kShort{50};
// Far more than a limit of kShort, and less than the test would wait.
constexpr std::chrono::seconds kLong{30};

ArraySpec spec() {
  return {Dtype::of<std::uint8_t>(), {1000}};
}

class StoppedDaemon : public DaemonTest {
 protected:
  void halt() const { ASSERT_EQ(::kill(daemon_->pid(), SIGSTOP), 0); }
  void go_on() const { ASSERT_EQ(::kill(daemon_->pid(), SIGCONT), 0); }
  // As many connections of `client` as calls shall be under way at once.
  void open_channels(const Client& client, const Client& witness, unsigned count) const {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; ++i)
      threads.emplace_back([&] { EXPECT_THAT(client.attach("opens", {.wait = kForever}), Succeeds()); });
    EXPECT_TRUE(eventually([&] {
      const auto clients = witness.clients();
      return clients && clients->front().channels == count;
    }));
    EXPECT_THAT(witness.put("opens", spec(), pattern_bytes(1000)), Succeeds());
    for (auto& thread : threads) thread.join();
  }
  // Whether `work` ends before the daemon goes on.
  [[nodiscard]] bool ends(const std::function<void()>& work) const {
    auto ended = std::async(std::launch::async, work);
    const bool is_in_time = ended.wait_for(kLong) == std::future_status::ready;
    if (!is_in_time) go_on();
    ended.get();
    if (!is_in_time) halt();
    return is_in_time;
  }
};

TEST_F(StoppedDaemon, HoldsNoCallBeyondItsLimit) {
  const Client client = connect();
  const Client witness = connect("witness");
  const auto array = witness.put("a", spec(), pattern_bytes(1000));
  auto dense = witness.create_results("dense", spec(), 3);
  auto mine = client.open_results("dense");
  auto queued = witness.create_ragged("queued", 2, {.queue = "q"});
  auto committed = mine->lease();
  open_channels(client, witness, 12);
  halt();
  EXPECT_TRUE(ends([&] { EXPECT_THAT((*committed)->commit_and_lease(kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(client.attach("a", {.wait = kShort}), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] {
    EXPECT_THAT(client.attach("a", {.view = View::copy_on_write, .wait = kShort}),
                FailsWith(Errc::timed_out));
  }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(client.open_results("dense", kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(client.open_queued("q", kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(mine->lease(kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(mine->lease_batch(2, kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(mine->wait_settled(kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(mine->settled_at(2, kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(mine->wait_slot(2, kShort), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] {
    EXPECT_THAT(Client::connect({.socket = socket(), .command = {}, .wait = kShort}),
                FailsWith(Errc::timed_out));
  }));
  go_on();
  // What those who gave up were granted goes back.
  EXPECT_TRUE(eventually([&] { return witness.stat("a")->array.views == 1; })) << "the maker's own";
  EXPECT_TRUE(eventually([&] { return dense->info()->leased == 0 && dense->info()->committed == 1; }));
  EXPECT_TRUE(eventually([&] {
    const auto channels = witness.clients();
    return channels && channels->size() == 2;
  })) << "whoever gave up connecting is gone";
  EXPECT_THAT(client.attach("a"), Succeeds());
  auto slots = mine->lease_batch(3);
  ASSERT_THAT(slots, Succeeds());
  EXPECT_EQ(slots->size(), 2U);
  for (auto& slot : *slots) EXPECT_THAT(slot.commit(), Succeeds());
  EXPECT_THAT(mine->wait(), Succeeds()) << "nobody has it mapped for writing any more";
}

// Nothing waits for the daemon in the end of a handle either.
TEST_F(StoppedDaemon, HoldsNoDestructor) {
  const Client witness = connect("witness");
  auto set = witness.create_ragged("set", 2);
  std::optional<Client> client = connect();
  std::optional<ArrayWriter> writer = *client->create("a", spec());
  std::optional<Array> view = *client->put("b", spec(), pattern_bytes(1000));
  std::optional<Slot> slot = *client->open_results("set")->lease();
  halt();
  EXPECT_TRUE(ends([&] {
    view.reset();
    writer.reset();
    slot.reset();
    client.reset();
  }));
  go_on();
  EXPECT_TRUE(eventually(
      [&] { return set->info()->leased == 0 && !witness.stat("a") && witness.stat("b")->array.views == 0; }));
}

// Where a call has no limit of its own, the client has one for all.
TEST_F(StoppedDaemon, HoldsNoCallBeyondTheLimitOfItsClient) {
  const auto client =
      Client::connect({.socket = socket(), .command = {}, .reconnect = Milliseconds(0), .answer = kShort});
  ASSERT_THAT(client, Succeeds());
  const Client witness = connect("witness");
  halt();
  for (int i = 0; i < 3; ++i)
    EXPECT_TRUE(ends([&] { EXPECT_THAT(client->ping(), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(client->create("a", spec()), FailsWith(Errc::timed_out)); }));
  EXPECT_TRUE(ends([&] {
    EXPECT_THAT(client->create_ragged("set", 2, {.is_detached = true}), FailsWith(Errc::timed_out));
  }));
  EXPECT_TRUE(ends([&] { EXPECT_THAT(client->attach("a"), FailsWith(Errc::timed_out)); }));
  go_on();
  EXPECT_TRUE(eventually([&] { return client->ping().has_value(); }));
  EXPECT_TRUE(eventually([&] { return !witness.stat("a") && !witness.open_results("set"); }));
}

}  // namespace
}  // namespace cowmgr::test
