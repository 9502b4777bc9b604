#include "tests/bench/report.hpp"

#include <algorithm>
#include <fstream>
#include <iostream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "proto/version.hpp"

namespace cowmgr::bench {
namespace {

double median_of(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace

void Reporter::ReportRuns(const std::vector<Run>& runs) {
  std::vector<Run> shown;
  for (const Run& run : runs) {
    if (run.aggregate_name == "median") shown.push_back(run);
    if (run.run_type != Run::RT_Iteration) continue;
    // One that failed has no counters.
    for (const auto& [name, counter] : run.counters)
      samples_[run.run_name.function_name][name].push_back(counter.value);
  }
  ConsoleReporter::ReportRuns(shown);
}

double Reporter::median(const std::string& benchmark, const std::string& counter) const {
  const auto at = samples_.find(benchmark);
  if (at == samples_.end() || !at->second.contains(counter)) return 0;
  return median_of(at->second.at(counter));
}

void Reporter::add_ratio(const std::string& name, const std::string& of, const std::string& to, double limit,
                         const std::string& meaning, double each) {
  const double value = median(of, "p50_us") / each;
  const double reference = median(to, "p50_us");
  if (value > 0 && reference > 0) add({name, value / reference, limit, meaning});  // else filtered out
}

void Reporter::print_ratios() const {
  fmt::print("\n{:<28}{:>8}{:>8}\n", "ratio (medians, this run)", "value", "limit");
  for (const auto& ratio : ratios_) {
    const std::string limit = ratio.limit > 0 ? fmt::format("{:.2f}", ratio.limit) : "";
    fmt::print("{:<28}{:>8.2f}{:>8}  {}\n", ratio.name, ratio.value, limit, ratio.meaning);
  }
}

bool Reporter::write_json(const std::string& path) const {
  nlohmann::ordered_json out;
  out["version"] = std::string(kVersion);
  for (const auto& [benchmark, counters] : samples_) {
    for (const auto& [counter, values] : counters) out["figures"][benchmark][counter] = median_of(values);
    out["figures"][benchmark]["repetitions"] = counters.begin()->second.size();
  }
  for (const auto& ratio : ratios_) {
    out["ratios"][ratio.name] = {{"value", ratio.value}, {"meaning", ratio.meaning}};
    if (ratio.limit > 0) out["ratios"][ratio.name]["limit"] = ratio.limit;
  }
  std::ofstream file(path);
  file << out.dump(2) << '\n';
  file.close();
  if (!file)
    std::cerr << fmt::format("cowmgr-bench: {} cannot be written; name a file in a directory that exists\n",
                             path);
  return static_cast<bool>(file);
}

}  // namespace cowmgr::bench
