// Figures and ratios of one run: collected from the benchmark library, printed, and written as JSON.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

namespace cowmgr::bench {

// Prints the medians as the library's console does, and keeps what each repetition measured.
class Reporter : public benchmark::ConsoleReporter {
 public:
  using ConsoleReporter::ConsoleReporter;
  void ReportRuns(const std::vector<Run>& runs) override;

  // The median over the repetitions of `benchmark` of its counter `counter`; 0 when it did not run.
  [[nodiscard]] double median(const std::string& benchmark, const std::string& counter) const;

  struct Ratio {
    std::string name;
    double value;
    double limit;  // 0: none was promised
    std::string meaning;
  };
  void add(Ratio ratio) { ratios_.push_back(std::move(ratio)); }
  // The median time of `of` for each of `each` things against that of `to`; nothing if one of them did not
  // run.
  void add_ratio(const std::string& name, const std::string& of, const std::string& to, double limit,
                 const std::string& meaning, double each = 1);
  void print_ratios() const;
  // Returns false, with the reason on standard error, when the file cannot be written.
  [[nodiscard]] bool write_json(const std::string& path) const;

 private:
  std::map<std::string, std::map<std::string, std::vector<double>>> samples_;
  std::vector<Ratio> ratios_;
};

}  // namespace cowmgr::bench
