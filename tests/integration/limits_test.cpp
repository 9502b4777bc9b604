// Limits: what one peer may take, and what the rest then still has.
#include <csignal>
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
  ASSERT_THAT(client.evict_matching("*"), Succeeds());
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

// ---- Limits of the daemon's process ----

// A daemon with 256 open files, which ends when it is told.
class FewDescriptors : public Limits {
 protected:
  [[nodiscard]] Child start_with_few(const std::vector<std::string>& arguments = {}) const {
    Child child([this, arguments](const Link& test) {
      const rlimit limit{256, 256};
      ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
      std::vector<std::string> all = arguments;
      all.emplace_back("--purge");
      Daemon daemon(socket(), instance(), all);
      test.say("serves");
      test.await_word();
      EXPECT_EQ(daemon.stop(SIGTERM), 0);
    });
    child.expect("serves");
    return child;
  }
  // Puts tiny arrays until one is refused. How many there were, and why.
  struct Filled {
    int arrays = 0;
    Error refusal;
  };
  [[nodiscard]] static Filled fill(const Client& client) {
    for (int count = 0; count < 1000; ++count) {
      const auto made = put(client, std::to_string(count), 1);
      if (!made) return {count, made.error()};
    }
    ADD_FAILURE() << "there is no limit";
    return {};
  }
};

// Arrays never take what connections need: whoever connects is answered, and can use what is there.
TEST_F(FewDescriptors, LeaveSomeForConnections) {
  Child daemon = start_with_few();
  const Client client = connect();
  const Filled filled = fill(client);
  EXPECT_GE(filled.arrays, 40);
  EXPECT_EQ(filled.refusal.code, Errc::quota_exceeded);
  EXPECT_THAT(filled.refusal.message, testing::HasSubstr("--owner-arrays"));
  EXPECT_THAT(filled.refusal.message, testing::HasSubstr("LimitNOFILE="));
  for (int i = 0; i < 10; ++i) {
    const Client other = connect();
    EXPECT_THAT(other.ping(), Succeeds());
    EXPECT_THAT(other.attach("0"), Succeeds());
  }
  EXPECT_THAT(client.evict(std::vector<std::string>{"0"}), Succeeds());
  EXPECT_TRUE(eventually([&] { return put(client, "again", 1).has_value(); }));
  daemon.tell();
  EXPECT_EQ(daemon.wait(), 0);
}

// The same where quotas were raised beyond what there is.
TEST_F(FewDescriptors, LeaveSomeForConnectionsWhateverTheQuota) {
  Child daemon = start_with_few({"--owner-arrays", "100000", "--owner-sessions", "100000"});
  const Client client = connect();
  const Filled filled = fill(client);
  EXPECT_EQ(filled.refusal.code, Errc::quota_exceeded);
  EXPECT_THAT(filled.refusal.message, testing::HasSubstr("LimitNOFILE="));
  EXPECT_THAT(client.create_ragged("set", 4), FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(connect().attach("0"), Succeeds());
  {
    std::vector<RawPeer> peers;
    for (int i = 0; i < 300; ++i) peers.emplace_back(socket());
    EXPECT_TRUE(peers.back().is_hung_up()) << "it is told, and not left to wait";
    EXPECT_THAT(client.ping(), Succeeds());
  }
  EXPECT_TRUE(eventually([&] { return Client::connect({.socket = socket(), .command = {}}).has_value(); }));
  daemon.tell();
  EXPECT_EQ(daemon.wait(), 0);
}

// A signal would kill it.
TEST_F(Limits, OfFileSizes) {
  const Daemon& daemon = start();
  const Client client = connect();
  const rlimit limit{kMiB, kMiB};
  ASSERT_EQ(::prlimit(daemon.pid(), RLIMIT_FSIZE, &limit, nullptr), 0);
  EXPECT_THAT(put(client, "small", kMiB / 2), Succeeds());
  const auto refused = put(client, "large", 8 * kMiB);
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("ulimit -f"));
  EXPECT_THAT(client.attach("small"), Succeeds());
}

// What is only faster with more of it is done without.
TEST_F(Limits, OfTheDaemonsAddressSpace) {
  const Daemon& daemon = start();
  const Client client = connect();
  std::ifstream statm("/proc/" + std::to_string(daemon.pid()) + "/statm");
  rlim_t pages = 0;
  statm >> pages;
  const rlimit limit{pages * 4096 + 100 * kMiB, RLIM_INFINITY};
  ASSERT_EQ(::prlimit(daemon.pid(), RLIMIT_AS, &limit, nullptr), 0);
  EXPECT_THAT(client.create("large", {Dtype::of<std::uint8_t>(), {200 * kMiB}}), Succeeds());
  // The slots of a set are mapped, with all the values that they may ever have.
  const auto refused = client.create_ragged("set", 100'000);
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("ulimit -v"));
  EXPECT_THAT(client.ping(), Succeeds());
}

}  // namespace
}  // namespace cowmgr::test
