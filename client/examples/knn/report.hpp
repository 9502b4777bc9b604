// What the demo found, for people and for programs.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "client/cowctl/terminal.hpp"
#include "client/examples/knn/demo_options.hpp"
#include "client/examples/knn/workers.hpp"

namespace cowmgr::knn {

struct DemoReport {
  DemoTask task;  // as it was carried out: no field is 0
  std::size_t train_rows = 0;
  std::size_t correct = 0;                      // of task.test_rows
  std::size_t lost_workers = 0;                 // of task.workers
  std::chrono::duration<double> total{};        // from the start of the program
  std::chrono::duration<double> classifying{};  // of it, from the start of the workers to the last commit
  std::uint64_t train_bytes = 0;                // of the training images
  std::vector<WorkerReport> by_worker;          // of those that lived to the end

  [[nodiscard]] double accuracy() const noexcept;
  [[nodiscard]] std::uint64_t pss_sum_bytes() const noexcept;
  // What the training images would take if each of by_worker had read them into memory of its own.
  [[nodiscard]] std::uint64_t copies_bytes() const noexcept { return by_worker.size() * train_bytes; }
};

// Accuracy, time, and the table of memory.
[[nodiscard]] std::string to_text(const DemoReport& report, cli::Style style);

// One object, sizes in bytes.
[[nodiscard]] std::string to_json(const DemoReport& report);

// What was shown, in words, and what to do next; `kept` is where the daemon still runs.
struct KeptDaemon {
  std::string socket;
  std::string log;
  std::string cowctl;  // how to call it from here
};
[[nodiscard]] std::string closing_words(const DemoReport& report, const KeptDaemon* kept, cli::Style style);

}  // namespace cowmgr::knn
