// What a client cannot take although the daemon gave it: that call fails, what was granted goes back, and
// everything else that the client has stays.
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "cowmgr/pool.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/scarce.hpp"

namespace cowmgr::test {
namespace {

constexpr std::uint64_t kSize = std::uint64_t{64} << 20;          // more address space than is left
constexpr std::uint64_t kAddressSpace = std::uint64_t{24} << 20;  // enough for all else

enum class Lack : std::uint8_t { descriptors, one_descriptor, address_space };
void PrintTo(Lack lack, std::ostream* out) {
  *out << (lack == Lack::descriptors      ? "no descriptor"
           : lack == Lack::one_descriptor ? "one descriptor"
                                          : "no address space");
}

std::unique_ptr<Lowered> begin(Lack lack) {
  if (lack == Lack::address_space) return std::make_unique<LittleAddressSpace>(kAddressSpace);
  return std::make_unique<FewDescriptors>(lack == Lack::descriptors ? 0U : 1U);
}

ArraySpec large() {
  return {Dtype::of<std::uint8_t>(), {kSize}};
}

std::uint64_t leased(const ResultSet& set) {
  const auto info = set.info();
  return info ? info->leased : UINT64_MAX;
}

// Two arrays and two sets that a client of its own made, and what the client under test has of them before it
// runs out of something.
struct World {
  explicit World(const Client& maker)
      : a(*maker.create("a", large())->seal()), b(*maker.create("b", large())->seal()) {
    EXPECT_THAT(maker.create_results("dense", large(), 2, {.is_detached = true}), Succeeds());
    EXPECT_THAT(maker.create_ragged("ragged", 100'000, {.is_detached = true}), Succeeds());
  }
  Array a;
  Array b;
};

class LocalFailure : public DaemonTest, public testing::WithParamInterface<Lack> {
 protected:
  [[nodiscard]] static Errc expected() {
    return GetParam() == Lack::address_space ? Errc::out_of_memory : Errc::quota_exceeded;
  }
  // Whether a call that needs two descriptors is the only one that fails.
  [[nodiscard]] static bool has_one() { return GetParam() == Lack::one_descriptor; }

  void run_out(const Client& client, const Client& witness) const;
};

void LocalFailure::run_out(const Client& client, const Client& witness) const {
  const World world(witness);
  auto writer = client.create("kept", {Dtype::of<std::uint8_t>(), {1000}});
  ASSERT_THAT(writer, Succeeds());
  auto dense = client.open_results("dense");
  auto ragged = client.open_results("ragged");
  auto slot = ragged->lease();
  ASSERT_THAT(slot, Succeeds());
  auto own = client.create_ragged("own", 2);
  ASSERT_THAT((*own->lease())->commit(), Succeeds());
  const std::uint64_t session = client.clients()->front().session;
  {
    const auto lack = begin(GetParam());
    if (!has_one()) {
      EXPECT_THAT(client.attach("a"), FailsWith(expected()));
      EXPECT_THAT(client.attach("a", {.view = View::copy_on_write}), FailsWith(expected()));
      EXPECT_THAT(client.attach_id(world.a.id()), FailsWith(expected()));
      EXPECT_THAT(client.open_results("ragged"), FailsWith(expected()));
      EXPECT_THAT(client.create_ragged("made", 100'000, {.is_detached = true}), FailsWith(expected()));
      EXPECT_THAT(dense->lease(), FailsWith(expected()));
      EXPECT_THAT(dense->lease_batch(2), FailsWith(expected()));
    }
    EXPECT_THAT(client.attach(std::vector<std::string>{"a", "b"}), FailsWith(expected()));
    EXPECT_THAT(client.create("created", large()), FailsWith(expected()));
    EXPECT_THAT((*slot)->allocate(large()), FailsWith(expected()));
  }
  // Nothing of it stays.
  EXPECT_EQ(client.clients()->front().session, session) << "the session lives";
  EXPECT_TRUE(eventually([&] {
    return witness.stat("a")->array.views == 1 && witness.stat("b")->array.views == 1;
  })) << "the witness's own";
  EXPECT_THAT(witness.stat("created"), FailsWith(Errc::not_found));
  EXPECT_THAT(witness.open_results("made"), FailsWith(Errc::not_found));
  EXPECT_EQ(leased(*dense), 0U);
  EXPECT_THAT(witness.stat("ragged/0"), FailsWith(Errc::not_found)) << "the memory that the slot did not get";
  // All that it had is as it was.
  EXPECT_THAT(client.attach(std::vector<std::string>{"a", "b"}), Succeeds());
  EXPECT_THAT(writer->seal(), Succeeds());
  EXPECT_THAT((*slot)->allocate({Dtype::of<std::uint8_t>(), {10}}), Succeeds());
  EXPECT_THAT((*slot)->commit(), Succeeds());
  EXPECT_EQ(own->info()->committed, 1U) << "what it made did not go with a session";
  EXPECT_THAT(dense->lease(), Succeeds());
}

TEST_P(LocalFailure, FailsThatCallAlone) {
  Child program([&](const Link&) {
    const Client client = connect();
    run_out(client, connect("witness"));
  });
  EXPECT_EQ(program.wait(), 0);
}

TEST_P(LocalFailure, FailsThatCallAloneOfAnEmbeddedDaemonsClient) {
  Child program([&](const Link&) {
    const auto daemon = EmbeddedDaemon::start({.program = program_path("cowmgr")});
    ASSERT_THAT(daemon, Succeeds());
    const auto client = daemon->connect();
    const auto witness = daemon->connect();
    run_out(*client, *witness);
  });
  EXPECT_EQ(program.wait(), 0);
}

INSTANTIATE_TEST_SUITE_P(Of, LocalFailure,
                         testing::Values(Lack::descriptors, Lack::one_descriptor, Lack::address_space));

// The sentence says what to do.
TEST_F(DaemonTest, NamesTheLimitOfDescriptors) {
  Child program([&](const Link&) {
    const Client client = connect();
    const auto array = client.put("a", {Dtype::of<std::uint8_t>(), {10}}, pattern_bytes(10));
    const FewDescriptors none(0);
    const auto refused = client.attach("a");
    ASSERT_THAT(refused, FailsWith(Errc::quota_exceeded));
    EXPECT_THAT(refused.error().message, testing::HasSubstr("ulimit -n"));
  });
  EXPECT_EQ(program.wait(), 0);
}

// A connection more is opened for each thread that asks meanwhile: without a descriptor for it that call
// fails, and no other.
TEST_F(DaemonTest, OpensNoMoreConnectionsThanItCan) {
  Child program([&](const Link&) {
    const Client client = connect();
    const Client witness = connect("witness");
    auto writer = client.create("kept", {Dtype::of<std::uint8_t>(), {1000}});
    std::thread waiter([&] { EXPECT_THAT(client.attach("late", {.wait = kForever}), Succeeds()); });
    EXPECT_TRUE(eventually([&] {
      const auto first = client.ping();  // while the waiter has not taken the one connection
      return first && witness.clients()->front().channels == 2;
    }));
    {
      const FewDescriptors none(0);
      EXPECT_THAT(client.ping(), Succeeds());
      std::vector<std::thread> others;
      for (int i = 0; i < 8; ++i) {
        others.emplace_back(
            [&] { EXPECT_THAT(client.ping(), testing::AnyOf(Succeeds(), FailsWith(Errc::quota_exceeded))); });
      }
      for (auto& thread : others) thread.join();
    }
    EXPECT_THAT(writer->seal(), Succeeds());
    EXPECT_THAT(witness.put("late", {Dtype::of<std::uint8_t>(), {10}}, pattern_bytes(10)), Succeeds());
    waiter.join();
  });
  EXPECT_EQ(program.wait(), 0);
}

// A pool's board, which it shares with its workers.
TEST_F(DaemonTest, APoolThatIsTooLargeIsAnError) {
  Child program([&](const Link&) {
    const Client client = connect();
    const LittleAddressSpace little(kAddressSpace);
    EXPECT_THAT(Pool::start(client, {.workers = UINT32_MAX}), FailsWith(Errc::out_of_memory));
  });
  EXPECT_EQ(program.wait(), 0);
}

}  // namespace
}  // namespace cowmgr::test
