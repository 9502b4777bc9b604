// Limits: what one peer may take, and what the rest then still has.
#include <fstream>
#include <string>
#include <sys/resource.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

class Limits : public DaemonLifeTest {
 protected:
  [[nodiscard]] static Result<Array> put(const Client& client, const std::string& name,
                                         std::uint64_t size_bytes, const CreateOptions& options = {}) {
    return client.put(name, {Dtype::of<std::uint8_t>(), {size_bytes}}, pattern_bytes(size_bytes), options);
  }
};

TEST_F(Limits, OfConnections) {
  start({"--owner-sessions", "8"});
  const Client client = connect();
  std::vector<RawPeer> peers;
  peers.reserve(7);
  for (int i = 0; i < 7; ++i) peers.push_back(RawPeer::greeted(socket()));
  for (int i = 0; i < 10; ++i) {
    RawPeer refused(socket());
    EXPECT_TRUE(refused.is_hung_up());
  }
  EXPECT_THAT(client.ping(), Succeeds()) << "the others go on";
  peers.pop_back();
  EXPECT_TRUE(eventually([&] { return Client::connect({.socket = socket(), .command = {}}).has_value(); }))
      << "there is room again";
}

TEST_F(Limits, OfMemory) {
  start({"--capacity", "10MiB"});
  const Client client = connect();
  const auto kept = put(client, "kept", 4 * kMiB);
  const auto refused = client.create("large", {Dtype::of<std::uint8_t>(), {8 * kMiB}});
  EXPECT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("process " + std::to_string(::getpid())))
      << "who holds it";
  EXPECT_THAT(client.create("vast", {Dtype::of<std::uint8_t>(), {1ULL << 45U}}),
              FailsWith(Errc::out_of_memory));
  EXPECT_THAT(put(client, "small", 4 * kMiB), Succeeds());
  EXPECT_EQ(client.ping()->capacity_bytes, 10 * kMiB);
}

TEST_F(Limits, MakeEvictableArraysGo) {
  start({"--capacity", "10MiB"});
  const Client client = connect();
  for (int round = 0; round < 40; ++round) {
    ASSERT_THAT(put(client, "round " + std::to_string(round), 3 * kMiB, {.evictable = true}), Succeeds())
        << round;
    EXPECT_TRUE(eventually([&] { return client.ping()->viewed_bytes == 0; }));
    EXPECT_LE(client.ping()->used_bytes, 10 * kMiB);
  }
  EXPECT_EQ(client.list()->size(), 3U);
  EXPECT_THAT(client.attach("round 39"), Succeeds());
  EXPECT_THAT(client.attach("round 0"), FailsWith(Errc::not_found));
}

TEST_F(Limits, OfOneOwner) {
  start({"--owner-bytes", "8MiB", "--owner-arrays", "3"});
  const Client client = connect();
  EXPECT_THAT(put(client, "large", 8 * kMiB), FailsWith(Errc::quota_exceeded));
  for (const std::string name : {"a", "b", "c"}) EXPECT_THAT(put(client, name, kMiB), Succeeds());
  EXPECT_THAT(put(client, "d", kMiB), FailsWith(Errc::quota_exceeded));
  const std::vector<std::string> all = {"*"};
  ASSERT_THAT(client.evict(all), Succeeds());
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_THAT(put(client, "d", 7 * kMiB), Succeeds());
}

// The mapping cannot be had: what the daemon counts for it must be given back, and the session goes on.
TEST_F(Limits, OfAddressSpace) {
  start();
  const Client client = connect();
  constexpr std::uint64_t kLarge = 96 * kMiB;
  ASSERT_THAT(client.create("large", {Dtype::of<std::uint8_t>(), {kLarge}})->seal(), Succeeds());
  auto set = client.create_results("set", {Dtype::of<std::uint8_t>(), {kLarge}}, 1);
  ASSERT_THAT(set, Succeeds());
  Child tight([&](const Link& test) {
    const Client own = connect();
    auto results = own.open_results("set");
    rlimit limit{};
    std::ifstream statm("/proc/self/statm");
    rlim_t pages = 0;
    statm >> pages;
    ASSERT_EQ(::getrlimit(RLIMIT_AS, &limit), 0);
    limit.rlim_cur = pages * 4096 + 48 * kMiB;
    ASSERT_EQ(::setrlimit(RLIMIT_AS, &limit), 0);
    EXPECT_THAT(own.attach("large"), FailsWith(Errc::out_of_memory));
    EXPECT_THAT(own.create("another", {Dtype::of<std::uint8_t>(), {kLarge}}), FailsWith(Errc::out_of_memory));
    EXPECT_THAT(results->lease(), FailsWith(Errc::out_of_memory));
    // Two at once, so that every connection of the session is used again.
    std::thread waiter([&] { EXPECT_THAT(own.attach("later", {.wait = kForever}), Succeeds()); });
    for (int i = 0; i < 1000; ++i) EXPECT_THAT(own.ping(), Succeeds());
    EXPECT_THAT(put(own, "later", 1, {.evictable = true}), Succeeds());
    waiter.join();
    EXPECT_THAT(own.evict(std::vector<std::string>{"later"}), Succeeds());
    EXPECT_TRUE(eventually([&] { return own.list()->size() == 2; }));
    EXPECT_TRUE(eventually([&] { return own.clients()->back().views == 0; }));
    EXPECT_EQ(own.clients()->back().leases, 0U);
    test.say("done");
    test.await_word();
  });
  tight.expect("done");
  EXPECT_EQ((*set->lease())->attempt(), 2U);
  tight.tell();
  EXPECT_EQ(tight.wait(), 0);
}

}  // namespace
}  // namespace cowmgr::test
