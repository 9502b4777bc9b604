// What all benchmarks share: how an operation is timed, and how it is registered.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include "proto/errors.hpp"

namespace cowmgr::bench {

using Clock = std::chrono::steady_clock;

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

struct Plan {
  int repetitions = 15;
  std::uint64_t churn_bytes = 4096 * kMiB;
};

template <class T>
T value_of(Result<T> result) {
  if (result) return *std::move(result);
  fmt::print(stderr, "cowmgr-bench: {}\n", result.error().message);
  std::exit(1);
}

// Times each call of `operation` and reports the median and the 99th percentile in microseconds.
template <class Operation>
void time_each(benchmark::State& state, const Operation& operation) {
  std::vector<double> samples;
  for (auto _ : state) {
    const auto start = Clock::now();
    operation();
    const std::chrono::duration<double> took = Clock::now() - start;
    state.SetIterationTime(took.count());
    samples.push_back(took.count() * 1e6);
  }
  std::sort(samples.begin(), samples.end());
  state.counters["p50_us"] = samples[samples.size() / 2];
  state.counters["p99_us"] = samples[samples.size() * 99 / 100];
}

// Manual time: what an iteration does besides its operation does not count.
inline benchmark::internal::Benchmark* add(const std::string& name, const Plan& plan, std::int64_t iterations,
                                           std::function<void(benchmark::State&)> run) {
  return benchmark::RegisterBenchmark(name.c_str(), std::move(run))
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(iterations)
      ->Repetitions(plan.repetitions);
}

}  // namespace cowmgr::bench
