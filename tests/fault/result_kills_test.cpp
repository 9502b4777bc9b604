// Result sets whose workers are killed at every step, a thousand times: exact results at the end, each time.
//
// A worker's seed says at which step it kills itself, and, for a step that is a request, after how many
// microseconds of it: so kills hit the request on its way, in the daemon, and its answer. The rest is the
// scheduler's: each run tries other instants.
#include <algorithm>
#include <array>
#include <cmath>
#include <csignal>
#include <numeric>
#include <poll.h>
#include <random>
#include <string>
#include <sys/time.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "cowmgr/pool.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

constexpr std::uint32_t kUnwritten = 0xDEADBEEF;

constexpr std::uint32_t value_of(std::uint64_t row) {
  return static_cast<std::uint32_t>(row * 2654435761U + 1);
}

// Where a worker dies; the requests among the steps while they are under way.
enum class Step {
  before_lease,
  lease,
  after_lease,
  allocate,
  half_written,
  written,
  commit,
  after_commit,
  never
};
constexpr std::size_t kSteps = static_cast<std::size_t>(Step::never) + 1;

// The fate of one worker.
class Fate {
 public:
  explicit Fate(unsigned seed) : random_(seed) {
    step_ = static_cast<Step>(below(kSteps));
    slots_before_ = below(6);
  }
  // To be told of each step.
  void reached(Step step) {
    if (step != step_ || slots_before_ > 0) return;
    if (step != Step::lease && step != Step::commit && step != Step::allocate) ::raise(SIGKILL);
    ::signal(SIGALRM, [](int) { ::raise(SIGKILL); });
    const itimerval soon{.it_interval = {},
                         .it_value = {.tv_sec = 0, .tv_usec = static_cast<long>(1 + below(150))}};
    ::setitimer(ITIMER_REAL, &soon, nullptr);
  }
  void slot_done() {
    if (slots_before_ > 0) --slots_before_;
  }
  [[nodiscard]] std::size_t below(std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(random_);
  }

 private:
  std::mt19937 random_;
  Step step_{};
  std::size_t slots_before_ = 0;
};

void fill(std::span<std::uint32_t> items, std::uint64_t first_row, Fate& fate) {
  std::fill(items.begin(), items.end(), kUnwritten);
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i == items.size() / 2) fate.reached(Step::half_written);
    items[i] = value_of(first_row + i);
  }
}

// Of a ragged set: a value for two slots of three, else an array, of a length that hangs on the slot.
void fill_ragged(Slot& slot, Fate& fate) {
  std::vector<std::uint32_t> items(slot.index() % 7);
  if (slot.index() % 3 != 0) {
    fill(items, slot.index(), fate);
    EXPECT_THAT(slot.set_value(std::as_bytes(std::span(items))), Succeeds());
    return;
  }
  fate.reached(Step::allocate);
  EXPECT_THAT(slot.allocate({Dtype::of<std::uint32_t>(), {items.size()}}), Succeeds());
  fill(*slot.as<std::uint32_t>(), slot.index(), fate);
}

// Does slots until none is left, or its fate is met.
void work(const Client& client, const std::string& name, unsigned seed) {
  Fate fate(seed);
  auto set = client.open_results(name);
  ASSERT_THAT(set, Succeeds());
  fate.reached(Step::before_lease);
  fate.reached(Step::lease);
  auto slot = set->lease();
  while (slot && *slot) {
    fate.reached(Step::after_lease);
    if (set->is_ragged())
      fill_ragged(**slot, fate);
    else
      fill(*(*slot)->as<std::uint32_t>(), (*slot)->rows().begin, fate);
    fate.reached(Step::written);
    fate.reached(Step::commit);
    const bool in_one_request = fate.below(2) == 0;
    Result<std::optional<Slot>> next = std::optional<Slot>();
    if (in_one_request)
      next = (*slot)->commit_and_lease();
    else
      EXPECT_THAT((*slot)->commit(), Succeeds());
    fate.reached(Step::after_commit);
    fate.slot_done();
    if (!in_one_request) {
      fate.reached(Step::lease);
      next = set->lease();
    }
    slot = std::move(next);
  }
  EXPECT_THAT(slot, Succeeds());
}

class ResultKills : public DaemonTest {
 protected:
  // Lets `workers` processes work on the set, each with a seed of its own, and others in the place of those
  // that die, until one finds nothing left to do. Returns how many died.
  int work_and_die(const std::string& name, std::size_t workers) {
    struct Worker {
      Child process;
      UniqueFd end;
    };
    std::vector<Worker> running;
    const auto start_one = [&] {
      const unsigned seed = ++last_seed_;
      Child process([&](const Link&) { work(connect("worker"), name, seed); });
      UniqueFd end = open_pidfd(process.pid());
      running.push_back({std::move(process), std::move(end)});
    };
    for (std::size_t i = 0; i < workers; ++i) start_one();
    int deaths = 0;
    for (bool is_over = false; !running.empty();) {
      std::vector<pollfd> polls;
      for (const Worker& worker : running) polls.push_back({worker.end.get(), POLLIN, 0});
      EXPECT_GT(
          ::poll(polls.data(), polls.size(), static_cast<int>(std::chrono::milliseconds(kDeadline).count())),
          0);
      for (std::size_t i = running.size(); i-- > 0;) {
        if (polls[i].revents == 0) continue;
        const int end = running[i].process.wait();
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
        if (end == -SIGKILL) {
          ++deaths;
          if (!is_over) start_one();
          continue;
        }
        EXPECT_EQ(end, 0);
        is_over = true;
      }
      // The last ones may have died with slots: somebody must do these.
      if (running.empty() && connect().open_results(name)->info()->state == ResultsState::running) {
        is_over = false;
        start_one();
      }
    }
    return deaths;
  }

  unsigned last_seed_ = 20'261'124;
};

TEST_F(ResultKills, AtEveryStepOfADenseSetLoseNothing) {
  constexpr std::uint64_t kRows = 10'007;
  constexpr int kKills = 500;
  const Client client = connect();
  for (int deaths = 0; deaths < kKills;) {
    auto set = client.create_results("set", {Dtype::of<std::uint32_t>(), {kRows}}, 200, {.replace = true});
    ASSERT_THAT(set, Succeeds());
    deaths += work_and_die("set", 4);
    const auto array = set->wait(kDeadline);
    ASSERT_THAT(array, Succeeds());
    const auto items = *array->as<std::uint32_t>();
    for (std::uint64_t row = 0; row < kRows; ++row) ASSERT_EQ(items[row], value_of(row)) << "row " << row;
    EXPECT_EQ(set->info()->committed, 200U);
  }
}

TEST_F(ResultKills, AtEveryStepOfARaggedSetLoseNothing) {
  constexpr std::uint64_t kSlots = 200;
  constexpr int kKills = 500;
  const Client client = connect();
  for (int deaths = 0; deaths < kKills;) {
    const auto set = client.create_ragged("set", kSlots);
    ASSERT_THAT(set, Succeeds());
    deaths += work_and_die("set", 4);
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
      std::vector<std::uint32_t> expected(slot % 7);
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = value_of(slot + i);
      const auto expected_bytes = std::as_bytes(std::span(expected));
      if (slot % 3 == 0) {
        const auto array = set->array(slot);
        ASSERT_THAT(array, Succeeds());
        ASSERT_TRUE(std::ranges::equal(array->bytes(), expected_bytes)) << "slot " << slot;
      } else {
        const auto value = set->value(slot);
        ASSERT_THAT(value, Succeeds());
        ASSERT_TRUE(std::ranges::equal(*value, expected_bytes)) << "slot " << slot;
      }
    }
    EXPECT_THAT(set->forget(), Succeeds());
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }))
      << "arrays of the dead are gone too";
}

TEST_F(ResultKills, AreNothingToSetsOfOneSlotOrOfMoreSlotsThanRows) {
  const Client client = connect();
  int deaths = 0;
  for (int round = 0; round < 10; ++round) {
    for (const auto& [rows, slots] : {std::pair(100U, 1U), std::pair(5U, 20U)}) {
      auto set = client.create_results("set", {Dtype::of<std::uint32_t>(), {rows}}, slots, {.replace = true});
      deaths += work_and_die("set", 3);
      const auto array = set->wait(kDeadline);
      ASSERT_THAT(array, Succeeds());
      for (std::uint64_t row = 0; row < rows; ++row)
        ASSERT_EQ((*array->as<std::uint32_t>())[row], value_of(row));
    }
  }
  EXPECT_GT(deaths, 0);
}

// A worker that does not keep to the library: it commits the same slot twice, and another's.
TEST_F(ResultKills, AreNotWorseThanAWorkerThatCommitsTwice) {
  using Builder = RawPeer::Builder;
  const Client client = connect();
  const auto set = client.create_ragged("set", 2);
  const std::uint64_t id = set->info()->id;
  RawPeer worker = RawPeer::greeted(socket());
  ASSERT_NE(worker.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, id, 0); }), nullptr);
  const auto commit = [&](std::uint64_t slot, std::uint8_t value) {
    const std::vector<std::uint64_t> slots = {slot};
    const std::vector<std::uint8_t> values = {value};
    const std::vector<std::uint32_t> sizes = {1};
    const auto* reply = worker.ask<wire::Leased>(
        [&](Builder& b) { return wire::CreateCommitSlotsDirect(b, id, &slots, &values, &sizes); });
    if (reply == nullptr || reply->refused() == nullptr || reply->refused()->size() == 0) return Errc{};
    return static_cast<Errc>(reply->refused()->Get(0)->code());
  };
  EXPECT_EQ(commit(0, 7), Errc{});
  EXPECT_EQ(commit(0, 8), Errc::already_committed);
  EXPECT_EQ(commit(1, 9), Errc::not_holder);
  EXPECT_EQ(set->value(0)->front(), std::byte{7}) << "what was committed first stays";
  EXPECT_EQ(set->info()->committed, 1U);
}

// The parent dies: its set goes, and its workers learn it; a detached one is finished by them.
TEST_F(ResultKills, OfTheParentEndItsSetUnlessItIsDetached) {
  for (const bool is_detached : {false, true}) {
    Child parent([&](const Link& test) {
      const Client own = connect();
      const auto set = own.create_ragged("set", 3, {.is_detached = is_detached});
      test.say("made");
      ::pause();
    });
    parent.expect("made");
    const Client client = connect();
    auto set = client.open_results("set");
    auto slot = set->lease();
    ASSERT_THAT(slot, Succeeds());
    const std::uint32_t value = 5;
    EXPECT_THAT((*slot)->set_value(std::as_bytes(std::span(&value, 1))), Succeeds());
    parent.kill();
    if (!is_detached) {
      EXPECT_TRUE(eventually([&] { return !set->info(); }));
      EXPECT_THAT((*slot)->commit(), FailsWith(Errc::not_found));
      EXPECT_THAT(set->lease(), FailsWith(Errc::not_found));
      continue;
    }
    EXPECT_THAT((*slot)->commit(), Succeeds());
    EXPECT_THAT(set->work([](Slot&) -> Result<void> { return {}; }), testing::Optional(2U));
    EXPECT_THAT(set->wait_settled(kDeadline), Succeeds());
    EXPECT_EQ(set->value(0)->size(), 4U);
    EXPECT_THAT(set->forget(), Succeeds());
  }
}

// ---- Pools ----

void twice(std::span<const std::int64_t> in, std::span<std::int64_t> out) {
  std::transform(in.begin(), in.end(), out.begin(), [](std::int64_t item) { return 2 * item; });
}

TEST_F(ResultKills, OfAPoolsWorkersLoseNothing) {
  constexpr std::int64_t kRows = 100'000;
  constexpr std::uint64_t kKills = 200;
  const Client client = connect();
  const auto pool = Pool::start(client, {.workers = 3, .attempts = 0});
  ASSERT_THAT(pool, Succeeds());
  std::vector<std::int64_t> rows(kRows);
  std::iota(rows.begin(), rows.end(), 0);
  const auto input = client.put<std::int64_t>("input", rows, {rows.size()});
  std::mt19937 random(7);
  while (pool->restarts() < kKills) {
    const auto job = pool->map_async(*input, twice, {.chunks = 300});
    ASSERT_THAT(job, Succeeds());
    // At some slot, and at the next, and so on: until the job is done.
    for (std::uint64_t rank = random() % 40; rank < job->size(); rank += 1 + random() % 40) {
      ASSERT_THAT(job->results().settled_at(rank, kDeadline), Succeeds());
      const auto workers = pool->workers();
      if (!workers.empty()) ::kill(workers[random() % workers.size()], SIGKILL);
    }
    const auto doubled = job->get(kDeadline);
    ASSERT_THAT(doubled, Succeeds());
    const auto items = *doubled->as<std::int64_t>();
    for (std::int64_t row = 0; row < kRows; ++row) ASSERT_EQ(items[static_cast<std::size_t>(row)], 2 * row);
  }
}

// A worker that is killed by what it is given to do: half of its rows are written by then.
TEST_F(ResultKills, ByTheTaskItselfFailThatSlotAlone) {
  const Client client = connect();
  const auto pool = Pool::start(client, {.workers = 2, .attempts = 2});
  const auto task = [](int one) {
    if (one == 13) ::raise(SIGSEGV);
    return one;
  };
  std::vector<std::tuple<int>> sets;
  for (int i = 0; i < 40; ++i) sets.emplace_back(i);
  const auto job = pool->starmap_async(task, sets);
  ASSERT_THAT(job->wait(kDeadline), FailsWith(Errc::slot_failed));
  ASSERT_THAT(job->failures(), testing::SizeIs(1));
  EXPECT_EQ(job->failures().front().index, 13U);
  EXPECT_EQ(job->failures().front().attempt, 2U);
  for (int i = 0; i < 40; ++i) {
    if (i == 13) continue;
    EXPECT_THAT(job->get_one(static_cast<std::uint64_t>(i)), testing::Optional(i));
  }
}

// ---- Many of everything ----

TEST_F(ResultKills, AreNothingToSixtyFourWorkersOfOneSet) {
  constexpr std::uint64_t kRows = 6400;
  const Client client = connect();
  auto set = client.create_results("set", {Dtype::of<std::uint32_t>(), {kRows}}, 640);
  ASSERT_THAT(set, Succeeds());
  EXPECT_GT(work_and_die("set", 64), 0);
  const auto array = set->wait(kDeadline);
  ASSERT_THAT(array, Succeeds());
  for (std::uint64_t row = 0; row < kRows; ++row)
    ASSERT_EQ((*array->as<std::uint32_t>())[row], value_of(row));
}

// Who waits longest is served first: with as many slots as workers, each worker gets one.
TEST_F(ResultKills, StarveNoWorkerThatWaits) {
  constexpr std::size_t kWorkers = 16;
  const Client client = connect();
  auto set = client.create_ragged("set", kWorkers);
  std::vector<Slot> all = *set->lease_batch(kWorkers);
  std::vector<Child> workers;
  for (std::size_t i = 0; i < kWorkers; ++i) {
    workers.emplace_back([&](const Link& test) {
      auto own = connect().open_results("set");
      test.say("waiting");
      auto slot = own->lease();
      EXPECT_TRUE(slot && *slot);
      test.say("leased");
      test.await_word();
      EXPECT_THAT((*slot)->commit(), Succeeds());
    });
    workers.back().expect("waiting");
  }
  all.clear();
  for (const Child& worker : workers) worker.expect("leased");
  for (Child& worker : workers) {
    worker.tell();
    EXPECT_EQ(worker.wait(), 0);
  }
  EXPECT_THAT(set->wait_settled(kDeadline), Succeeds());
}

TEST_F(ResultKills, AreNothingToASetOfAHundredThousandSlots) {
  constexpr std::uint64_t kSlots = 100'000;
  const Client client = connect();
  const auto pool = Pool::start(client, {.workers = 2});
  std::vector<std::int64_t> rows(kSlots);
  std::iota(rows.begin(), rows.end(), 0);
  const auto input = client.put<std::int64_t>("input", rows, {rows.size()});
  const auto job = pool->map_async(*input, [](std::span<const std::int64_t> in) { return in[0] * in[0]; },
                                   {.chunks = kSlots});
  ASSERT_THAT(job, Succeeds());
  ASSERT_THAT(job->results().settled_at(kSlots / 3, kDeadline), Succeeds());
  for (const pid_t pid : pool->workers()) ::kill(pid, SIGKILL);
  const auto squares = job->get(kDeadline);
  ASSERT_THAT(squares, Succeeds());
  ASSERT_EQ(squares->size(), kSlots);
  for (std::uint64_t i = 0; i < kSlots; ++i) ASSERT_EQ((*squares)[i], static_cast<std::int64_t>(i * i));
}

TEST_F(ResultKills, ASetBeyondTheCapacityIsRefusedAndLeavesNothing) {
  const Client client = connect();
  const std::uint64_t capacity = client.ping()->capacity_bytes;
  const auto refused = client.create_results("set", {Dtype::of<std::uint8_t>(), {capacity + 1}}, 2);
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("capacity"));
  EXPECT_EQ(client.ping()->used_bytes, 0U);
  EXPECT_EQ(client.ping()->result_sets, 0U);
}

}  // namespace
}  // namespace cowmgr::test
