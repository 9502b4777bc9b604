// The processes of a pool: one that watches, and the workers that it starts, and starts again when they end.
//
// 1. Workers are children of the watching process, not of the program: it is small, has one thread, and forks
//    whenever one is missing, whatever the program is doing.
// 2. The watching process ends with the program (its pidfd) or at stop(); its workers die with it
//    (PR_SET_PDEATHSIG), so that nothing is left behind whoever is killed.
// 3. A worker that ends at once, again and again, is started less and less often.
// 4. A worker that neither works nor ends is ended: one that lost its descriptors, or became another program,
//    or whose threads all wait for each other. Standard error says so, and so does trouble().
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <sys/types.h>
#include <vector>

#include <boost/interprocess/mapped_region.hpp>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

// How a worker exits that found its descriptors closed, when it is another program: a fork says so.
inline constexpr int kRobbed = 113;

// What a worker runs: `body`, in a fork of this process; or a program, if `command` names one. The body calls
// what it is given when it finds that its descriptors were closed, and then returns.
struct WorkerPlan {
  std::function<void(const std::function<void()>& say_robbed)> body;
  std::vector<std::string> command{};        // path and arguments
  std::vector<std::string> environment{};    // NAME=VALUE, added to ours
  std::chrono::milliseconds stuck_after{0};  // a worker whose threads wait for each other so long is ended
  std::uint32_t threads = 0;                 // of the program, when it starts the workers
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
  // How many workers were ended because they neither worked nor ended (4), and, if any was, a sentence about
  // the last of them.
  [[nodiscard]] std::uint64_t troubles() const noexcept;
  [[nodiscard]] std::string trouble() const;

 private:
  Supervisor(boost::interprocess::mapped_region board, std::uint32_t workers, const WorkerPlan& plan);

  boost::interprocess::mapped_region board_;  // what the watching process says; see Board in supervisor.cpp
  std::uint32_t workers_;
  std::chrono::milliseconds stuck_after_;
  std::uint32_t threads_;
  UniqueFd control_;  // its end stops the watching process
  UniqueFd pidfd_;
  pid_t pid_ = -1;
  std::uint64_t generation_;
};

}  // namespace cowmgr::detail
