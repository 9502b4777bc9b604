// The worker processes of the demo.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "client/examples/knn/child.hpp"
#include "client/examples/knn/interrupts.hpp"
#include "client/examples/knn/memory_use.hpp"
#include "proto/errors.hpp"

namespace cowmgr::knn {

// What one worker did, and what it took for that.
struct WorkerReport {
  pid_t pid = 0;
  std::uint64_t rows = 0;  // that it classified
  MemoryUse memory;        // while it had all arrays mapped
};

// Move-only. The destructor kills those that still run.
class Workers {
 public:
  // Starts `count` times the knn-worker that lies beside this program; they find the daemon at `socket`,
  // which our environment names from now on.
  [[nodiscard]] static Result<Workers> start(std::size_t count, std::size_t k, const std::string& socket);

  // Tells on standard error of each worker that has ended since the last call. Those that are left can do
  // the work of the others; an error when none is.
  [[nodiscard]] Result<void> check();

  // Waits until every worker that lives has run out of slots, and measures it while it keeps its arrays.
  // Errors: as check(), and those of `interrupts`.
  [[nodiscard]] Result<std::vector<WorkerReport>> measure(const Interrupts& interrupts);

  // Lets the workers end and waits until they have. Errors: those of `interrupts`.
  [[nodiscard]] Result<void> finish(const Interrupts& interrupts);

  [[nodiscard]] std::size_t count() const noexcept { return workers_.size(); }
  // How many ended before their time, or not well.
  [[nodiscard]] std::size_t lost() const noexcept;
  // "101 102 103".
  [[nodiscard]] std::string pids() const;

 private:
  struct Worker {
    Child process;
    UniqueFd input;   // its end tells the worker that it may go
    UniqueFd output;  // where the worker says what it did: one line
    bool is_lost = false;
  };
  [[nodiscard]] static Result<Worker> start_one(std::size_t k);
  [[nodiscard]] static Result<std::string> read_line(const Worker& worker, const Interrupts& interrupts);
  void report_loss(Worker& worker, const std::string& how) const;

  std::vector<Worker> workers_;
};

}  // namespace cowmgr::knn
