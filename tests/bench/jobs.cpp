#include "tests/bench/jobs.hpp"

#include <array>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <new>
#include <numeric>
#include <poll.h>
#include <sstream>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace cowmgr::bench {
namespace {

using Item = std::int64_t;

constexpr std::uint64_t kRows = 30'000'000;  // 240 MB
constexpr std::uint64_t kBytes = kRows * sizeof(Item);
constexpr std::uint32_t kWorkers = 2;
constexpr std::uint64_t kTasks = 100'000;
constexpr std::uint32_t kBatch = 64;
constexpr int kSlowRepetitions = 5;  // at most, of what takes seconds
constexpr std::array<std::size_t, 2> kGangs = {2, 8};

// ---- What the workers do ----

void twice(std::span<const Item> in, std::span<Item> out) {
  std::transform(in.begin(), in.end(), out.begin(), [](Item item) { return 2 * item; });
}

Item sum(std::span<const Item> in) {
  return std::accumulate(in.begin(), in.end(), Item{0});
}

std::uint64_t result_of(std::uint64_t task) {
  return task * 2 + 1;
}

// ---- By hand: fork, and shared mappings ----

std::byte* map_fresh(std::uint64_t size_bytes) {
  void* address = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  COWMGR_ASSERT(address != MAP_FAILED);
  return static_cast<std::byte*>(address);
}

// Forks a process for each share of the rows, and waits for all.
template <class Work>
void fork_and_work(const Work& work) {
  std::array<pid_t, kWorkers> pids{};
  for (std::uint32_t i = 0; i < kWorkers; ++i) {
    pids.at(i) = ::fork();
    if (pids.at(i) == 0) {
      work(rows_of_slot(kRows, kWorkers, i), i);
      ::_exit(0);
    }
  }
  for (const pid_t pid : pids) ::waitpid(pid, nullptr, 0);
}

// The input is the same memory for both, huge pages and all: by hand, children have it from their parent.
std::span<const Item> rows_of(const Array& input, const Rows& rows) {
  return value_of(input.as<Item>()).subspan(rows.begin, rows.count());
}

std::span<Item> rows_at(std::byte* memory, const Rows& rows) {
  return std::span(reinterpret_cast<Item*>(memory) + rows.begin, rows.count());
}

// ---- Memory ----

// What a process takes of memory that it shares with others, each page divided by their number
// (/proc/<pid>/smaps_rollup); 0 when it is gone.
std::uint64_t pss_bytes(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/smaps_rollup", pid));
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    std::uint64_t kib = 0;
    if (words >> key >> kib && key == "Pss:") return kib << 10U;
  }
  return 0;
}

// Where the workers of a pool wait, each when it has done its share, until what all of them take is measured:
// no other moment sees the most. No worker may be lost meanwhile: it would be counted twice.
struct Meeting {
  std::atomic<std::uint32_t> arrived;
  std::atomic<bool> is_over;
};
static_assert(std::atomic<bool>::is_always_lock_free, "processes share it");

// The one that there is: workers have it if they were forked after the first call.
Meeting& meeting() {
  static auto* shared = new (map_fresh(sizeof(Meeting))) Meeting;
  return *shared;
}

void twice_and_meet(std::span<const Item> in, std::span<Item> out) {
  twice(in, out);
  ++meeting().arrived;
  while (!meeting().is_over) std::this_thread::yield();
}

}  // namespace

// ---- A plain server of tasks ----

// Hands out the numbers 0 to kTasks - 1 to whoever asks on one of its sockets; the question is the result of
// the last one. What a result set costs beyond this is the price of its state, and of surviving its workers.
class HandedOutNumbers {
 public:
  struct Record {
    std::uint64_t task;
    std::uint64_t result;
    std::array<char, 48> rest;
  };
  static constexpr std::uint64_t kNone = UINT64_MAX;

  explicit HandedOutNumbers(std::size_t workers) : results_(kTasks) {
    for (std::size_t i = 0; i < workers; ++i) {
      std::array<int, 2> ends{};
      COWMGR_ASSERT(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) == 0);
      theirs_.emplace_back(ends[0]);
      ours_.emplace_back(ends[1]);
    }
    pid_ = ::fork();
    COWMGR_ASSERT(pid_ >= 0);
    if (pid_ != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    theirs_.clear();
    serve();
    ::_exit(0);
  }
  ~HandedOutNumbers() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  HandedOutNumbers(const HandedOutNumbers&) = delete;
  HandedOutNumbers& operator=(const HandedOutNumbers&) = delete;

  // For a worker: does tasks until there is none.
  void work(std::size_t worker) const {
    Record record{kNone, 0, {}};
    do {
      COWMGR_ASSERT(::send(theirs_[worker].get(), &record, sizeof record, MSG_NOSIGNAL) == sizeof record);
      COWMGR_ASSERT(::recv(theirs_[worker].get(), &record, sizeof record, 0) == sizeof record);
      record.result = result_of(record.task);
    } while (record.task != kNone);
  }

 private:
  void serve() {
    std::vector<pollfd> polls;
    for (const UniqueFd& fd : ours_) polls.push_back({fd.get(), POLLIN, 0});
    std::uint64_t next = 0;
    std::size_t told = 0;  // that there is no more
    while (::poll(polls.data(), polls.size(), -1) > 0) {
      for (const pollfd& one : polls) {
        Record record{};
        if (one.revents == 0 || ::recv(one.fd, &record, sizeof record, 0) != sizeof record) continue;
        if (record.task != kNone) results_[record.task] = record.result;
        record.task = next < kTasks ? next++ : kNone;
        COWMGR_ASSERT(::send(one.fd, &record, sizeof record, MSG_NOSIGNAL) == sizeof record);
        if (record.task != kNone || ++told < polls.size()) continue;
        next = 0;  // for the next run
        told = 0;
      }
    }
  }

  std::vector<UniqueFd> ours_;
  std::vector<UniqueFd> theirs_;
  std::vector<std::uint64_t> results_;
  pid_t pid_ = -1;
};

namespace {

Result<void> do_task(Slot& slot) {
  const std::uint64_t result = result_of(slot.index());
  return slot.set_value(std::as_bytes(std::span(&result, 1)));
}

// Members that work on the set "tasks" when they are told to.
std::unique_ptr<Gang> gang_of(const EmbeddedDaemon& daemon, std::size_t workers,
                              const std::function<void(ResultSet&)>& work) {
  return std::make_unique<Gang>(workers, [&](std::size_t) {
    auto client = std::make_shared<Client>(value_of(daemon.connect()));
    return [client, work] {
      auto set = value_of(client->open_results("tasks"));
      work(set);
    };
  });
}

void work_one_by_one(ResultSet& set) {
  for (auto slot = value_of(set.lease()); slot; slot = value_of(slot->commit_and_lease()))
    (void)do_task(*slot);
}

}  // namespace

// ---- Jobs ----

Jobs::Tasks Jobs::make_tasks(const EmbeddedDaemon& daemon, std::size_t workers) {
  Tasks tasks;
  tasks.server = std::make_unique<HandedOutNumbers>(workers);
  tasks.by_hand = std::make_unique<Gang>(workers, [&server = *tasks.server](std::size_t member) {
    return [&server, member] { server.work(member); };
  });
  tasks.one_by_one = gang_of(daemon, workers, work_one_by_one);
  tasks.in_batches =
      gang_of(daemon, workers, [](ResultSet& set) { (void)value_of(set.work(do_task, {.batch = kBatch})); });
  return tasks;
}

Jobs::Jobs(const EmbeddedDaemon& daemon, const Client& client)
    : client_(client),
      tasks_([&] {
        std::vector<Tasks> all;
        for (const std::size_t workers : kGangs) all.push_back(make_tasks(daemon, workers));
        return all;
      }()),
      pool_([&] {
        (void)meeting();
        return value_of(Pool::start(client, {.workers = kWorkers}));
      }()),
      input_([&] {
        auto writer = value_of(client.create("bench/rows", {Dtype::of<Item>(), {kRows}}));
        const auto items = value_of(writer.as<Item>());
        std::iota(items.begin(), items.end(), Item{0});
        return value_of(writer.seal());
      }()) {}

Jobs::~Jobs() = default;

void Jobs::add_tasks(const Plan& plan, const Tasks& tasks) {
  const std::size_t workers = tasks.by_hand->size();
  add(fmt::format("tasks_by_hand_{}", workers), plan, 1,
      [&](benchmark::State& state) { time_each(state, [&] { tasks.by_hand->run(); }); });
  const auto add_ours = [&](const std::string& name, const Gang& gang) {
    add(fmt::format("{}_{}", name, workers), plan, 1, [this, &gang](benchmark::State& state) {
      const auto set = value_of(client_.create_ragged("tasks", kTasks));
      time_each(state, [&] { gang.run(); });
      COWMGR_ASSERT(set.info()->committed == kTasks);
      const auto last = value_of(set.value(kTasks - 1));
      COWMGR_ASSERT(*reinterpret_cast<const std::uint64_t*>(last.data()) == result_of(kTasks - 1));
      COWMGR_ASSERT(set.forget().has_value());
    });
  };
  add_ours("tasks", *tasks.one_by_one);
  add_ours("tasks_in_batches", *tasks.in_batches);
}

void Jobs::add_large_jobs(const Plan& plan) {
  add("double_by_hand", plan, 1, [this](benchmark::State& state) {
    std::byte* out = nullptr;
    time_each(state, [&] {
      out = map_fresh(kBytes);
      fork_and_work(
          [&](const Rows& rows, std::uint32_t) { twice(rows_of(input_, rows), rows_at(out, rows)); });
    });
    COWMGR_ASSERT(rows_at(out, {kRows - 1, kRows})[0] == 2 * static_cast<Item>(kRows - 1));
    ::munmap(out, kBytes);
  });
  add("double", plan, 1, [this](benchmark::State& state) {
    std::optional<Array> out;
    time_each(state, [&] { out = value_of(pool_.map(input_, twice)); });
    COWMGR_ASSERT((*out->as<Item>())[kRows - 1] == 2 * static_cast<Item>(kRows - 1));
  });
  add("sum_by_hand", plan, 1, [this](benchmark::State& state) {
    auto* sums = reinterpret_cast<Item*>(map_fresh(4096));
    time_each(state, [&] {
      fork_and_work([&](const Rows& rows, std::uint32_t i) { sums[i] = sum(rows_of(input_, rows)); });
    });
    ::munmap(sums, 4096);
  });
  add("sum", plan, 1,
      [this](benchmark::State& state) { time_each(state, [&] { (void)value_of(pool_.map(input_, sum)); }); });
  add("memory", plan, 1, [this](benchmark::State& state) {
    const pid_t watching = value_of(pool_.apply([] { return static_cast<int>(::getppid()); }));
    std::uint64_t most = 0;
    time_each(state, [&] {
      meeting().arrived = 0;
      meeting().is_over = false;
      std::thread measures([&] {
        while (meeting().arrived < kWorkers) std::this_thread::yield();
        std::uint64_t sum = pss_bytes(::getpid()) + pss_bytes(watching);
        for (const pid_t pid : pool_.workers()) sum += pss_bytes(pid);
        most = std::max(most, sum);
        meeting().is_over = true;
      });
      const auto restarts = pool_.restarts();
      (void)value_of(pool_.map(input_, twice_and_meet, {.chunks = kWorkers}));
      COWMGR_ASSERT(pool_.restarts() == restarts);
      measures.join();
    });
    state.counters["peak_mib"] = static_cast<double>(most) / kMiB;
  });
  add("double_pool_map", plan, 1, [](benchmark::State& state) {
    const auto script = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "pool_map.py";
    const std::string command = fmt::format(COWMGR_PYTHON " {} {} {}", script.string(), kRows, kWorkers);
    for (auto _ : state) {
      double seconds = 0;
      std::FILE* out = ::popen(command.c_str(), "r");
      COWMGR_ASSERT(out != nullptr && std::fscanf(out, "%lf", &seconds) == 1);
      ::pclose(out);
      state.SetIterationTime(seconds);
      state.counters["p50_us"] = seconds * 1e6;
    }
  })->Repetitions(std::min(plan.repetitions, kSlowRepetitions));
}

void Jobs::add_benchmarks(const Plan& plan) {
  for (const Tasks& tasks : tasks_) add_tasks(plan, tasks);
  add_large_jobs(plan);
}

void Jobs::add_ratios(Reporter& reporter) {
  reporter.add_ratio("double_vs_by_hand", "double", "double_by_hand", 1.15,
                     "x * 2 of 240 MB, 2 workers, against plain fork and shared mappings");
  reporter.add_ratio("pool_map_vs_double", "double_pool_map", "double", 0,
                     "multiprocessing.Pool.map against it; 15 at least");
  reporter.add_ratio("sum_vs_by_hand", "sum", "sum_by_hand", 1.3, "the same for a tiny result, the sum");
  for (const std::size_t workers : kGangs) {
    reporter.add_ratio(fmt::format("tasks_vs_by_hand_{}", workers), fmt::format("tasks_{}", workers),
                       fmt::format("tasks_by_hand_{}", workers), 1.25,
                       fmt::format("100,000 tiny tasks, {} workers, against a plain socket server", workers));
    reporter.add_ratio(fmt::format("batches_vs_tasks_{}", workers),
                       fmt::format("tasks_in_batches_{}", workers), fmt::format("tasks_{}", workers), 0.05,
                       "the same in leases of 64, against one by one");
  }
  // In MiB beyond input and output.
  if (const double peak = reporter.median("memory", "peak_mib"); peak > 0) {
    reporter.add({"memory_mib", peak - 2 * static_cast<double>(kBytes) / kMiB, 64,
                  "peak sum of PSS of parent and workers, MiB beyond input and output"});
  }
}

}  // namespace cowmgr::bench
