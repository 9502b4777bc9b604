// The processes of a pool: one that watches, and the workers that it starts, and starts again when they end.
//
// 1. Workers are children of the watching process, not of the program: it is small, has one thread, and forks
//    whenever one is missing, whatever the program is doing.
// 2. The watching process ends with the program (its pidfd) or at stop(); its workers die with it
//    (PR_SET_PDEATHSIG), so that nothing is left behind whoever is killed.
// 3. A worker that ends at once, again and again, is started less and less often.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <sys/types.h>
#include <vector>

#include <boost/interprocess/mapped_region.hpp>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

// What a worker runs: `body`, in a fork of this process; or a program, if `command` names one.
struct WorkerPlan {
  std::function<void()> body;
  std::vector<std::string> command{};      // path and arguments
  std::vector<std::string> environment{};  // NAME=VALUE, added to ours
};

class Supervisor {
 public:
  // Returns when all workers are started. Errors: not_found when there is no such program, os_failure.
  [[nodiscard]] static Result<Supervisor> start(std::uint32_t workers, const WorkerPlan& plan);

  Supervisor(Supervisor&& other) noexcept;
  Supervisor& operator=(Supervisor&&) = delete;
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;
  ~Supervisor();

  // Kills the workers and waits for the end of all. In a forked child, which owns none of them, it does
  // nothing.
  void stop() noexcept;
  [[nodiscard]] bool is_running() const noexcept;
  [[nodiscard]] std::vector<pid_t> workers() const;
  [[nodiscard]] std::uint64_t restarts() const noexcept;

 private:
  Supervisor(boost::interprocess::mapped_region board, std::uint32_t workers);

  boost::interprocess::mapped_region board_;  // what the watching process says; see Board in supervisor.cpp
  std::uint32_t workers_;
  UniqueFd control_;  // its end stops the watching process
  UniqueFd pidfd_;
  pid_t pid_ = -1;
  std::uint64_t generation_;
};

}  // namespace cowmgr::detail
