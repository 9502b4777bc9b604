// Pools: worker processes that map a function over chunks of an array, or over sets of arguments.
#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <sched.h>
#include <stdexcept>
#include <string>
#include <sys/stat.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/pool_tasks.hpp"

namespace cowmgr::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

using Item = std::int64_t;

void twice(std::span<const Item> in, std::span<Item> out) {
  std::transform(in.begin(), in.end(), out.begin(), [](Item item) { return 2 * item; });
}

Item sum(std::span<const Item> in) {
  return std::accumulate(in.begin(), in.end(), Item{0});
}

// A worker that is gone before it answers.
void die() {
  ::raise(SIGKILL);
}

class PoolTest : public DaemonTest {
 protected:
  [[nodiscard]] static Pool start_pool(const Client& client, const PoolOptions& options = {.workers = 2}) {
    auto pool = Pool::start(client, options);
    EXPECT_THAT(pool, Succeeds());
    return *std::move(pool);
  }
  // 0, 1, 2, ... in `rows` rows of `columns`.
  [[nodiscard]] static Array counted(const Client& client, std::uint64_t rows, std::uint64_t columns = 1) {
    std::vector<Item> items(rows * columns);
    std::iota(items.begin(), items.end(), 0);
    const Shape shape = columns == 1 ? Shape{rows} : Shape{rows, columns};
    auto array = client.put<Item>("input", items, shape, {.replace = true});
    EXPECT_THAT(array, Succeeds());
    return *std::move(array);
  }
  // Nothing but the input is left, as far as the daemon knows.
  static void expect_only_input(const Client& client) {
    EXPECT_TRUE(eventually([&] { return client.ping()->result_sets == 0 && client.ping()->arrays == 1; }))
        << client.ping()->result_sets << " sets, " << client.ping()->arrays << " arrays";
  }
};

// ---- What a task may be ----

TEST_F(PoolTest, MapsRowsToRowsOfOneArrayInOrder) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  {
    const Array input = counted(client, 1000, 3);
    const auto doubled = pool.map(input, twice);
    ASSERT_THAT(doubled, Succeeds());
    EXPECT_THAT(doubled->shape(), ElementsAre(1000, 3));
    const auto items = *doubled->as<Item>();
    for (std::size_t i = 0; i < items.size(); ++i) ASSERT_EQ(items[i], 2 * static_cast<Item>(i));
  }
  expect_only_input(client);
}

TEST_F(PoolTest, MapsRowsToOtherItemsInOtherRows) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 10, 4);
  const auto means =
      pool.map(input,
               [](const Chunk<Item>& chunk, std::span<double> out) {
                 for (std::uint64_t row = 0; row < chunk.rows.count(); ++row) {
                   const auto items = chunk.items.subspan(row * chunk.row_items, chunk.row_items);
                   out[row] = static_cast<double>(sum(items)) / static_cast<double>(items.size());
                 }
               },
               {.chunks = 3, .row_shape = Shape{}});
  ASSERT_THAT(means, Succeeds());
  EXPECT_THAT(means->shape(), ElementsAre(10));
  EXPECT_THAT(*means->as<double>(), ElementsAre(1.5, 5.5, 9.5, 13.5, 17.5, 21.5, 25.5, 29.5, 33.5, 37.5));
}

TEST_F(PoolTest, MapsChunksToValuesInOrder) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  {
    const Array input = counted(client, 10);
    // As numpy.array_split(range(10), 4): three, three, two, two.
    EXPECT_THAT(*pool.map(input, sum, {.chunks = 4}), ElementsAre(0 + 1 + 2, 3 + 4 + 5, 6 + 7, 8 + 9));
  }
  expect_only_input(client);
}

TEST_F(PoolTest, PassesArgumentsOfManyTypes) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 4);
  const auto texts = pool.map(
      input,
      [](std::span<const Item> in, const std::string& before, std::vector<int> factors, double add) {
        return before + std::to_string(static_cast<double>(in[0]) * factors.at(1) + add);
      },
      {.chunks = 4}, "x ", std::vector<int>{1, 10}, 0.5);
  EXPECT_THAT(*texts, ElementsAre("x 0.500000", "x 10.500000", "x 20.500000", "x 30.500000"));
}

TEST_F(PoolTest, PassesArraysWithoutACopy) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 100);
  (void)client.evict(std::vector<std::string>{"input"});  // our view is all that is left of it
  const auto nth = [](const Array& array, std::size_t index) -> Result<Item> {
    const auto items = array.as<Item>();
    if (!items) return error_of(items);
    return (*items)[index];
  };
  EXPECT_THAT(*pool.starmap(nth, std::vector<std::tuple<const Array&, int>>{{input, 7}, {input, 99}}),
              ElementsAre(7, 99));
  EXPECT_THAT(pool.apply(nth, input, 3), testing::Optional(3));
}

TEST_F(PoolTest, KeepsResultsOfAnySize) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto repeat = [](std::size_t count) { return std::string(count, 'x'); };
  const auto texts =
      pool.starmap(repeat, std::vector<std::tuple<std::size_t>>{{0}, {1}, {65'000}, {66'000}, {3'000'000}});
  ASSERT_THAT(texts, Succeeds());
  std::vector<std::size_t> sizes;
  for (const auto& text : *texts) sizes.push_back(text.size());
  EXPECT_THAT(sizes, ElementsAre(0, 1, 65'000, 66'000, 3'000'000));
  EXPECT_TRUE(eventually([&] { return client.ping()->arrays == 0; }));
}

// Longer than a value may be: it lies in an array, which the reader must not look for too early.
TEST_F(PoolTest, WaitsForAResultThatLiesInAnArray) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  for (int i = 0; i < 20; ++i) {
    const auto sevens =
        pool.apply([](std::uint64_t n) { return std::vector<Item>(n, 7); }, std::uint64_t{20'000});
    ASSERT_THAT(sevens, Succeeds());
    EXPECT_EQ(*sevens, std::vector<Item>(20'000, 7));
  }
}

TEST_F(PoolTest, LetsATaskFillItsSlotWithAnArrayOfItsOwn) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 6);
  const auto evens = [](std::span<const Item> in, Slot& slot, Item divisor) -> Result<void> {
    std::vector<Item> kept;
    std::copy_if(in.begin(), in.end(), std::back_inserter(kept),
                 [&](Item item) { return item % divisor == 0; });
    if (auto ok = slot.allocate({Dtype::of<Item>(), {kept.size()}}); !ok) return ok;
    std::copy(kept.begin(), kept.end(), slot.as<Item>()->begin());
    return {};
  };
  const auto arrays = pool.map(input, evens, {.chunks = 2}, 2);
  ASSERT_THAT(arrays, Succeeds());
  ASSERT_THAT(*arrays, SizeIs(2));
  EXPECT_THAT(*(*arrays)[0].as<Item>(), ElementsAre(0, 2));
  EXPECT_THAT(*(*arrays)[1].as<Item>(), ElementsAre(4));
}

TEST_F(PoolTest, AppliesATaskThatReturnsNothing) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  EXPECT_THAT(pool.apply([] {}), Succeeds());
  EXPECT_THAT(pool.starmap([](int) {}, std::vector<std::tuple<int>>{{1}, {2}}), Succeeds());
  EXPECT_THAT(pool.starmap([](int one) { return one; }, std::vector<std::tuple<int>>{}),
              testing::Optional(IsEmpty()));
}

TEST_F(PoolTest, TakesMoreArgumentsThanOneFrameHolds) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  std::vector<std::tuple<std::string>> sets;
  for (std::size_t i = 0; i < 3000; ++i) sets.emplace_back(std::string(i, 'y'));
  const auto sizes = pool.starmap([](const std::string& text) { return text.size(); }, sets);
  ASSERT_THAT(sizes, Succeeds());
  for (std::size_t i = 0; i < sets.size(); ++i) ASSERT_EQ((*sizes)[i], i);
  EXPECT_TRUE(eventually([&] { return client.ping()->arrays == 0; }));
}

TEST_F(PoolTest, WorksWhereThereAreFewRowsOrNone) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  EXPECT_THAT(*pool.map(counted(client, 3), sum, {.chunks = 100}), ElementsAre(0, 1, 2));
  EXPECT_THAT(*pool.map(counted(client, 0), sum), ElementsAre(0));
  const auto none = pool.map(counted(client, 0), twice);
  ASSERT_THAT(none, Succeeds());
  EXPECT_THAT(none->bytes(), IsEmpty());
}

TEST_F(PoolTest, KeepsAnOutputThatHasAName) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  EXPECT_THAT(pool.map(counted(client, 10), twice, {.name = "doubled"}), Succeeds());
  const auto doubled = client.attach("doubled");
  ASSERT_THAT(doubled, Succeeds());
  EXPECT_EQ((*doubled->as<Item>())[9], 18);
}

TEST_F(PoolTest, AppliesATaskToAChunkOfAnArray) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 10);
  EXPECT_THAT(pool.apply(sum, input), testing::Optional(45));
  EXPECT_THAT(pool.apply(sum, ArrayRows(input, {2, 5})), testing::Optional(2 + 3 + 4));
  const auto scaled = [](const Chunk<Item>& chunk, Item factor) {
    return factor * sum(chunk.items) + static_cast<Item>(chunk.rows.begin);
  };
  EXPECT_THAT(pool.apply(scaled, ArrayRows(input, {9, 10}), 3), testing::Optional(3 * 9 + 9));
  EXPECT_THAT(*pool.starmap(scaled, {{input, 1}, {{input, {1, 3}}, 2}}), ElementsAre(45, 2 * 3 + 1));
  EXPECT_THAT(*pool.starmap(sum, std::vector<std::tuple<ArrayRows>>{{{input, {0, 0}}}, {input}}),
              ElementsAre(0, 45));
  EXPECT_THAT(pool.apply(sum, ArrayRows(input, {5, 11})), FailsWith(Errc::invalid_shape));
  const auto floats = client.put("floats", std::vector<float>{1, 2}, {2});
  EXPECT_THAT(pool.apply(sum, *floats), FailsWith(Errc::invalid_dtype));
}

TEST_F(PoolTest, TakesArgumentsAndSetsOfThemAsTheyAreWritten) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const Array input = counted(client, 4);
  const auto times = [](std::span<const Item> in, double factor) {
    return factor * static_cast<double>(sum(in));
  };
  EXPECT_THAT(*pool.map(input, times, {.chunks = 1}, 0.5), ElementsAre(3.0));
  const auto parts = pool.map(input, times, 2);
  ASSERT_THAT(parts, Succeeds());
  EXPECT_EQ(std::accumulate(parts->begin(), parts->end(), 0.0), 12.0);
  EXPECT_THAT(pool.map_async(input, times, 2)->get(), Succeeds());
  const auto power = [](double base, int exponent) { return base * exponent; };
  EXPECT_THAT(*pool.starmap(power, {{1, 2}, {3, 4}}), ElementsAre(2.0, 12.0));
  EXPECT_THAT(*pool.starmap([](int one) { return -one; }, {{1}, {2}, {3}}), ElementsAre(-1, -2, -3));
  EXPECT_THAT(pool.starmap_async(power, {{1, 2}})->get_one(0), testing::Optional(2.0));
  const auto nth = [](const Array& array, std::size_t index, const std::string& after) {
    return std::to_string((*array.as<Item>())[index]) + after;
  };
  EXPECT_THAT(*pool.starmap(nth, {{input, 1, "st"}, {input, 3, "rd"}}), ElementsAre("1st", "3rd"));
}

TEST_F(PoolTest, MapsRowsThatLieTogetherInFortranOrderToo) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const std::vector<Item> items = {1, 2, 3, 4};
  const auto put = [&](const Shape& shape) {
    return client.put("fortran", {Dtype::of<Item>(), shape, Order::fortran},
                      std::as_bytes(std::span(items).first(shape == Shape{4, 0} ? 0 : 4)), {.replace = true});
  };
  EXPECT_THAT(*pool.map(*put({4, 1}), sum, {.chunks = 2}), ElementsAre(1 + 2, 3 + 4));
  EXPECT_THAT(*pool.map(*put({1, 4}), sum), ElementsAre(10));
  EXPECT_THAT(*pool.map(*put({1, 4, 1}), sum), ElementsAre(10));
  EXPECT_THAT(*pool.map(*put({4, 0}), sum, {.chunks = 1}), ElementsAre(0));
  EXPECT_THAT(pool.map(*put({2, 2}), sum), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(pool.map(*put({1, 2, 2}), sum), FailsWith(Errc::invalid_argument))
      << "one row, but not in C order";
}

// ---- Several at a time ----

TEST_F(PoolTest, TellsOfResultsAsTheyComplete) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto job =
      pool.starmap_async([](int one) { return one * one; }, std::vector<std::tuple<int>>{{1}, {2}, {3}, {4}});
  ASSERT_THAT(job, Succeeds());
  std::vector<int> squares;
  for (std::uint64_t rank = 0;; ++rank) {
    const auto completed = job->completed(rank);
    ASSERT_THAT(completed, Succeeds());
    if (!*completed) break;
    const int root = static_cast<int>((*completed)->index) + 1;
    EXPECT_THAT((*completed)->result, testing::Optional(root * root));
    squares.push_back(*(*completed)->result);
  }
  EXPECT_THAT(squares, testing::UnorderedElementsAre(1, 4, 9, 16));
  EXPECT_THAT(job->get_one(2), testing::Optional(9));
  EXPECT_THAT(job->get_one(4), FailsWith(Errc::not_found));
}

TEST_F(PoolTest, RunsManyJobsAtOnceAndFromManyThreads) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 3});
  const Array input = counted(client, 100);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      std::vector<Job<int>> jobs;
      for (int i = 0; i < 25; ++i)
        jobs.push_back(*pool.apply_async([](int a, int b) { return a + b; }, thread, i));
      EXPECT_THAT(*pool.map(input, sum, {.chunks = 1}), ElementsAre(4950));
      for (int i = 0; i < 25; ++i)
        EXPECT_THAT(jobs[static_cast<std::size_t>(i)].get_one(0), testing::Optional(thread + i));
    });
  }
  for (auto& thread : threads) thread.join();
  expect_only_input(client);
}

// Two tasks of two jobs that wait for each other can only end when both run at the same time.
TEST_F(PoolTest, StartsALaterJobWhileAnEarlierOneStillRuns) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 2});
  const auto wait_for = [](const std::string& socket, const std::string& mine, const std::string& other) {
    const auto own = Client::connect({.socket = socket, .command = {}});
    (void)own->put(mine, {Dtype::of<std::uint8_t>(), {0}}, {});
    return own->attach(other, {.wait = std::chrono::seconds(60)}).has_value();
  };
  const auto first = pool.apply_async(wait_for, client.socket(), "a", "b");
  const auto second = pool.apply_async(wait_for, client.socket(), "b", "a");
  EXPECT_THAT(first->get_one(0), testing::Optional(true));
  EXPECT_THAT(second->get_one(0), testing::Optional(true));
}

TEST_F(PoolTest, TellsOfProgressUntilAllIsDone) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto job = pool.map_async(counted(client, 1000), twice, {.chunks = 50});
  ASSERT_THAT(job, Succeeds());
  std::vector<std::uint64_t> committed;
  EXPECT_THAT(job->get(kForever, [&](const ResultsInfo& info) { committed.push_back(info.committed); }),
              Succeeds());
  EXPECT_TRUE(std::is_sorted(committed.begin(), committed.end()));
  EXPECT_EQ(committed.back(), 50U);
}

TEST_F(PoolTest, ForgetsAJobThatNobodyWantsAnyMore) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 1});
  {
    const Array input = counted(client, 10);
    auto waiting = pool.apply_async(
        [](const std::string& socket) {
          const auto own = Client::connect({.socket = socket, .command = {}});
          (void)own->attach("go", {.wait = kForever});
        },
        client.socket());
    const auto dropped = pool.map_async(input, twice);
    const auto cancelled = pool.map_async(input, sum);
    EXPECT_THAT(cancelled->cancel(), Succeeds());
    EXPECT_THAT(cancelled->get(), FailsWith(Errc::cancelled));
  }
  (void)client.put("go", {Dtype::of<std::uint8_t>(), {0}}, {});
  EXPECT_THAT(pool.apply([] { return 1; }), testing::Optional(1)) << "the worker is free again";
  (void)client.evict(std::vector<std::string>{"go"});
  expect_only_input(client);
}

TEST_F(PoolTest, GivesUpWaitingAtTheTimeout) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 1});
  const auto job = pool.apply_async([] { ::pause(); });
  EXPECT_THAT(job->wait(Milliseconds(1)), FailsWith(Errc::timed_out));
  EXPECT_THAT(job->get_one(0, Milliseconds(300)), FailsWith(Errc::timed_out));
  EXPECT_THAT(job->completed(0, Milliseconds(0)), FailsWith(Errc::timed_out));
}

// ---- Errors ----

TEST_F(PoolTest, HandsAnExceptionBackWithItsSlot) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto job = pool.starmap_async(
      [](int one) {
        if (one == 3) throw std::out_of_range("three is too much");
        return one;
      },
      std::vector<std::tuple<int>>{{1}, {2}, {3}, {4}});
  const auto all = job->get();
  ASSERT_THAT(all, FailsWith(Errc::slot_failed));
  EXPECT_EQ(all.error().message, "slot 2: three is too much");
  ASSERT_THAT(job->failures(), SizeIs(1));
  EXPECT_EQ(job->failures().front().index, 2U);
  EXPECT_EQ(job->failures().front().reason, "three is too much");
  EXPECT_EQ(job->failures().front().attempt, 1U) << "an exception is not tried again";
  EXPECT_THAT(job->get_one(3), testing::Optional(4)) << "the others go on";
  EXPECT_THAT(job->get_one(2), FailsWith(Errc::slot_failed));
}

TEST_F(PoolTest, HandsAnErrorBackThatATaskReturns) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto refuse = [](int) -> Result<int> { return cowmgr::fail(Errc::invalid_argument, "not this one"); };
  const auto answer = pool.apply(refuse, 1);
  ASSERT_THAT(answer, FailsWith(Errc::slot_failed));
  EXPECT_THAT(answer.error().message, HasSubstr("not this one"));
}

TEST_F(PoolTest, RefusesInputThatDoesNotFitTheTask) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto floats = client.put<float>("floats", std::vector<float>{1, 2}, {2});
  EXPECT_THAT(pool.map(*floats, sum), FailsWith(Errc::invalid_dtype));
  const auto scalar = client.put<Item>("scalar", std::vector<Item>{1}, {});
  EXPECT_THAT(pool.map(*scalar, sum), FailsWith(Errc::invalid_shape));
  const std::vector<Item> items(4);
  const auto columns =
      client.put("columns", {Dtype::of<Item>(), {2, 2}, Order::fortran}, std::as_bytes(std::span(items)));
  EXPECT_THAT(pool.map(*columns, sum), FailsWith(Errc::invalid_argument));
}

TEST_F(PoolTest, FailsASlotWhoseWorkerDiesEachTime) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 2, .attempts = 2});
  const auto job = pool.apply_async(die);
  const auto answer = job->get_one(0);
  ASSERT_THAT(answer, FailsWith(Errc::slot_failed));
  // Before Linux 6.15 nobody tells how a process ended that its parent has waited for.
  EXPECT_THAT(answer.error().message,
              testing::MatchesRegex("slot 0 failed: process [0-9]+ (was killed by signal 9 "
                                    "\\(Killed\\)|went away)"));
  EXPECT_EQ(job->failures().front().attempt, 2U);
  EXPECT_THAT(pool.apply([] { return 5; }), testing::Optional(5)) << "others have taken their place";
}

// ---- Processes ----

TEST_F(PoolTest, HasAWorkerForEachProcessorButOne) {
  cpu_set_t ours;
  ASSERT_EQ(::sched_getaffinity(0, sizeof ours, &ours), 0);
  const Client client = connect();
  EXPECT_THAT(start_pool(client, {}).workers(), SizeIs(std::max(CPU_COUNT(&ours) - 1, 1)));
}

TEST_F(PoolTest, StartsWorkersAgainThatDie) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 2});
  const auto first = pool.workers();
  ASSERT_THAT(first, SizeIs(2));
  for (const pid_t pid : first) ::kill(pid, SIGKILL);
  EXPECT_TRUE(eventually([&] { return client.ping().has_value() && pool.restarts() == 2; }));
  EXPECT_THAT(pool.apply([] { return static_cast<int>(::getpid()); }),
              testing::Optional(testing::AnyOf(pool.workers()[0], pool.workers()[1])));
}

TEST_F(PoolTest, EndsItsWorkersWithItself) {
  const Client client = connect();
  std::vector<UniqueFd> ends;
  std::optional<Job<void>> job;
  {
    const Pool pool = start_pool(client);
    for (const pid_t pid : pool.workers()) ends.push_back(open_pidfd(pid));
    job = *pool.apply_async([] { ::pause(); });
  }
  for (const UniqueFd& end : ends) EXPECT_TRUE(wait_readable(end.get()));
  EXPECT_THAT(job->get(), FailsWith(Errc::no_workers));
  job.reset();
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1 && client.ping()->used_bytes == 0; }));
}

TEST_F(PoolTest, TellsWhoWaitsThatTheWatchingProcessWasKilled) {
  const Client client = connect();
  const Pool pool = start_pool(client);
  const auto job = pool.apply_async([] { return static_cast<int>(::getppid()); });
  const auto watch = job->get_one(0);
  ASSERT_THAT(watch, Succeeds());
  std::vector<UniqueFd> ends;
  for (const pid_t pid : pool.workers()) ends.push_back(open_pidfd(pid));
  const auto endless = pool.apply_async([] { ::pause(); });
  ::kill(*watch, SIGKILL);
  EXPECT_THAT(endless->get(), FailsWith(Errc::no_workers));
  for (const UniqueFd& end : ends) EXPECT_TRUE(wait_readable(end.get())) << "workers die with it";
  EXPECT_THAT(pool.apply([] {}), FailsWith(Errc::no_workers));
}

// Ctrl-C, as a terminal sends it: to every process of the group at once.
TEST_F(PoolTest, LeavesNobodyBehindOnCtrlC) {
  Child program([&](const Link& test) {
    ::setpgid(0, 0);
    const auto pool = Pool::start(connect("program"), {.workers = 3});
    std::string pids;
    for (const pid_t pid : pool->workers()) pids += std::to_string(pid) + " ";
    const auto job = pool->apply_async([] { ::pause(); });
    test.say(pids);
    (void)job->wait();
  });
  std::vector<UniqueFd> ends;
  std::istringstream pids(program.hear());
  for (pid_t pid = 0; pids >> pid;) ends.push_back(open_pidfd(pid));
  ASSERT_THAT(ends, SizeIs(3));
  ::kill(-program.pid(), SIGINT);
  EXPECT_EQ(program.wait(), -SIGINT);
  for (const UniqueFd& end : ends) EXPECT_TRUE(wait_readable(end.get()));
  const Client client = connect();
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(PoolTest, LeavesNobodyBehindWhenItsProgramIsKilled) {
  Child program([&](const Link& test) {
    const auto pool = Pool::start(connect("program"), {.workers = 2});
    std::string pids;
    for (const pid_t pid : pool->workers()) pids += std::to_string(pid) + " ";
    test.say(pids);
    ::pause();
  });
  std::vector<UniqueFd> ends;
  std::istringstream pids(program.hear());
  for (pid_t pid = 0; pids >> pid;) ends.push_back(open_pidfd(pid));
  program.kill();
  for (const UniqueFd& end : ends) EXPECT_TRUE(wait_readable(end.get()));
}

TEST_F(PoolTest, OfAParentIsNothingToItsChildren) {
  const Client client = connect();
  auto pool = std::make_optional(start_pool(client));
  Child child([&](const Link&) { pool.reset(); });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_THAT(pool->apply([] { return 2; }), testing::Optional(2));
}

// ---- Workers that neither work nor end ----

// What a program does before it becomes a service, and some libraries after a fork.
void close_descriptors() {
  for (int fd = 3; fd < 1024; ++fd) ::close(fd);
}

// Each descriptor is another file then: what is written to it would be written there.
void replace_sockets() {
  for (int fd = 3; fd < 1024; ++fd) {
    struct stat now {};
    if (::fstat(fd, &now) == 0 && S_ISSOCK(now.st_mode)) ::dup2(STDIN_FILENO, fd);
  }
}

void become_another_program() {
  ::execlp("sleep", "sleep", "1000", nullptr);
}

void loop_for_ever() {
  for (volatile bool is_endless = true; is_endless;) {
  }
}

void stop_itself() {
  ::raise(SIGSTOP);
}

void exit_at_once() {
  ::_exit(0);
}

TEST_F(PoolTest, EndsWorkersThatNeitherWorkNorEnd) {
  struct Useless {
    const char* what;
    void (*task)();
    Milliseconds lease;
  };
  const std::vector<Useless> all = {{"closes descriptors", close_descriptors, {}},
                                    {"replaces sockets", replace_sockets, {}},
                                    {"becomes another program", become_another_program, {}},
                                    {"exits", exit_at_once, {}},
                                    {"loops", loop_for_ever, Milliseconds(500)},
                                    {"stops", stop_itself, Milliseconds(500)}};
  const Client client = connect();
  for (const auto& [what, task, lease] : all) {
    SCOPED_TRACE(what);
    const Pool pool = start_pool(client, {.workers = 1, .attempts = 2, .lease = lease});
    const auto job = pool.apply_async(task);
    ASSERT_THAT(job, Succeeds());
    ASSERT_THAT(job->get_one(0, kDeadline), FailsWith(Errc::slot_failed));
    EXPECT_EQ(job->failures().front().attempt, 2U);
    EXPECT_TRUE(eventually([&] { return pool.apply([] { return 5; }) == 5; })) << "another takes its place";
  }
}

TEST_F(PoolTest, SaysThatATaskClosedItsWorkersDescriptors) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 1, .attempts = 1});
  for (const auto task : {close_descriptors, replace_sockets}) {
    const auto answer = pool.apply_async(task)->get_one(0, kDeadline);
    ASSERT_THAT(answer, FailsWith(Errc::slot_failed));
    EXPECT_THAT(answer.error().message, HasSubstr("may close only what it opened"));
  }
}

// As a library does that starts threads at its first use: in a fork, they are not there.
class ThreadedLibrary {
 public:
  static int compute() {
    static ThreadedLibrary library;
    std::unique_lock lock(library.mutex_);
    const int wanted = ++library.asked_;
    library.wake_.notify_all();
    library.done_.wait(lock, [&] { return library.answered_ >= wanted; });
    return 42;
  }

 private:
  ThreadedLibrary() : helper_([this] { answer(); }) { helper_.detach(); }
  void answer() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return answered_ < asked_; });
      answered_ = asked_;
      done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  int asked_ = 0;
  int answered_ = 0;
  std::thread helper_;
};

TEST_F(PoolTest, SaysThatALibraryWaitsForThreadsThatAForkDoesNotHave) {
  Child program([&](const Link&) {
    EXPECT_EQ(ThreadedLibrary::compute(), 42);
    const Client client = connect("program");
    testing::internal::CaptureStderr();
    const Pool pool = start_pool(client, {.workers = 1, .attempts = 1, .stuck_after = Milliseconds(50)});
    const auto answer = pool.apply_async(ThreadedLibrary::compute)->get_one(0, kDeadline);
    const std::string log = testing::internal::GetCapturedStderr();
    ASSERT_THAT(answer, FailsWith(Errc::slot_failed));
    for (const auto* word : {"all its threads waited for each other", "the program had 2 threads", "OpenMP",
                             "PoolOptions::program"}) {
      EXPECT_THAT(answer.error().message, HasSubstr(word));
      EXPECT_THAT(log, HasSubstr(word));
    }
  });
  EXPECT_EQ(program.wait(), 0);
}

// Threads that wait for something else than each other are left alone.
TEST_F(PoolTest, LeavesWorkersAloneThatWait) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 1, .attempts = 1, .stuck_after = Milliseconds(1)});
  const auto wait = [](const std::string& socket) {
    std::mutex mutex;
    std::condition_variable woken;
    bool is_there = false;
    std::thread other([&] {
      const auto own = Client::connect({.socket = socket, .command = {}});
      (void)own->put("waiting", {Dtype::of<std::uint8_t>(), {0}}, {});
      (void)own->attach("go", {.wait = kForever});
      const std::lock_guard lock(mutex);
      is_there = true;
      woken.notify_one();
    });
    std::unique_lock lock(mutex);
    woken.wait(lock, [&] { return is_there; });
    lock.unlock();
    other.join();
    return 1;
  };
  const auto job = pool.apply_async(wait, client.socket());
  ASSERT_THAT(client.attach("waiting", {.wait = kForever}), Succeeds());
  EXPECT_THAT(job->wait(Milliseconds(200)), FailsWith(Errc::timed_out));
  ASSERT_THAT(client.put("go", {Dtype::of<std::uint8_t>(), {0}}, {}), Succeeds());
  EXPECT_THAT(job->get_one(0), testing::Optional(1));
  EXPECT_EQ(pool.restarts(), 0U);
}

// ---- Workers that are another program ----

TEST_F(PoolTest, RunsTasksOfAnotherProgramByName) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 2, .program = program_path("test_pool_worker")});
  EXPECT_THAT(pool.apply(kPower, 2.0, 10), testing::Optional(1024.0));
  const auto doubled = pool.map(counted(client, 10), kTwice);
  ASSERT_THAT(doubled, Succeeds());
  EXPECT_EQ((*doubled->as<Item>())[9], 18);
}

TEST_F(PoolTest, SaysThatAnotherProgramDoesNotKnowATask) {
  const Client client = connect();
  const Pool pool = start_pool(client, {.workers = 1, .program = program_path("test_pool_worker")});
  const auto unknown = pool.apply(NamedTask<int(int)>("no such task"), 1);
  ASSERT_THAT(unknown, FailsWith(Errc::slot_failed));
  EXPECT_THAT(unknown.error().message, HasSubstr("knows no task \"no such task\""));
  EXPECT_THAT(pool.apply([] { return 1; }), FailsWith(Errc::slot_failed)) << "its functions lie elsewhere";
}

TEST_F(PoolTest, SaysThatThereIsNoSuchProgram) {
  const auto pool = Pool::start(connect(), {.workers = 2, .program = "/nonexistent/worker"});
  ASSERT_THAT(pool, FailsWith(Errc::not_found));
  EXPECT_THAT(pool.error().message, HasSubstr("/nonexistent/worker cannot be run"));
}

}  // namespace
}  // namespace cowmgr::test
