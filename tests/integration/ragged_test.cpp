// Ragged result sets, and what dense ones share with them: batches, deadlines, attempts, cancelling.
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/stat.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

using std::chrono::milliseconds;

class Ragged : public DaemonTest {
 protected:
  static std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }
  static std::string text_of(const Result<std::span<const std::byte>>& value) {
    EXPECT_THAT(value, Succeeds());
    return value ? std::string(reinterpret_cast<const char*>(value->data()), value->size()) : "?";
  }
  static ResultSet make(const Client& client, std::uint64_t slots, const ResultsOptions& options = {}) {
    auto set = client.create_ragged("set", slots, options);
    EXPECT_THAT(set, Succeeds());
    return *std::move(set);
  }
  static Slot lease(ResultSet& set) {
    auto slot = set.lease();
    EXPECT_THAT(slot, Succeeds());
    EXPECT_TRUE(*slot);
    return *std::move(*slot);
  }
  static void put_value(Slot& slot, std::string_view text) {
    EXPECT_THAT(slot.set_value(bytes_of(text)), Succeeds());
  }
};

TEST_F(Ragged, HoldValuesThatAreReadInPlace) {
  const Client client = connect();
  ResultSet set = make(client, 3);
  EXPECT_TRUE(set.is_ragged());
  EXPECT_THAT(set.value(0), FailsWith(Errc::not_found));
  for (const std::string text : {"zero", "", "two"}) {
    Slot slot = lease(set);
    put_value(slot, text);
    EXPECT_THAT(slot.commit(), Succeeds());
  }
  EXPECT_THAT(set.wait_settled(), Succeeds());
  EXPECT_EQ(text_of(set.value(0)), "zero");
  EXPECT_EQ(text_of(set.value(1)), "");
  EXPECT_EQ(text_of(set.value(2)), "two");
  EXPECT_EQ(set.value(2)->data(), set.value(2)->data()) << "no copy is made";
  EXPECT_EQ(set.info()->state, ResultsState::done);
  EXPECT_THAT(set.wait(), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(set.array(0), FailsWith(Errc::not_found));
}

TEST_F(Ragged, HoldArraysOfAnyTypeAndShape) {
  const Client client = connect();
  ResultSet set = make(client, 3);
  const std::vector<ArraySpec> specs = {{Dtype::of<double>(), {1000, 3}},
                                        {Dtype::of<std::int16_t>(), {}},
                                        {*Dtype::parse("[('x', '<f4'), ('y', '<i8')]"), {0}, Order::fortran}};
  for (std::size_t i = 0; i < specs.size(); ++i) {
    Slot slot = lease(set);
    ASSERT_THAT(slot.allocate({Dtype::of<float>(), {1U << 20U}}), Succeeds()) << "the first may be too large";
    ASSERT_THAT(slot.allocate(specs[i]), Succeeds());
    EXPECT_EQ(slot.dtype(), specs[i].dtype);
    for (std::byte& byte : slot.bytes()) byte = static_cast<std::byte>(i + 1);
    EXPECT_THAT(client.attach(fmt::format("set/{}", i)), FailsWith(Errc::not_found))
        << "not before the commit";
    ASSERT_THAT(slot.commit(), Succeeds());
  }
  EXPECT_THAT(set.wait_settled(), Succeeds());
  const std::vector<std::uint64_t> all = {0, 1, 2};
  const auto arrays = set.arrays(all);
  ASSERT_THAT(arrays, Succeeds());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const Array& array = (*arrays)[i];
    EXPECT_EQ(array.spec(), specs[i]);
    EXPECT_EQ(array.name(), fmt::format("set/{}", i));
    for (const std::byte byte : array.bytes()) ASSERT_EQ(byte, static_cast<std::byte>(i + 1));
  }
  EXPECT_EQ(set.slot(0)->size_bytes, 24000U);
  EXPECT_THAT(client.attach("set/1"), Succeeds());
  EXPECT_EQ(arrays_of(client).size(), 3U) << "what was allocated and replaced is gone";
}

// An array that is allocated, and still being written, is no result.
TEST_F(Ragged, AreNotReadBeforeTheCommit) {
  const Client client = connect();
  ResultSet set = make(client, 2);
  Slot slot = lease(set);
  ASSERT_THAT(slot.allocate({Dtype::of<std::int64_t>(), {20'000}}), Succeeds());
  EXPECT_THAT(set.wait_slot(0, milliseconds(0)), FailsWith(Errc::timed_out));
  const auto early = set.array(0);
  ASSERT_THAT(early, FailsWith(Errc::not_found));
  EXPECT_EQ(early.error().message, "slot 0 is not committed yet");
  EXPECT_EQ(set.slot(0)->content, SlotContent::none);
  Child waiter([&](const Link& test) {
    const Client own = connect();
    const auto opened = own.open_results("set");
    test.say("waits");
    EXPECT_EQ(opened->wait_slot(0)->state, SlotState::committed);
    EXPECT_THAT(opened->array(0), Succeeds());
  });
  waiter.expect("waits");
  EXPECT_THAT(slot.commit(), Succeeds());
  EXPECT_EQ(waiter.wait(), 0);
}

TEST_F(Ragged, AreReadAsTheyComplete) {
  const Client client = connect();
  ResultSet set = make(client, 4);
  std::vector<Slot> slots = *set.lease_batch(4);
  ASSERT_EQ(slots.size(), 4U);
  for (const std::size_t i : {2U, 0U, 3U}) EXPECT_THAT(slots[i].commit(), Succeeds());
  EXPECT_EQ(*set.settled_at(0), 2U);
  EXPECT_EQ(*set.settled_at(1), 0U);
  EXPECT_EQ(*set.settled_at(2), 3U);
  EXPECT_THAT(set.settled_at(3, milliseconds(10)), FailsWith(Errc::timed_out));
  Child waiter([&](const Link& test) {
    const Client own = connect();
    const auto opened = own.open_results("set");
    test.say("ready");
    EXPECT_EQ(*opened->settled_at(3), 1U);
    EXPECT_EQ(opened->wait_slot(1)->state, SlotState::committed);
  });
  waiter.expect("ready");
  EXPECT_THAT(slots[1].commit(), Succeeds());
  EXPECT_EQ(waiter.wait(), 0);
  EXPECT_EQ(*set.settled_at(4), std::nullopt) << "the set has ended";
}

TEST_F(Ragged, TakeValuesUpToTheLimitAndGrow) {
  const Client client = connect();
  constexpr std::uint64_t kSlots = 80;  // 5 MiB
  ResultSet set = make(client, kSlots);
  const auto committed = set.work([&](Slot& slot) -> Result<void> {
    EXPECT_THAT(slot.set_value(pattern_bytes(kMaxValueBytes + 1)), FailsWith(Errc::invalid_argument));
    return slot.set_value(pattern_bytes(kMaxValueBytes, static_cast<unsigned>(slot.index())));
  });
  EXPECT_THAT(committed, testing::Optional(kSlots));
  EXPECT_GE(client.ping()->used_bytes, kSlots * kMaxValueBytes);
  EXPECT_EQ(set.info()->value_bytes, kSlots * kMaxValueBytes);
  for (unsigned i = 0; i < kSlots; ++i)
    ASSERT_EQ(copy_of(*set.value(i)), pattern_bytes(kMaxValueBytes, i)) << i;
  EXPECT_THAT(set.cancel(), Succeeds());
  EXPECT_TRUE(eventually([&] { return client.ping()->memory.outside_bytes > 0; }))
      << "the handle has it mapped";
  EXPECT_EQ(copy_of(*set.value(7)), pattern_bytes(kMaxValueBytes, 7)) << "what is mapped stays";
  drop(set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(Ragged, AreTakenByManyWorkersInBatches) {
  const Client client = connect();
  constexpr std::uint64_t kSlots = 20'000;
  ResultSet set = make(client, kSlots);
  std::vector<std::unique_ptr<Child>> workers;
  for (int i = 0; i < 4; ++i) {
    workers.push_back(std::make_unique<Child>([&](const Link&) {
      const Client own = connect();
      auto opened = own.open_results("set");
      ASSERT_THAT(opened, Succeeds());
      const auto done = opened->work(
          [](Slot& slot) { return slot.set_value(bytes_of(std::to_string(slot.index() * slot.index()))); });
      EXPECT_THAT(done, Succeeds());
    }));
  }
  EXPECT_THAT(set.wait_settled(), Succeeds());
  for (auto& worker : workers) EXPECT_EQ(worker->wait(), 0);
  for (std::uint64_t i = 0; i < kSlots; ++i) ASSERT_EQ(text_of(set.value(i)), std::to_string(i * i));
}

TEST_F(Ragged, HandExceptionsBackWithTheirSlot) {
  const Client client = connect();
  ResultSet set = make(client, 10);
  const auto done = set.work([](Slot& slot) -> Result<void> {
    if (slot.index() == 3) throw std::runtime_error("three is no number");
    if (slot.index() == 5) return fail(Errc::invalid_argument, "nor is five");
    return slot.set_value(bytes_of("ok"));
  });
  EXPECT_THAT(done, testing::Optional(8U));
  const auto waited = set.wait_settled();
  EXPECT_THAT(waited, FailsWith(Errc::slot_failed));
  EXPECT_EQ(waited.error().message, "slot 3: three is no number");
  EXPECT_THAT(set.value(3), FailsWith(Errc::slot_failed));
  EXPECT_EQ(set.slot(5)->reason, "nor is five");
  EXPECT_EQ(text_of(set.value(4)), "ok") << "the others are there";
}

// What the task has ended itself, or somebody else has by now, is passed over whatever the task says.
TEST_F(Ragged, PassOverASlotThatItsTaskHasEnded) {
  const Client client = connect();
  ResultSet set = make(client, 4);
  const auto done = set.work([](Slot& slot) -> Result<void> {
    if (slot.index() != 1 && slot.index() != 2) return slot.set_value(bytes_of("ok"));
    EXPECT_THAT(slot.index() == 1 ? slot.fail("enough") : slot.commit(), Succeeds());
    return fail(Errc::invalid_argument, "too late");
  });
  EXPECT_THAT(done, testing::Optional(2U));
  EXPECT_EQ(set.slot(1)->reason, "enough");
  EXPECT_EQ(set.slot(2)->state, SlotState::committed);
}

// As when two daemons died of what the task asked for; but what always dies of it must end.
TEST_F(Ragged, GiveBackTheSlotOfATaskThatLostItsDaemon) {
  const Client client = connect();
  ResultSet set = make(client, 3);
  const auto done = set.work([](Slot& slot) -> Result<void> {
    if (slot.index() == 2 || (slot.index() == 1 && slot.attempt() < 5))
      return fail(Errc::disconnected, "the daemon went away");
    return slot.set_value(bytes_of(std::to_string(slot.attempt())));
  });
  EXPECT_THAT(done, testing::Optional(2U));
  EXPECT_EQ(text_of(set.value(0)), "1");
  EXPECT_EQ(text_of(set.value(1)), "5");
  EXPECT_EQ(set.slot(2)->attempt, 10U);
  EXPECT_EQ(set.slot(2)->reason, "the daemon went away");
}

TEST_F(Ragged, TryAgainUntilTheAttemptsAreUsedUp) {
  const Client client = connect();
  ResultSet set = make(client, 1, {.attempts = 3});
  for (const std::uint32_t attempt : {1U, 2U, 3U}) {
    Slot slot = lease(set);
    EXPECT_EQ(slot.attempt(), attempt);
    EXPECT_THAT(slot.fail(fmt::format("failure {}", attempt)), Succeeds());
  }
  EXPECT_THAT(set.wait_settled(), FailsWith(Errc::slot_failed));
  EXPECT_EQ(set.slot(0)->reason, "failure 3");
}

TEST_F(Ragged, SayHowAWorkerDied) {
  const Client client = connect();
  ResultSet set = make(client, 2, {.attempts = 1});
  Child killed([&](const Link& test) {
    const Client own = connect();
    auto opened = own.open_results("set");
    const auto slot = opened->lease();
    test.say("leased");
    test.await_word();
  });
  killed.expect("leased");
  ::kill(killed.pid(), SIGKILL);
  const auto info = set.wait_slot(0);
  ASSERT_THAT(info, Succeeds());
  EXPECT_EQ(info->state, SlotState::failed);
  EXPECT_EQ(info->reason, fmt::format("process {} was killed by signal 9 (Killed)", killed.pid()));
  EXPECT_EQ(killed.wait(), -SIGKILL);
}

TEST_F(Ragged, TakeSlotsBackThatTakeTooLong) {
  const Client client = connect();
  ResultSet set = make(client, 1, {.attempts = 3, .lease = milliseconds(30)});
  Slot slow = lease(set);
  Slot next = lease(set);  // waits until the first lease is over
  EXPECT_EQ(next.attempt(), 2U);
  put_value(slow, "late");
  const auto late = slow.commit();  // whether the second lease is over by now, or not
  EXPECT_THAT(late, FailsWith(Errc::not_holder));
  EXPECT_THAT(late.error().message, testing::HasSubstr("30 ms"));
  const Slot last = lease(set);
  EXPECT_EQ(last.attempt(), 3U);
  const auto waited = set.wait_settled();
  EXPECT_THAT(waited, FailsWith(Errc::slot_failed));
  EXPECT_EQ(set.slot(0)->reason, "no result within 30 ms");
}

TEST_F(Ragged, MayBeCancelled) {
  const Client client = connect();
  ResultSet set = make(client, 3);
  Slot first = lease(set);
  ASSERT_THAT(first.allocate({Dtype::of<double>(), {1000}}), Succeeds());
  ASSERT_THAT(first.commit(), Succeeds());
  Slot second = lease(set);
  ASSERT_THAT(second.allocate({Dtype::of<double>(), {1000}}), Succeeds());
  Child waiter([&](const Link& test) {
    const Client own = connect();
    auto opened = own.open_results("set");
    const auto last = opened->lease();
    test.say("waits");
    EXPECT_THAT(opened->lease(), FailsWith(Errc::cancelled));
    EXPECT_THAT((*last)->bytes(), testing::IsEmpty());
  });
  waiter.expect("waits");
  EXPECT_THAT(set.cancel(), Succeeds());
  EXPECT_EQ(waiter.wait(), 0);
  EXPECT_THAT(second.commit(), FailsWith(Errc::cancelled));
  EXPECT_THAT(set.lease(), FailsWith(Errc::cancelled));
  EXPECT_THAT(set.wait_settled(), FailsWith(Errc::cancelled));
  EXPECT_EQ(*set.settled_at(1), std::nullopt);
  EXPECT_THAT(arrays_of(client), testing::IsEmpty());
  EXPECT_EQ(set.info()->state, ResultsState::cancelled);
  EXPECT_THAT(set.cancel(), Succeeds()) << "forgets it";
  EXPECT_THAT(set.info(), FailsWith(Errc::not_found));
  drop(first, second, set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(Ragged, GoWithTheirMakerUnlessTheyAreDetached) {
  const Client client = connect();
  for (const bool is_detached : {false, true}) {
    Child maker([&](const Link&) {
      const Client own = connect();
      ResultSet set = make(own, 2, {.is_detached = is_detached});
      Slot slot = lease(set);
      put_value(slot, "kept");
      EXPECT_THAT(slot.commit(), Succeeds());
    });
    EXPECT_EQ(maker.wait(), 0);
    EXPECT_TRUE(eventually([&] { return client.clients()->size() == 1; }));
    auto set = client.open_results("set");
    if (!is_detached) {
      EXPECT_THAT(set, FailsWith(Errc::not_found));
      continue;
    }
    ASSERT_THAT(set, Succeeds());
    EXPECT_EQ(text_of(set->value(0)), "kept");
    EXPECT_EQ(lease(*set).index(), 1U);
    EXPECT_THAT(set->cancel(), Succeeds());
    EXPECT_THAT(set->cancel(), Succeeds());
  }
}

TEST_F(Ragged, ThatAreDenseAndDetachedAreSealedWithoutTheirMaker) {
  const Client client = connect();
  Child maker([&](const Link&) {
    const Client own = connect();
    EXPECT_THAT(own.create_results("dense", {Dtype::of<std::uint8_t>(), {10}}, 2, {.is_detached = true}),
                Succeeds());
  });
  EXPECT_EQ(maker.wait(), 0);
  EXPECT_TRUE(eventually([&] { return client.clients()->size() == 1; }));
  auto set = client.open_results("dense");
  ASSERT_THAT(set, Succeeds());
  const auto done = set->work([](Slot& slot) -> Result<void> {
    for (std::byte& byte : slot.bytes()) byte = std::byte{7};
    return {};
  });
  EXPECT_THAT(done, testing::Optional(2U));
  const auto array = set->wait();
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(copy_of(array->bytes()), std::vector<std::byte>(10, std::byte{7}));
  const std::vector<std::string> names = {"dense"};
  EXPECT_THAT(client.evict(names), Succeeds());
  EXPECT_THAT(client.list_results(), testing::Optional(testing::SizeIs(1))) << "a view is there still";
}

TEST_F(Ragged, HaveNamesOfTheirOwn) {
  const Client client = connect();
  const ResultSet first = make(client, 1);
  EXPECT_THAT(client.create_ragged("set", 1), FailsWith(Errc::already_exists));
  const auto second = client.create_ragged("set", 2, {.replace = true});
  ASSERT_THAT(second, Succeeds());
  EXPECT_EQ(client.open_results("set")->slots(), 2U);
  EXPECT_THAT(first.info(), FailsWith(Errc::not_found));
  EXPECT_THAT(client.create_ragged(std::string(254, 'n'), 100), FailsWith(Errc::invalid_name))
      << "no room for the names of its arrays";
  for (const std::uint64_t slots : {std::uint64_t{0}, (std::uint64_t{1} << 24U) + 1})
    EXPECT_THAT(client.create_ragged("other", slots), FailsWith(Errc::invalid_argument));
}

TEST_F(Ragged, RefuseAnArrayThatCanStillBeWritten) {
  const Client client = connect();
  ResultSet set = make(client, 1);
  Slot slot = lease(set);
  ASSERT_THAT(slot.allocate({Dtype::of<std::uint8_t>(), {100}}), Succeeds());
  const std::string path = "/dev/shm" + arrays_of(client).front().segment;
  ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
  UniqueFd writer(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(writer);
  const auto refused = slot.commit();
  EXPECT_THAT(refused, FailsWith(Errc::still_writable));
  EXPECT_THAT(refused.error().message, testing::HasSubstr(std::to_string(::getpid())));
  writer.reset();
  EXPECT_THAT(slot.commit(), Succeeds()) << "the slot was still held";
  EXPECT_THAT(set.array(0), Succeeds());
}

TEST_F(Ragged, FillTheCapacityAndSayHowMuchIsNeeded) {
  daemon_.reset();
  start({"--capacity", "3MiB"});
  const Client client = connect();
  ResultSet set = make(client, 100);
  const auto work = set.work([](Slot& slot) { return slot.set_value(pattern_bytes(kMaxValueBytes)); });
  EXPECT_THAT(work, FailsWith(Errc::out_of_memory));
  EXPECT_GT(set.info()->committed, 0U);
  EXPECT_EQ(set.info()->leased, 0U) << "what could not be committed was given back";
  EXPECT_THAT(set.cancel(), Succeeds());
  drop(set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes < 2U << 20U; }));
}

}  // namespace
}  // namespace cowmgr::test
