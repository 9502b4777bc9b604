// A daemon that is killed, and how long the next one of its instance takes until it serves again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <sys/types.h>

#include "cowmgr/cowmgr.hpp"
#include "tests/bench/bench.hpp"
#include "tests/bench/report.hpp"

namespace cowmgr::bench {

// A daemon of its own instance that holds `arrays` arrays of 64 KiB. It, and they, end with this object.
class RestartedDaemon {
 public:
  explicit RestartedDaemon(std::uint64_t arrays);
  ~RestartedDaemon();
  RestartedDaemon(const RestartedDaemon&) = delete;
  RestartedDaemon& operator=(const RestartedDaemon&) = delete;

  void kill() noexcept;
  // From the start of the program to the first answer.
  void start();

 private:
  std::filesystem::path directory_;
  pid_t pid_ = -1;
};

void add_restarts(const Plan& plan, RestartedDaemon& empty, RestartedDaemon& full);
void add_restart_ratios(Reporter& reporter);

}  // namespace cowmgr::bench
