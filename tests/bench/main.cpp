// cowmgr-bench: what the product costs, as ratios against a floor or a quiet neighbour in the same run.
//
// Every operation is timed by itself, and the median of a repetition counts; repetitions of all benchmarks
// are interleaved at random, so that a machine that drifts drifts for all of them; the ratio is one of
// medians over the repetitions.

#include <array>
#include <memory>
#include <sched.h>
#include <sys/sysinfo.h>
#include <vector>

#include <CLI/CLI.hpp>
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include "cowmgr/cowmgr.hpp"
#include "proto/text.hpp"
#include "tests/bench/bench.hpp"
#include "tests/bench/churn.hpp"
#include "tests/bench/floor.hpp"
#include "tests/bench/jobs.hpp"
#include "tests/bench/report.hpp"
#include "tests/bench/restart.hpp"

namespace cowmgr::bench {
namespace {

constexpr std::uint64_t kAttachBytes = 188 * kMiB;  // the training images of the demo
constexpr std::uint64_t kPutBytes = 256 * kMiB;
constexpr int kBatch = 64;
constexpr std::int64_t kAttaches = 2000;               // of one repetition
constexpr std::int64_t kAttachesBesideChurn = 50'000;  // so long that the neighbour makes and evicts several

// Which processor client and server run on decides what a wake-up costs (here: 15 us when they share one, 35
// us when they do not, since another processor must be interrupted), and the scheduler changes its mind from
// run to run. So both places are measured, each for product and floor alike; beside a neighbour also where
// the scheduler puts them, since getting out of a neighbour's way is its work.
enum class Place { together, apart, anywhere };

void pin(pid_t pid, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(cpu) % static_cast<unsigned>(::get_nprocs()), &set);
  ::sched_setaffinity(pid, sizeof set, &set);  // where it is not allowed, the scheduler goes on choosing
}

void unpin(pid_t pid) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu = 0; cpu < ::get_nprocs_conf(); ++cpu) CPU_SET(static_cast<unsigned>(cpu), &set);
  ::sched_setaffinity(pid, sizeof set, &set);
}

struct Stage {
  const EmbeddedDaemon& daemon;
  Client client;
  std::unique_ptr<FloorServer> floor;
  std::unique_ptr<Churn> churn;
  std::vector<std::byte> source;
  std::vector<std::string> batch;
};

void put_in_place(const Stage& stage, Place place) {
  const int server_cpu = place == Place::together ? 0 : 1;
  if (place == Place::anywhere) {
    for (const pid_t pid : {0, stage.daemon.pid()}) unpin(pid);
    return;
  }
  pin(0, 0);
  pin(stage.floor->pid(), server_cpu);
  pin(stage.daemon.pid(), server_cpu);  // its loop; the threads for long work stay where they like
}

void put_bytes(const Client& client, const std::string& name, std::uint64_t size_bytes) {
  auto writer = value_of(client.create(name, {Dtype::of<std::uint8_t>(), {size_bytes}}));
  (void)value_of(writer.seal());
}

void add_attach(const std::string& name, const Plan& plan, Stage& stage, Place place,
                const std::string& array) {
  add(name, plan, kAttaches, [&stage, place, array](benchmark::State& state) {
    put_in_place(stage, place);
    time_each(state, [&] { (void)value_of(stage.client.attach(array)); });
  });
}

void add_floor(const std::string& name, const Plan& plan, Stage& stage, Place place) {
  add(name, plan, kAttaches, [&stage, place](benchmark::State& state) {
    put_in_place(stage, place);
    time_each(state, [&] { stage.floor->map_and_unmap(); });
  });
}

void add_beside_churn(const std::string& name, const Plan& plan, Stage& stage, Place place) {
  add(name, plan, kAttachesBesideChurn, [&stage, place](benchmark::State& state) {
    put_in_place(stage, place);
    stage.churn->start();
    time_each(state, [&] { (void)value_of(stage.client.attach("bench/188MiB")); });
    state.counters["arrays_made"] = static_cast<double>(stage.churn->stop());
  });
}

void add_benchmarks(const Plan& plan, Stage& stage) {
  add_floor("floor_together", plan, stage, Place::together);
  add_floor("floor_apart", plan, stage, Place::apart);
  add_attach("attach_together", plan, stage, Place::together, "bench/188MiB");
  add_attach("attach_apart", plan, stage, Place::apart, "bench/188MiB");
  for (const char* size : {"4KiB", "4MiB", "1GiB"}) {
    add_attach(fmt::format("attach_{}", size), plan, stage, Place::together, fmt::format("bench/{}", size));
  }
  add("attach_64_at_once", plan, 200, [&](benchmark::State& state) {
    put_in_place(stage, Place::together);
    time_each(state, [&] { (void)value_of(stage.client.attach(stage.batch)); });
  });
  add_attach("attach_quiet", plan, stage, Place::anywhere, "bench/188MiB");
  add_beside_churn("attach_beside_churn", plan, stage, Place::anywhere);
  add_beside_churn("attach_beside_churn_together", plan, stage, Place::together);
  add_beside_churn("attach_beside_churn_apart", plan, stage, Place::apart);
  add("put_by_hand", plan, 1, [&](benchmark::State& state) {
    time_each(state, [&] { put_by_hand(stage.source.data(), stage.source.size()); });
  });
  add("put", plan, 1, [&](benchmark::State& state) {
    time_each(state, [&] {
      (void)value_of(
          stage.client.put("bench/put", {Dtype::of<std::uint8_t>(), {stage.source.size()}}, stage.source));
    });
    const std::array<std::string, 1> names = {"bench/put"};
    (void)value_of(stage.client.evict(names));
  });
}

void add_ratios(Reporter& reporter) {
  const auto add = [&](const std::string& name, const std::string& of, const std::string& to, double limit,
                       const std::string& meaning,
                       double each = 1) { reporter.add_ratio(name, of, to, limit, meaning, each); };
  add("attach_vs_floor_together", "attach_together", "floor_together", 1.4,
      "attach + release against the bare system calls, on one processor");
  add("attach_vs_floor_apart", "attach_apart", "floor_apart", 1.4, "the same, client and server on two");
  add("attach_1GiB_vs_4KiB", "attach_1GiB", "attach_4KiB", 0, "the array's size does not matter");
  add("beside_churn", "attach_beside_churn", "attach_quiet", 1.5,
      "while a neighbour creates and evicts large arrays");
  add("beside_churn_together", "attach_beside_churn_together", "attach_together", 1.5,
      "the same, client and server on one processor");
  add("beside_churn_apart", "attach_beside_churn_apart", "attach_apart", 0,
      "the same, on two; with no third, they wait for the kernel to clear a huge page");
  add("attach_64_each_vs_one", "attach_64_at_once", "attach_together", 0,
      "one of 64 in a request against one alone", kBatch);
  add("put_vs_by_hand", "put", "put_by_hand", 0, "256 MiB: create, copy, seal against shm_open, memcpy");
}

Stage set_stage(const EmbeddedDaemon& daemon, const Plan& plan) {
  // Forked first, while this process is small.
  auto floor = std::make_unique<FloorServer>(kAttachBytes);
  auto churn = std::make_unique<Churn>(daemon.socket(), plan.churn_bytes);
  Stage stage{daemon,
              value_of(daemon.connect()),
              std::move(floor),
              std::move(churn),
              std::vector<std::byte>(kPutBytes, std::byte{1}),
              {}};
  put_bytes(stage.client, "bench/4KiB", 4096);
  put_bytes(stage.client, "bench/4MiB", 4 * kMiB);
  put_bytes(stage.client, "bench/188MiB", kAttachBytes);
  put_bytes(stage.client, "bench/1GiB", 1024 * kMiB);
  for (int i = 0; i < kBatch; ++i) {
    stage.batch.push_back(fmt::format("bench/batch/{}", i));
    put_bytes(stage.client, stage.batch.back(), 64 << 10);
  }
  return stage;
}

int run(int argc, char** argv) {
  CLI::App app("Measures cowmgr against floors and rivals in one run; prints figures and ratios.",
               "cowmgr-bench");
  Plan plan;
  std::string json;
  std::string churn = "4GiB";
  std::string filter = ".";
  app.add_option("--json", json, "Write every figure and ratio to FILE")->type_name("FILE");
  app.add_option("--filter", filter, "Run only benchmarks whose name matches REGEX")->type_name("REGEX");
  app.add_option("--repetitions", plan.repetitions, "Of each benchmark")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--churn", churn, "Size of the arrays that the neighbour makes")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  plan.churn_bytes = value_of(parse_size(churn));
  const auto daemon = value_of(EmbeddedDaemon::start({.program = {}, .log_level = "warning"}));
  Stage stage = set_stage(daemon, plan);
  Jobs jobs(daemon, stage.client);
  RestartedDaemon empty(0);
  RestartedDaemon full(1000);
  std::vector<std::string> words = {argv[0], "--benchmark_enable_random_interleaving=true",
                                    "--benchmark_filter=" + filter};
  std::vector<char*> flags;
  for (auto& word : words) flags.push_back(word.data());
  int count = static_cast<int>(flags.size());
  benchmark::Initialize(&count, flags.data());
  add_benchmarks(plan, stage);
  jobs.add_benchmarks(plan);
  add_restarts(plan, empty, full);
  Reporter reporter(benchmark::ConsoleReporter::OO_Tabular);
  benchmark::RunSpecifiedBenchmarks(&reporter);
  add_ratios(reporter);
  Jobs::add_ratios(reporter);
  add_restart_ratios(reporter);
  reporter.print_ratios();
  return json.empty() || reporter.write_json(json) ? 0 : 1;
}

}  // namespace
}  // namespace cowmgr::bench

int main(int argc, char** argv) {
  return cowmgr::bench::run(argc, argv);
}
