// The daemon ends while result sets are worked on and arrays are being written: workers and writers come back
// to the next one, and go on where they were.
#include <atomic>
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <random>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/insist.hpp"

namespace cowmgr::test {
namespace {

using testing::SizeIs;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

class ResultsRestart : public KeepingDaemonTest {
 protected:
  static constexpr std::uint64_t kRows = 12;

  [[nodiscard]] Client persistent() const { return connect("persistent", kDeadline); }
  [[nodiscard]] static ArraySpec rows_spec() { return {Dtype::of<std::uint32_t>(), {kRows}}; }
  static void fill(const Slot& slot) {
    const auto items = *slot.as<std::uint32_t>();
    for (std::size_t i = 0; i < items.size(); ++i)
      items[i] = static_cast<std::uint32_t>(slot.rows().begin + i + 100);
  }
  static void expect_filled(const Array& array) {
    const auto items = *array.as<std::uint32_t>();
    ASSERT_EQ(items.size(), kRows);
    for (std::uint32_t i = 0; i < kRows; ++i) EXPECT_EQ(items[i], i + 100);
  }
};

// ---- Writers ----

TEST_F(ResultsRestart, AWriterGoesOnWhereItWas) {
  const Client client = persistent();
  auto writer =
      client.create("x", {Dtype::of<std::uint8_t>(), {3'000'000}}, {.evictable = true, .mode = 0640});
  const auto bytes = pattern_bytes(3'000'000);
  std::copy_n(bytes.begin(), 1'000'000, writer->bytes().begin());
  kill_and_start();
  std::copy_n(bytes.begin() + 1'000'000, 1'000'000, writer->bytes().begin() + 1'000'000);
  EXPECT_EQ(client.stat("x")->array.state, ArrayState::writing);
  kill_and_start();
  std::copy_n(bytes.begin() + 2'000'000, 1'000'000, writer->bytes().begin() + 2'000'000);
  const auto array = writer->seal();
  ASSERT_THAT(array, Succeeds());
  EXPECT_TRUE(copy_of(array->bytes()) == bytes);
  const auto info = client.stat("x")->array;
  EXPECT_TRUE(info.evictable);
  EXPECT_EQ(info.mode, 0640U);
  EXPECT_EQ(info.views, 1U);
  EXPECT_EQ(client.ping()->used_bytes, info.segment_bytes);
}

TEST_F(ResultsRestart, AWriterThatGaveUpMeanwhileLeavesNothing) {
  const Client client = persistent();
  auto writer = std::make_optional(*client.create("x", {Dtype::of<std::uint8_t>(), {3'000'000}}));
  kill();
  writer.reset();
  start_keeping();
  EXPECT_THAT(client.ping(), Succeeds());
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_THAT(shm_files(instance()), SizeIs(1)) << "the lock";
}

TEST_F(ResultsRestart, AWriterWhoseNameWasTakenIsToldSo) {
  Child child([&](const Link& test) {
    const Client client = persistent();
    auto writer = client.create("x", {Dtype::of<std::uint8_t>(), {10}});
    test.say("writing");
    test.await_word();
    EXPECT_THAT(writer->seal(), FailsWith(Errc::not_holder));
    EXPECT_EQ(client.attach("x")->bytes().size(), 1U);
  });
  child.expect("writing");
  ::kill(child.pid(), SIGSTOP);
  int status = 0;
  ASSERT_EQ(::waitpid(child.pid(), &status, WUNTRACED), child.pid());  // when all of its threads have stopped
  kill_and_start();
  // Another client is faster: the daemon does not know yet what the other is writing.
  EXPECT_THAT(connect().put("x", {Dtype::of<std::uint8_t>(), {1}}, pattern_bytes(1)), Succeeds());
  ::kill(child.pid(), SIGCONT);
  child.tell();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 2; })) << "the array and the lock";
}

// Whoever says that an array is his must be the process that the daemon gave it to.
TEST_F(ResultsRestart, NobodyElseComesBackToAWriter) {
  const Client client = persistent();
  auto writer = client.create("x", {Dtype::of<std::uint8_t>(), {1000}});
  kill_and_start();
  Child thief([&](const Link&) {
    // A forked copy of the client has another session, and its parent's writer is of no use to it.
    EXPECT_THAT(client.ping(), Succeeds());
    EXPECT_THAT(writer->seal(), FailsWith(Errc::wrong_process));
  });
  EXPECT_EQ(thief.wait(), 0);
  EXPECT_THAT(writer->seal(), Succeeds());
}

// ---- Result sets ----

TEST_F(ResultsRestart, ASetKeepsWhatWasCommitted) {
  const Client client = persistent();
  const auto job = bytes_of("the job");
  auto set = client.create_ragged(
      "set", 5,
      {.mode = 0640, .attempts = 3, .is_detached = true, .queue = "q", .job = {job.begin(), job.end()}});
  auto value = set->lease_slot(0);
  EXPECT_THAT(value->set_value(bytes_of("value")), Succeeds());
  EXPECT_THAT(value->commit(), Succeeds());
  auto array = set->lease_slot(1);
  EXPECT_THAT(array->allocate({Dtype::of<double>(), {2}}), Succeeds());
  (*array->as<double>())[1] = 7.5;
  EXPECT_THAT(array->commit(), Succeeds());
  EXPECT_THAT(set->lease_slot(2)->fail("no way", Retry::never), Succeeds());
  auto held = set->lease_slot(3);
  for (int i = 0; i < 2; ++i) kill_and_start();
  const Client other = connect();
  auto found = other.open_results("set");
  ASSERT_THAT(found, Succeeds());
  EXPECT_THAT(client.ping(), Succeeds());
  const auto info = found->info();
  EXPECT_EQ(info->committed, 2U);
  EXPECT_EQ(info->failed, 1U);
  EXPECT_EQ(info->leased, 1U);
  EXPECT_EQ(info->free, 1U);
  EXPECT_EQ(info->attempts, 3U);
  EXPECT_TRUE(info->is_detached);
  EXPECT_EQ(info->queue, "q");
  EXPECT_EQ(info->message, "slot 2: no way");
  EXPECT_EQ(info->owner_pid, ::getpid());
  EXPECT_EQ(text_of(found->job()), "the job");
  EXPECT_EQ(text_of(*found->value(0)), "value");
  EXPECT_EQ((*found->array(1)->as<double>())[1], 7.5);
  EXPECT_THAT(found->value(2), FailsWith(Errc::slot_failed));
  EXPECT_THAT(held->set_value(bytes_of("held")), Succeeds());
  EXPECT_THAT(held->commit(), Succeeds()) << "its lease outlived two daemons";
  EXPECT_EQ(text_of(*found->value(3)), "held");
  auto last = other.open_queued("q", Milliseconds(0));
  ASSERT_THAT(last, Succeeds());
  EXPECT_THAT((*last->lease())->commit(), Succeeds());
  EXPECT_THAT(set->wait_settled(kDeadline), FailsWith(Errc::slot_failed));
  EXPECT_EQ(set->settled_at(0).value(), 0U);
  EXPECT_EQ(set->settled_at(4).value(), 4U);
}

TEST_F(ResultsRestart, ADenseSetBecomesTheArrayThatItsWorkersFill) {
  const Client client = persistent();
  auto set = client.create_results("out", rows_spec(), 4, {.evictable = true});
  auto first = set->lease_slot(0);
  fill(*first);
  EXPECT_THAT(first->commit(), Succeeds());
  auto second = set->lease_slot(1);
  fill(*second);
  kill_and_start();
  EXPECT_THAT(second->commit(), Succeeds());
  auto third = set->lease_slot(2);  // the memory that this process has mapped is still the set's
  fill(*third);
  kill_and_start();
  const Client worker = connect();
  auto fourth = *worker.open_results("out")->lease();
  EXPECT_EQ(fourth->index(), 3U);
  fill(*fourth);
  EXPECT_THAT(fourth->commit(), Succeeds());
  EXPECT_THAT(third->commit(), Succeeds());
  const auto out = set->wait(kDeadline);
  ASSERT_THAT(out, Succeeds());
  expect_filled(*out);
  kill_and_start();
  const auto again = set->wait(kDeadline);
  ASSERT_THAT(again, Succeeds()) << "a set that is done stays so";
  expect_filled(*again);
  EXPECT_TRUE(client.stat("out")->array.evictable);
}

TEST_F(ResultsRestart, ADenseSetWhoseLastSlotWasCommittedIsSealedByTheNextDaemon) {
  // The daemon is stopped before it can seal: a writable mapping of another process is in its way.
  const Client client = persistent();
  auto set = client.create_results("out", rows_spec(), 2);
  Child worker([&](const Link& test) {
    const Client own = persistent();
    auto open = own.open_results("out");
    auto slot = *open->lease();
    fill(*slot);
    test.say("leased");
    test.await_word();
    EXPECT_THAT(slot->commit(), Succeeds());
    test.say("committed");
    test.await_word();
  });
  worker.expect("leased");
  auto mine = *set->lease();
  fill(*mine);
  worker.tell();
  worker.expect("committed");
  kill_and_start();
  EXPECT_THAT(mine->commit(), Succeeds());
  worker.tell();
  EXPECT_EQ(worker.wait(), 0);
  const auto out = set->wait(kDeadline);
  ASSERT_THAT(out, Succeeds());
  expect_filled(*out);
}

// What was granted before somebody else took the name must not keep the next daemon from starting.
TEST_F(ResultsRestart, ADenseSetWhoseNameWasTakenFailsAtItsSealAsItWouldHaveBefore) {
  const Client client = persistent();
  auto set = client.create_results("out", rows_spec(), 1);
  const auto taken = client.put("out", {Dtype::of<std::uint8_t>(), {1}}, pattern_bytes(1), {.replace = true});
  ASSERT_THAT(taken, Succeeds());
  kill_and_start();
  EXPECT_EQ(client.attach("out")->bytes().size(), 1U);
  auto slot = set->lease_slot(0);
  ASSERT_THAT(slot, Succeeds());
  fill(*slot);
  EXPECT_THAT(slot->commit(), Succeeds());
  EXPECT_THAT(set->wait_settled(kDeadline), FailsWith(Errc::slot_failed));
  EXPECT_EQ(client.attach("out")->bytes().size(), 1U);
}

TEST_F(ResultsRestart, AnArrayOfASlotIsWrittenOn) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 2);
  auto slot = *set->lease();
  EXPECT_THAT(slot->allocate({Dtype::of<std::uint8_t>(), {3'000'000}}), Succeeds());
  const auto bytes = pattern_bytes(3'000'000);
  std::copy_n(bytes.begin(), 1'500'000, slot->bytes().begin());
  kill_and_start();
  std::copy_n(bytes.begin() + 1'500'000, 1'500'000, slot->bytes().begin() + 1'500'000);
  EXPECT_THAT(slot->commit(), Succeeds());
  EXPECT_TRUE(copy_of(set->array(slot->index())->bytes()) == bytes);
  auto other = *set->lease();
  EXPECT_THAT(other->allocate({Dtype::of<std::uint8_t>(), {10}}), Succeeds());
  kill_and_start();
  EXPECT_THAT(other->allocate({Dtype::of<std::uint8_t>(), {20}}), Succeeds()) << "in the place of the other";
  EXPECT_THAT(other->commit(), Succeeds());
  EXPECT_EQ(set->array(other->index())->bytes().size(), 20U);
  EXPECT_THAT(set->forget(), Succeeds());
  drop(slot, other, set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(ResultsRestart, ASlotOfADeadWorkerIsFreeAgainAtOnce) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 1, {.attempts = 2});
  Child worker([&](const Link& test) {
    const auto slot = persistent().open_results("set")->lease();
    test.say("leased");
    test.await_word();
  });
  worker.expect("leased");
  kill();
  worker.kill();
  start_keeping({"--grace", "3600"});
  const auto slot = set->lease(kDeadline);
  ASSERT_THAT(slot, Succeeds());
  EXPECT_EQ((*slot)->attempt(), 2U) << "the lost lease counts";
}

TEST_F(ResultsRestart, ASlotWhoseWorkerDoesNotComeBackIsFreeAfterTheGracePeriod) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 1, {.is_detached = true});
  const Client forgetful = connect();  // it lives, but does not look for another daemon
  const auto held = forgetful.open_results("set")->lease();
  kill_and_start({"--grace", "3"});
  const auto slot = set->lease(kDeadline);
  ASSERT_THAT(slot, Succeeds());
  EXPECT_EQ((*slot)->attempt(), 2U);
}

// A worker that computes without a call, for however long, is not late.
TEST_F(ResultsRestart, WhoHasASlotComesBackWithoutBeingAsked) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 1);
  Child worker([&](const Link& test) {
    const Client own = persistent();
    auto slot = *own.open_results("set")->lease();
    test.say("leased");
    test.await_word();
    EXPECT_THAT(slot->commit(), Succeeds());
  });
  worker.expect("leased");
  for (int i = 0; i < 2; ++i) {
    kill_and_start();
    EXPECT_TRUE(eventually([&] {
      const auto clients = client.clients();
      return clients &&
             std::ranges::any_of(*clients, [&](const auto& one) { return one.pid == worker.pid(); });
    }));
  }
  worker.tell();
  EXPECT_EQ(worker.wait(), 0);
  EXPECT_EQ(set->slot(0)->attempt, 1U);
}

TEST_F(ResultsRestart, ASetGoesWithItsMakerThatDoesNotComeBack) {
  const Client client = connect();
  const auto set = client.create_results("set", rows_spec(), 2);
  const auto kept = client.create_ragged("detached", 2, {.is_detached = true});
  kill_and_start({"--grace", "0"});
  EXPECT_TRUE(eventually([&] { return !connect().open_results("set"); }));
  EXPECT_THAT(connect().open_results("detached"), Succeeds());
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 2; })) << "its slots and the lock";
}

TEST_F(ResultsRestart, ASetGoesWithItsMakerThatCameBackAndDied) {
  Child maker([&](const Link& test) {
    const Client client = persistent();
    const auto set = client.create_ragged("set", 2);
    test.say("made");
    test.await_word();
    EXPECT_THAT(set->info(), Succeeds());
    test.say("there");
    test.await_word();
  });
  maker.expect("made");
  kill_and_start();
  maker.tell();
  maker.expect("there");
  EXPECT_THAT(connect().open_results("set"), Succeeds());
  maker.kill();
  EXPECT_TRUE(eventually([&] { return !connect().open_results("set"); }));
}

TEST_F(ResultsRestart, WhoWaitsIsToldByTheNextDaemon) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 2);
  auto mine = set->lease_slot(0);
  Child waiter([&](const Link& test) {
    const Client own = persistent();
    auto open = own.open_results("set");
    test.say("waiting");
    EXPECT_EQ(open->settled_at(0, kDeadline).value(), 0U);
    auto slot = open->lease(kDeadline);  // waits for none: one is free
    EXPECT_THAT((*slot)->commit(), Succeeds());
    EXPECT_THAT(open->wait_settled(kDeadline), Succeeds());
  });
  waiter.expect("waiting");
  kill_and_start();
  kill_and_start();
  EXPECT_THAT(mine->commit(), Succeeds());
  EXPECT_EQ(waiter.wait(), 0);
}

TEST_F(ResultsRestart, ALeaseLimitGoesOn) {
  const Client client = persistent();
  auto set = client.create_ragged("set", 1, {.lease = Milliseconds(300)});
  const auto held = set->lease();
  kill_and_start();
  const auto again = set->lease(kDeadline);
  ASSERT_THAT(again, Succeeds());
  EXPECT_EQ((*again)->attempt(), 2U);
}

TEST_F(ResultsRestart, ACancelledSetIsGone) {
  const Client client = persistent();
  auto set = client.create_results("set", rows_spec(), 2);
  auto slot = *set->lease();
  EXPECT_THAT(set->cancel(), Succeeds());
  kill_and_start();
  EXPECT_THAT(slot->commit(), FailsWith(Errc::not_found));
  EXPECT_THAT(set->cancel(), FailsWith(Errc::not_found));
  drop(slot, set);
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 1; })) << "the lock";
}

TEST_F(ResultsRestart, ADamagedSetIsMovedAside) {
  std::string file;
  {
    const Client client = connect();
    auto set = client.create_ragged("set", 2, {.is_detached = true});
    file = "/dev/shm" + set->info()->segment;
    EXPECT_THAT((*set->lease())->commit(), Succeeds());
  }
  kill();
  ASSERT_EQ(::chmod(file.c_str(), 01600), 0);
  {
    const UniqueFd fd(::open(file.c_str(), O_WRONLY | O_CLOEXEC));
    const std::uint64_t word = 0x0102'0304'0506'0708;  // no daemon leaves a slot like that
    ASSERT_EQ(::pwrite(fd.get(), &word, sizeof word, 2 * kPageBytes), static_cast<ssize_t>(sizeof word));
  }
  ASSERT_EQ(::chmod(file.c_str(), 01400), 0);
  start_keeping();
  EXPECT_THAT(connect().open_results("set"), FailsWith(Errc::not_found));
  const auto left = shm_files(instance());
  ASSERT_THAT(left, SizeIs(2)) << "it and the lock";
  for (const auto& name : left) {
    if (name.find(".quarantine.") == std::string::npos) continue;
    EXPECT_EQ(::unlink(("/dev/shm/" + name).c_str()), 0);
  }
}

// A handle whose lease ran out says nothing of the one that has the slot now.
TEST_F(ResultsRestart, ASlotThatTheSameWorkerLeasedOnceMoreIsStillItsOwn) {
  const Client client = persistent();
  auto set = client.create_results("r", rows_spec(), 1, {.lease = std::chrono::seconds(2)});
  ASSERT_THAT(set, Succeeds());
  auto late = *set->lease();
  ASSERT_TRUE(late);
  auto again = *set->lease();  // waits for the first lease to run out
  ASSERT_TRUE(again);
  ASSERT_EQ(again->attempt(), 2U);
  EXPECT_THAT(late->commit(), FailsWith(Errc::not_holder));
  late.reset();
  kill_and_start();
  fill(*again);
  EXPECT_THAT(again->commit(), Succeeds());
  const auto array = set->wait();
  ASSERT_THAT(array, Succeeds());
  expect_filled(*array);
}

// ---- A whole job ----

// Workers of their own processes, a maker, and a daemon that dies again and again: every slot is committed
// once, with the right bytes, and no other call of any of them fails.
TEST_F(ResultsRestart, AJobFinishesWhileTheDaemonDiesAgainAndAgain) {
  constexpr std::uint64_t kSlots = 3000;
  constexpr int kWorkers = 3;
  const Client client = persistent();
  auto set = client.create_ragged("job", kSlots);
  std::vector<std::unique_ptr<Child>> workers;
  for (int i = 0; i < kWorkers; ++i) {
    workers.push_back(std::make_unique<Child>([&, i](const Link&) {
      const Client own = persistent();
      auto open = own.open_results("job");
      const auto task = [&](Slot& slot) -> Result<void> {
        if (slot.index() % 50 == 7) {
          if (auto ok = slot.allocate({Dtype::of<std::uint64_t>(), {3}}); !ok) return ok;
          (*slot.as<std::uint64_t>())[2] = slot.index();
          return {};
        }
        return slot.set_value(bytes_of(fmt::format("result {}", slot.index())));
      };
      EXPECT_THAT(insist([&] { return open->work(task, {.batch = i == 0 ? 1U : 0U}); }), Succeeds());
    }));
  }
  std::mt19937 random(11);
  int kills = 0;
  for (std::uint64_t settled = 0; settled < kSlots; ++kills) {
    const std::uint64_t next = std::min(kSlots, settled + random() % 100);
    const auto info = set->info();
    ASSERT_THAT(info, Succeeds());
    while (settled < next) settled = set->info()->committed;
    kill_and_start();
  }
  EXPECT_GE(kills, 1);
  for (auto& worker : workers) EXPECT_EQ(worker->wait(), 0);
  ASSERT_THAT(set->wait_settled(kDeadline), Succeeds());
  for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
    // A daemon that dies when it has leased the slot, but not said so, costs an attempt.
    ASSERT_LE(set->slot(slot)->attempt, 1U + static_cast<unsigned>(kills)) << "somebody lost slot " << slot;
    if (slot % 50 == 7) {
      ASSERT_EQ((*set->array(slot)->as<std::uint64_t>())[2], slot);
    } else {
      ASSERT_EQ(text_of(*set->value(slot)), fmt::format("result {}", slot));
    }
  }
  EXPECT_THAT(set->forget(), Succeeds());
  drop(set);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_THAT(shm_files(instance()), SizeIs(1)) << "the lock";
}

}  // namespace
}  // namespace cowmgr::test
