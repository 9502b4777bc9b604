// Workers and makers of result sets that die, or lie.
#include <algorithm>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

constexpr std::uint64_t kRows = 20'000;
constexpr std::uint8_t kRight = 7;

class WorkerDeath : public DaemonTest {
 protected:
  [[nodiscard]] static ArraySpec spec() { return {Dtype::of<std::uint8_t>(), {kRows}}; }
  static void fill(const Slot& slot, std::uint8_t value = kRight) {
    std::fill(slot.bytes().begin(), slot.bytes().end(), std::byte{value});
  }
  static void expect_whole(const Result<Array>& array) {
    ASSERT_THAT(array, Succeeds());
    const auto bytes = array->bytes();
    EXPECT_EQ(static_cast<std::uint64_t>(std::count(bytes.begin(), bytes.end(), std::byte{kRight})), kRows);
  }
  // Does what is left to do.
  static void finish(ResultSet& set) {
    for (auto slot = set.lease(); slot && *slot; slot = (*slot)->commit_and_lease()) fill(**slot);
  }
};

TEST_F(WorkerDeath, AfterALeaseGivesTheSlotBack) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 2);
  Child worker([&](const Link& test) {
    auto slot = connect().open_results("set")->lease();
    test.say("leased");
    ::pause();
  });
  worker.expect("leased");
  worker.kill();
  std::vector<Slot> slots;
  for (int i = 0; i < 2; ++i) slots.push_back(**set->lease());
  std::sort(slots.begin(), slots.end(), [](const Slot& a, const Slot& b) { return a.index() < b.index(); });
  EXPECT_EQ(slots[0].attempt(), 2U);
  EXPECT_EQ(slots[1].attempt(), 1U);
  for (Slot& slot : slots) {
    fill(slot);
    EXPECT_THAT(slot.commit(), Succeeds());
  }
  expect_whole(set->wait());
}

TEST_F(WorkerDeath, HalfWayThroughIsWrittenOver) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 4);
  Child worker([&](const Link& test) {
    auto own = connect().open_results("set");
    auto slot = own->lease_slot(2);
    const auto half = slot->bytes().first(slot->bytes().size() / 2);
    std::fill(half.begin(), half.end(), std::byte{0xEE});
    test.say("half written");
    ::pause();
  });
  worker.expect("half written");
  worker.kill();
  finish(*set);
  expect_whole(set->wait());
}

TEST_F(WorkerDeath, AfterACommitLosesNothing) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 2);
  Child worker([&](const Link& test) {
    auto own = connect().open_results("set");
    auto slot = own->lease();
    fill(**slot);
    const auto next = (*slot)->commit_and_lease();
    ASSERT_THAT(next, Succeeds());
    test.say("committed one, leased another");
    ::pause();
  });
  worker.expect("committed one, leased another");
  worker.kill();
  auto slot = set->lease();
  ASSERT_THAT(slot, Succeeds());
  EXPECT_EQ((*slot)->index(), 1U);
  EXPECT_EQ((*slot)->attempt(), 2U);
  fill(**slot);
  EXPECT_THAT((*slot)->commit(), Succeeds());
  expect_whole(set->wait());
}

TEST_F(WorkerDeath, AfterTheLastCommitLosesNothing) {
  const Client client = connect();
  for (int round = 0; round < 20; ++round) {
    auto set = client.create_results("set", spec(), 1, {.replace = true});
    Child worker([&](const Link& test) {
      auto own = connect().open_results("set");
      auto slot = own->lease();
      fill(**slot);
      EXPECT_THAT((*slot)->commit(), Succeeds());
      test.say("committed");
      ::pause();
    });
    worker.expect("committed");
    worker.kill();
    expect_whole(set->wait());
  }
}

TEST_F(WorkerDeath, WakesWhoWaitsForTheSlot) {
  const Client client = connect();
  auto set = client.create_results("set", spec(), 1);
  Child worker([&](const Link& test) {
    const auto slot = connect().open_results("set")->lease();
    test.say("leased");
    ::pause();
  });
  worker.expect("leased");
  Child heir([&](const Link& test) {
    auto own = connect().open_results("set");
    test.say("waiting");
    auto slot = own->lease(kForever);
    EXPECT_EQ((*slot)->attempt(), 2U);
    fill(**slot);
    EXPECT_THAT((*slot)->commit(), Succeeds());
  });
  heir.expect("waiting");
  worker.kill();
  expect_whole(set->wait());
  EXPECT_EQ(heir.wait(), 0);
}

// ---- A worker that lies ----

// Leases a slot, keeps the memory mapped for writing, and says that it does not.
class Liar {
 public:
  Liar(const std::string& socket, std::uint64_t set) : peer_(RawPeer::greeted(socket)), set_(set) {
    const auto* lease = peer_.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, set_); });
    EXPECT_NE(lease, nullptr);
    slots_ = {lease->slots()->Get(0)->slot()};
    bytes_ = ::mmap(nullptr, kRows, PROT_READ | PROT_WRITE, MAP_SHARED, peer_.fds().front().get(), 4096);
    EXPECT_NE(bytes_, MAP_FAILED);
    peer_.fds().clear();
    std::fill_n(static_cast<std::uint8_t*>(bytes_), kRows, kRight);
  }
  void commit() {
    EXPECT_NE(peer_.ask<wire::Leased>([&](Builder& b) {
      return wire::CreateCommitSlotsDirect(b, set_, &slots_, nullptr, nullptr, 0, false, true);
    }),
              nullptr);
  }
  void say_unmapped() {
    EXPECT_TRUE(peer_.request([&](Builder& b) { return wire::CreateUnmapped(b, set_); }));
    EXPECT_NE(peer_.ask<wire::Pong>([](Builder& b) { return wire::CreatePing(b); }), nullptr);
  }

 private:
  RawPeer peer_;
  std::uint64_t set_;
  std::vector<std::uint64_t> slots_;
  void* bytes_ = nullptr;
};

TEST_F(WorkerDeath, EndsTheLieOfAWorkerThatStillWrites) {
  const Client client = connect();
  if (client.ping()->protection == Protection::advisory) return;  // nobody proves anything there
  auto set = client.create_results("set", spec(), 1);
  Child liar([&](const Link& test) {
    Liar worker(socket(), client.list_results()->front().id);
    worker.commit();
    test.say("committed");
    test.await_word();
    worker.say_unmapped();
    test.say("lied");
    ::pause();
  });
  liar.expect("committed");
  const auto honest = set->wait(Milliseconds(20));
  EXPECT_THAT(honest, FailsWith(Errc::timed_out)) << "it still says that it has the set mapped";
  EXPECT_THAT(honest.error().message, testing::HasSubstr("process " + std::to_string(liar.pid())));
  EXPECT_EQ(set->info()->state, ResultsState::sealing);

  liar.tell();
  liar.expect("lied");
  Result<Array> refused = set->wait(Milliseconds(20));
  EXPECT_TRUE(eventually([&] {
    refused = set->wait(Milliseconds(20));
    return !refused && refused.error().code == Errc::still_writable;
  }));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("process " + std::to_string(liar.pid())));
  EXPECT_THAT(client.attach("set"), FailsWith(Errc::not_found)) << "what can be written to is not served";

  liar.kill();
  expect_whole(set->wait());
}

TEST_F(WorkerDeath, IsNotNeededByOtherSetsOfALiar) {
  const Client client = connect();
  auto stuck = client.create_results("stuck", spec(), 1);
  Liar liar(socket(), stuck->info()->id);
  liar.commit();
  liar.say_unmapped();
  for (int round = 0; round < 20; ++round) {
    auto set = client.create_results("set", spec(), 3, {.replace = true});
    finish(*set);
    expect_whole(set->wait());
  }
}

// ---- The maker's death ----

TEST_F(WorkerDeath, OfTheMakerTakesTheSetAway) {
  const Client client = connect();
  Child maker([&](const Link& test) {
    const auto set = connect().create_results("set", spec(), 3);
    test.say("made");
    ::pause();
  });
  maker.expect("made");
  auto set = client.open_results("set");
  auto slot = set->lease();
  ASSERT_THAT(slot, Succeeds());
  Child waiter([&](const Link& test) {
    auto own = connect().open_results("set");
    test.say("waiting");
    EXPECT_THAT(own->wait(), FailsWith(Errc::not_found));
  });
  waiter.expect("waiting");
  maker.kill();
  EXPECT_EQ(waiter.wait(), 0);
  fill(**slot);  // the memory is there as long as the mapping is
  EXPECT_THAT((*slot)->commit(), FailsWith(Errc::not_found));
  EXPECT_THAT(set->lease(), FailsWith(Errc::not_found));
  EXPECT_THAT(set->info(), FailsWith(Errc::not_found));
  EXPECT_THAT(set->wait(), FailsWith(Errc::not_found));
  EXPECT_THAT(client.open_results("set"), FailsWith(Errc::not_found));
  drop(slot, set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(WorkerDeath, OfTheMakerLeavesWhatIsDone) {
  const Client client = connect();
  Child maker([&](const Link& test) {
    auto set = connect().create_results("set", spec(), 3);
    test.say("made");
    (void)set->wait();
    test.say("done");
    ::pause();
  });
  maker.expect("made");
  auto set = client.open_results("set");
  finish(*set);
  maker.expect("done");
  maker.kill();
  expect_whole(client.attach("set"));
}

}  // namespace
}  // namespace cowmgr::test
