// Result sets as a job uses them: slots are leased, filled, committed; the set becomes an array.
#include <algorithm>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

ArraySpec rows_of(std::uint64_t rows, std::uint64_t columns = 1) {
  return {Dtype::of<std::uint32_t>(), {rows, columns}};
}

// What row `row` must hold in the end.
constexpr std::uint32_t value_of(std::uint64_t row) {
  return static_cast<std::uint32_t>(row * 2654435761U + 1);
}

void fill(const Slot& slot, std::uint64_t columns = 1) {
  const auto items = *slot.as<std::uint32_t>();
  for (std::uint64_t i = 0; i < items.size(); ++i) items[i] = value_of(slot.rows().begin + i / columns);
}

void expect_whole(const Result<Array>& array, std::uint64_t columns = 1) {
  ASSERT_THAT(array, Succeeds());
  const auto items = *array->as<std::uint32_t>();
  ASSERT_EQ(items.size(), array->shape().front() * columns);
  for (std::uint64_t i = 0; i < items.size(); ++i) ASSERT_EQ(items[i], value_of(i / columns)) << i;
}

// A worker's whole life: leases, fills and commits until nothing is left. Returns how many slots it did.
std::uint64_t work_on(ResultSet& set, std::uint64_t columns = 1) {
  std::uint64_t count = 0;
  for (auto slot = set.lease(); slot && *slot; slot = (*slot)->commit_and_lease()) {
    fill(**slot, columns);
    ++count;
  }
  return count;
}

class Results : public DaemonTest {};

TEST_F(Results, ComeFromOneWorker) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(103, 7), 10);
  ASSERT_THAT(set, Succeeds());
  EXPECT_EQ(set->name(), "set");
  EXPECT_EQ(set->slots(), 10U);
  EXPECT_EQ(work_on(*set, 7), 10U);
  const auto array = set->wait();
  expect_whole(array, 7);
  EXPECT_EQ(array->name(), "set");
  expect_whole(client.attach("set"), 7);
  EXPECT_EQ(set->info()->state, ResultsState::done);
  EXPECT_EQ(set->lease()->has_value(), false) << "nothing is left";
}

TEST_F(Results, ComeFromManyProcesses) {
  constexpr std::uint64_t kRows = 5000;
  constexpr std::uint64_t kSlots = 400;
  const Client client = connect();
  auto set = client.create_results("set", rows_of(kRows, 3), kSlots);
  std::vector<Child> workers;
  for (int i = 0; i < 6; ++i) {
    workers.emplace_back([&](const Link& test) {
      auto own = connect().open_results("set");
      ASSERT_THAT(own, Succeeds());
      test.say("ready");
      test.await_word();
      (void)work_on(*own, 3);
    });
  }
  for (const Child& worker : workers) worker.expect("ready");
  for (const Child& worker : workers) worker.tell();
  expect_whole(set->wait(), 3);
  for (Child& worker : workers) EXPECT_EQ(worker.wait(), 0);
  EXPECT_EQ(set->info()->committed, kSlots);
}

TEST_F(Results, HaveTheirSlotsInOrder) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 4);
  std::vector<Slot> slots;
  for (int i = 0; i < 4; ++i) slots.push_back(**set->lease());
  const std::vector<Rows> expected = {{0, 3}, {3, 6}, {6, 8}, {8, 10}};  // as numpy.array_split
  for (std::size_t i = 0; i < slots.size(); ++i) {
    EXPECT_EQ(slots[i].index(), i);
    EXPECT_EQ(slots[i].attempt(), 1U);
    EXPECT_EQ(slots[i].rows(), expected[i]);
    EXPECT_EQ(slots[i].bytes().size(), expected[i].count() * 4);
  }
  for (const std::size_t i : {2U, 0U, 3U, 1U}) {
    fill(slots[i]);
    EXPECT_THAT(slots[i].commit(), Succeeds());
  }
  expect_whole(set->wait());
}

TEST_F(Results, MayHaveMoreSlotsThanRows) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(3), 8);
  EXPECT_EQ(work_on(*set), 8U);
  expect_whole(set->wait());
}

TEST_F(Results, MayBeOneSlot) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(1000), 1);
  EXPECT_EQ(work_on(*set), 1U);
  expect_whole(set->wait());
}

TEST_F(Results, MayHaveNoRows) {
  const Client client = connect();
  auto set = client.create_results("set", {Dtype::of<std::uint32_t>(), {0, 5}}, 2);
  EXPECT_EQ(work_on(*set, 5), 2U);
  EXPECT_EQ(set->wait()->bytes().size(), 0U);
}

TEST_F(Results, ThatCannotBeAreRefused) {
  const Client client = connect();
  EXPECT_THAT(client.create_results("set", rows_of(10), 0), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(client.create_results("set", {Dtype::of<float>(), {}}, 1), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(client.create_results("set", {Dtype::of<float>(), {2, 2}, Order::fortran}, 1),
              FailsWith(Errc::invalid_argument));
  EXPECT_THAT(client.create_results("", rows_of(10), 1), FailsWith(Errc::invalid_name));
  EXPECT_EQ(client.ping()->used_bytes, 0U);
}

// ---- The end of a lease ----

TEST_F(Results, AreCommittedOnce) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 2);
  auto slot = set->lease();
  EXPECT_THAT((*slot)->commit(), Succeeds());
  EXPECT_THAT((*slot)->commit(), FailsWith(Errc::already_committed));
  EXPECT_THAT((*slot)->fail("too late"), FailsWith(Errc::already_committed));
  EXPECT_THAT((*slot)->commit_and_lease(), FailsWith(Errc::already_committed));
  EXPECT_THAT(set->lease_slot(0), FailsWith(Errc::already_committed));
  EXPECT_THAT(set->lease_slot(2), FailsWith(Errc::not_found));
  EXPECT_EQ(set->info()->committed, 1U);
}

TEST_F(Results, AreCommittedByTheirHolderAlone) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 2);
  auto slot = set->lease();
  const std::uint64_t id = set->info()->id;
  RawPeer thief = RawPeer::greeted(socket());
  const auto refusal_to_commit = [&](std::uint64_t index) {
    const std::vector<std::uint64_t> slots = {index};
    const auto* reply =
        thief.ask<wire::Leased>([&](Builder& b) { return wire::CreateCommitSlotsDirect(b, id, &slots); });
    if (reply == nullptr || reply->refused() == nullptr || reply->refused()->size() != 1) return Errc{};
    EXPECT_EQ(reply->refused()->Get(0)->slot(), index);
    return static_cast<Errc>(reply->refused()->Get(0)->code());
  };
  const std::vector<std::uint64_t> first = {0};
  EXPECT_EQ(refusal_to_commit(0), Errc::not_holder);
  EXPECT_EQ(refusal_to_commit(1), Errc::not_holder);
  EXPECT_EQ(refusal_to_commit(99), Errc::not_found);
  EXPECT_EQ(thief.refusal([&](Builder& b) { return wire::CreateGiveBackSlotsDirect(b, id, &first); }).code,
            Errc::not_holder);
  EXPECT_EQ(thief.refusal([&](Builder& b) { return wire::CreateFailSlot(b, id, 0); }).code, Errc::not_holder);
  EXPECT_EQ(thief.refusal([&](Builder& b) { return wire::CreateSealArray(b, id); }).code, Errc::not_holder);
  EXPECT_THAT((*slot)->commit(), Succeeds());
  EXPECT_EQ(refusal_to_commit(0), Errc::already_committed);
}

TEST_F(Results, MayBeGivenBack) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 1);
  { const auto slot = set->lease(); }
  auto slot = set->lease_slot(0);
  ASSERT_THAT(slot, Succeeds());
  EXPECT_EQ(slot->attempt(), 2U);
  EXPECT_THAT(set->lease_slot(0), FailsWith(Errc::busy));
  EXPECT_THAT(set->lease(Milliseconds(10)), FailsWith(Errc::timed_out)) << "others hold all that is left";
  fill(*slot);
  EXPECT_THAT(slot->commit(), Succeeds());
  expect_whole(set->wait());
}

TEST_F(Results, ThatFailReachTheWaiter) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 2);
  Child worker([&](const Link&) {
    auto own = connect().open_results("set");
    auto slot = own->lease();
    EXPECT_THAT((*slot)->fail("row 3 has no neighbours"), Succeeds());
    EXPECT_THAT(own->lease_slot(0), FailsWith(Errc::slot_failed));
    EXPECT_EQ(work_on(*own), 1U);
  });
  const auto failed = set->wait();
  EXPECT_THAT(failed, FailsWith(Errc::slot_failed));
  EXPECT_THAT(failed.error().message, testing::HasSubstr("row 3 has no neighbours"));
  EXPECT_EQ(worker.wait(), 0);
  EXPECT_EQ(set->info()->state, ResultsState::failed);
  EXPECT_THAT(arrays_of(client), testing::IsEmpty()) << "there will be no array";
}

TEST_F(Results, MayFailForAnyReason) {
  const Client client = connect();
  for (const std::string& reason :
       {std::string(), std::string("\xff\x1b[2J\n"), std::string(1'000'000, 'r')}) {
    auto set = client.create_results("set", rows_of(10), 1);
    auto slot = set->lease();
    EXPECT_THAT((*slot)->fail(reason), Succeeds()) << reason.size();
    EXPECT_EQ(set->wait(Milliseconds(0)).error().code, Errc::slot_failed) << reason.size();
    EXPECT_THAT(arrays_of(client), testing::IsEmpty());
  }
}

// ---- Waiting ----

TEST_F(Results, ShowTheirProgress) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(100), 20);
  Child worker([&](const Link&) {
    auto own = connect().open_results("set");
    EXPECT_EQ(work_on(*own), 20U);
  });
  std::uint64_t last = 0;
  std::uint64_t calls = 0;
  const auto array = set->wait(kForever, [&](const ResultsInfo& info) {
    EXPECT_GE(info.committed, last);
    EXPECT_EQ(info.free + info.leased + info.committed + info.failed, 20U);
    last = info.committed;
    ++calls;
  });
  expect_whole(array);
  EXPECT_GE(calls, 1U);
  EXPECT_EQ(last, 20U) << "the last call tells of the end";
  EXPECT_EQ(worker.wait(), 0);
}

TEST_F(Results, NameTheHolderWhenTheWaitIsOver) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 3);
  Child worker([&](const Link& test) {
    auto slot = connect().open_results("set")->lease();
    test.say("leased");
    test.await_word();
  });
  worker.expect("leased");
  const auto late = set->wait(Milliseconds(20));
  EXPECT_THAT(late, FailsWith(Errc::timed_out));
  EXPECT_THAT(late.error().message, testing::HasSubstr("process " + std::to_string(worker.pid())));
  EXPECT_THAT(late.error().message, testing::HasSubstr("0 of 3"));
}

TEST_F(Results, AreWaitedForBeforeTheyAreMade) {
  const Client client = connect();
  EXPECT_THAT(client.open_results("set"), FailsWith(Errc::not_found));
  EXPECT_THAT(client.open_results("set", Milliseconds(10)), FailsWith(Errc::timed_out));
  Child worker([&](const Link& test) {
    const Client own = connect();
    test.say("waiting");
    auto set = own.open_results("set", kForever);
    ASSERT_THAT(set, Succeeds());
    EXPECT_EQ(work_on(*set), 5U);
  });
  worker.expect("waiting");
  auto set = client.create_results("set", rows_of(10), 5);
  expect_whole(set->wait());
  EXPECT_EQ(worker.wait(), 0);
}

TEST_F(Results, WakeWhoWaitsForASlot) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 1);
  auto slot = set->lease();
  std::vector<Child> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back([&](const Link& test) {
      const Client own = connect();
      auto results = own.open_results("set");
      test.say("waiting");
      test.say(std::to_string(work_on(*results)));
    });
  }
  for (const Child& worker : workers) worker.expect("waiting");
  slot->reset();
  expect_whole(set->wait());
  int done = 0;
  for (const Child& worker : workers) done += std::stoi(worker.hear());
  EXPECT_EQ(done, 1) << "one got it, the others learnt that nothing is left";
}

// ---- The set as an array ----

TEST_F(Results, AreListed) {
  const Client client = connect();
  auto one = client.create_results("job/1", rows_of(10), 2);
  auto two = client.create_results("job/2", rows_of(10), 3);
  const auto slot = two->lease();
  EXPECT_EQ(client.list_results()->size(), 2U);
  const auto listed = client.list_results_matching("*2");
  ASSERT_EQ(listed->size(), 1U);
  EXPECT_EQ(listed->front().name, "job/2");
  EXPECT_EQ(listed->front().leased, 1U);
  EXPECT_EQ(listed->front().free, 2U);
  EXPECT_EQ(listed->front().owner_pid, ::getpid());
  EXPECT_THAT(listed->front().holders, testing::ElementsAre(::getpid()));
  EXPECT_EQ(client.ping()->result_sets, 2U);
  EXPECT_THAT(client.attach("job/1"), FailsWith(Errc::not_found)) << "it is no array yet";
  EXPECT_THAT(client.create("job/1", rows_of(1)), FailsWith(Errc::already_exists));
}

TEST_F(Results, ThatAreDoneStayWithoutTheirMaker) {
  Child maker([&](const Link&) {
    const Client own = connect();
    auto set = own.create_results("set", rows_of(100), 4);
    EXPECT_EQ(work_on(*set), 4U);
    EXPECT_THAT(set->wait(), Succeeds());
  });
  EXPECT_EQ(maker.wait(), 0);
  expect_whole(connect().attach("set"));
}

// Somebody replaced the name while the set was running: the set fails, in words, and its memory goes.
TEST_F(Results, MayLoseTheirName) {
  const Client client = connect();
  auto set = client.create_results("set", rows_of(10), 1);
  const auto array = client.put<std::uint32_t>("set", std::vector<std::uint32_t>{1}, {1}, {.replace = true});
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(work_on(*set), 1U);
  EXPECT_THAT(set->wait(), FailsWith(Errc::slot_failed));
  EXPECT_TRUE(eventually([&] { return client.list()->size() == 1; })) << "the memory of the set is gone";
}

}  // namespace
}  // namespace cowmgr::test
