// Two connections of one session at once: what one of them looked at, the other may change while it waits.
#include <algorithm>
#include <optional>
#include <string>
#include <sys/socket.h>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "proto/result_segment.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

// Memory of so many slots takes a while to make.
constexpr std::uint64_t kManySlots = std::uint64_t{1} << 21U;

class SecondChannel : public DaemonTest {
 protected:
  void SetUp() override {
    DaemonTest::SetUp();
    witness_.emplace(connect());
    first_.emplace(RawPeer::greeted(socket()));
    second_.emplace(RawPeer::joined(socket(), *first_));
  }
  void TearDown() override {
    EXPECT_THAT(witness_->ping(), Succeeds());
    EXPECT_NE(first_->ask<wire::Pong>([](Builder& b) { return wire::CreatePing(b); }), nullptr)
        << "the connection lives";
    first_.reset();
    second_.reset();
    EXPECT_TRUE(eventually([&] { return witness_->ping()->used_bytes == 0; })) << "no capacity is lost";
    witness_.reset();
    DaemonTest::TearDown();
  }

  static auto make_results(const std::string& name, std::uint64_t slots, bool is_ragged) {
    return [=](Builder& b) {
      const std::vector<std::uint64_t> shape = {slots};
      return wire::CreateMakeResultsDirect(b, name.c_str(), is_ragged ? nullptr : "|u1",
                                           is_ragged ? nullptr : &shape, slots, false, false, 0600,
                                           is_ragged);
    };
  }
  // The array `name`, once it is being written: its memory is there, but for the slots.
  std::uint64_t id_once_written(const std::string& name) {
    std::uint64_t id = 0;
    EXPECT_TRUE(eventually([&] {
      const auto arrays = arrays_of(*witness_);
      for (const auto& array : arrays) {
        if (array.name == name) id = array.id;
      }
      return id != 0 && witness_->ping()->used_bytes > 0;
    }));
    return id;
  }

  std::optional<Client> witness_;
  std::optional<RawPeer> first_;
  std::optional<RawPeer> second_;
};

// ---- A set in the making ----

TEST_F(SecondChannel, MayGiveUpTheArrayOfASetInTheMaking) {
  bool was_aborted = false;
  for (int i = 0; i < 20 && !was_aborted; ++i) {
    const std::string name = "set " + std::to_string(i);
    ASSERT_TRUE(first_->request(make_results(name, kManySlots, false)));
    const std::uint64_t id = id_once_written(name);
    was_aborted =
        second_->ask<wire::Done>([&](Builder& b) { return wire::CreateAbortArray(b, id); }) != nullptr;
    const auto* reply = first_->receive();
    ASSERT_NE(reply, nullptr) << "the connection lives";
    if (was_aborted) {
      const auto* failure = reply->body_as<wire::Failure>();
      ASSERT_NE(failure, nullptr);
      EXPECT_EQ(static_cast<Errc>(failure->code()), Errc::not_found);
      EXPECT_TRUE(eventually([&] { return witness_->ping()->used_bytes == 0; })) << "no capacity is lost";
    }
  }
  EXPECT_TRUE(was_aborted);
}

TEST_F(SecondChannel, MakesNoOtherSetOfANameInTheMaking) {
  ASSERT_TRUE(first_->request(make_results("set", kManySlots, false)));
  std::ignore = id_once_written("set");
  ASSERT_TRUE(second_->request(make_results("set", 1, true)));
  const auto made = [](const wire::Reply* reply) {
    return reply != nullptr && reply->body_as<wire::Results>() != nullptr;
  };
  const int count = (made(first_->receive()) ? 1 : 0) + (made(second_->receive()) ? 1 : 0);
  EXPECT_EQ(count, 1);
  EXPECT_EQ(witness_->list_results()->size(), 1U);
}

// ---- A slot whose array is being sealed ----

class SlotOfTwoChannels : public SecondChannel {
 protected:
  std::uint64_t make_set(std::uint64_t slots, std::uint32_t lease_ms = 0) {
    const auto* made = first_->ask<wire::Results>([&](Builder& b) {
      return wire::CreateMakeResultsDirect(b, "set", nullptr, nullptr, slots, true, false, 0600, true, 0,
                                           lease_ms);
    });
    EXPECT_NE(made, nullptr);
    return made == nullptr ? 0 : made->sets()->Get(0)->id();
  }
  static void lease(RawPeer& peer, std::uint64_t set, std::int64_t slot) {
    EXPECT_NE(peer.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, set, slot); }),
              nullptr);
  }
  // Returns its descriptors: while they are open, it cannot be sealed.
  static std::vector<UniqueFd> allocate(RawPeer& peer, std::uint64_t set, std::uint64_t slot) {
    const std::vector<std::uint64_t> shape = {1};
    EXPECT_NE(peer.ask<wire::Created>(
                  [&](Builder& b) { return wire::CreateAllocateSlotDirect(b, set, slot, "|u1", &shape); }),
              nullptr);
    return std::move(peer.fds());
  }
  static auto commit(std::uint64_t set, std::uint64_t slot) {
    return [=](Builder& b) {
      const std::vector<std::uint64_t> slots = {slot};
      const std::vector<std::uint32_t> sizes = {kArrayValue};
      return wire::CreateCommitSlotsDirect(b, set, &slots, nullptr, &sizes);
    };
  }
  static bool is_taken(const wire::Reply* reply) {
    const auto* leased = reply == nullptr ? nullptr : reply->body_as<wire::Leased>();
    EXPECT_NE(leased, nullptr);
    return leased != nullptr && (leased->refused() == nullptr || leased->refused()->size() == 0);
  }
};

TEST_F(SlotOfTwoChannels, MayGetAnotherArrayWhileItsFirstIsBeingSealed) {
  const std::uint64_t set = make_set(1);
  lease(*first_, set, 0);
  const auto writable = allocate(*first_, set, 0);
  ASSERT_TRUE(first_->request(commit(set, 0)));
  (void)allocate(*second_, set, 0);  // closes its descriptors at once
  EXPECT_FALSE(is_taken(first_->receive()));
  ASSERT_TRUE(second_->request(commit(set, 0)));
  EXPECT_TRUE(is_taken(second_->receive())) << "the new array is the slot's";
  EXPECT_EQ(witness_->open_results("set")->info()->committed, 1U);
}

// The one that comes second must not start the time of a lease that is over.
TEST_F(SlotOfTwoChannels, IsCommittedOnceByTwoAtOnce) {
  int taken = 0;
  for (int i = 0; i < 5 && taken != 1; ++i) {  // again, where this machine took longer than the leases
    const std::uint64_t set = make_set(3, 2000);
    lease(*first_, set, 1);
    lease(*first_, set, 0);
    auto writable = allocate(*first_, set, 0);
    ASSERT_TRUE(first_->request(commit(set, 0)));
    ASSERT_TRUE(second_->request(commit(set, 0)));
    ASSERT_THAT(witness_->ping(), Succeeds());
    writable.clear();
    taken = (is_taken(first_->receive()) ? 1 : 0) + (is_taken(second_->receive()) ? 1 : 0);
  }
  ASSERT_EQ(taken, 1);
  const auto set = witness_->open_results("set");
  ASSERT_THAT(set, Succeeds());
  lease(*first_, set->info()->id, 2);
  // This lease ends after any that began before it.
  EXPECT_TRUE(eventually([&] { return set->info()->leased == 0; }));
  EXPECT_EQ(set->info()->committed, 1U);
  EXPECT_EQ(set->slot(0)->state, SlotState::committed);
}

// ---- Replies that cannot be sent ----

class Unsent : public SecondChannel {
 protected:
  // From here on the second channel asks, and cannot be answered.
  void stop_reading() { ASSERT_EQ(::shutdown(second_->socket(), SHUT_RD), 0); }
  // The daemon has tried to answer, and has given that connection up; the session has another one.
  [[nodiscard]] bool is_cut_off() {
    const auto clients = witness_->clients();
    return std::all_of(clients->begin(), clients->end(),
                       [](const ClientInfo& client) { return client.channels == 1; });
  }
};

TEST_F(Unsent, AnArrayThatNobodyWasToldOfGoes) {
  stop_reading();
  ASSERT_TRUE(second_->request([](Builder& b) {
    const std::vector<std::uint64_t> shape = {100'000};
    return wire::CreateMakeArrayDirect(b, "a", "|u1", &shape);
  }));
  EXPECT_TRUE(eventually([&] { return is_cut_off() && witness_->ping()->used_bytes == 0; }));
}

TEST_F(Unsent, AViewThatNobodyWasToldOfGoes) {
  const std::vector<std::uint64_t> shape = {8};
  const auto* made = second_->ask<wire::Created>(
      [&](Builder& b) { return wire::CreateMakeArrayDirect(b, "a", "|u1", &shape); });
  ASSERT_NE(made, nullptr);
  const std::uint64_t id = made->array()->id();
  second_->fds().clear();
  stop_reading();
  ASSERT_TRUE(second_->request([&](Builder& b) { return wire::CreateSealArray(b, id); }));
  EXPECT_TRUE(eventually([&] {
    const auto stat = witness_->stat("a");
    return stat && stat->array.state == ArrayState::sealed && stat->array.views == 0;
  }));
  EXPECT_THAT(witness_->evict(std::vector<std::string>{"a"}), Succeeds());
}

TEST_F(Unsent, ALeaseThatNobodyWasToldOfGoes) {
  auto set = witness_->create_results("set", {Dtype::of<std::uint8_t>(), {8}}, 2);
  ASSERT_THAT(set, Succeeds());
  stop_reading();
  ASSERT_TRUE(second_->request([id = set->info()->id](Builder& b) { return wire::CreateLeaseSlots(b, id); }));
  EXPECT_TRUE(
      eventually([&] { return set->slot(0)->attempt == 1 && set->slot(0)->state == SlotState::free; }));
  EXPECT_THAT(set->forget(), Succeeds());
}

TEST_F(Unsent, ASetThatNobodyWasToldOfGoes) {
  stop_reading();
  ASSERT_TRUE(second_->request(make_results("set", 10, false)));
  EXPECT_TRUE(eventually([&] { return is_cut_off() && witness_->ping()->used_bytes == 0; }));
}

}  // namespace
}  // namespace cowmgr::test
