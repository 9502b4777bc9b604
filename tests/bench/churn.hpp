// A neighbour that keeps the daemon busy: another process that makes and evicts large arrays.
#pragma once

#include <cstdint>
#include <string>
#include <sys/types.h>

#include "proto/unique_fd.hpp"

namespace cowmgr::bench {

// A process that, while running, creates arrays of `size_bytes`, seals and evicts them, one after the other.
class Churn {
 public:
  Churn(std::string socket, std::uint64_t size_bytes);
  ~Churn();
  Churn(const Churn&) = delete;
  Churn& operator=(const Churn&) = delete;

  void start();
  // Returns when the array under way is evicted; tells how many were made since start().
  std::uint64_t stop();

 private:
  UniqueFd control_;
  pid_t pid_ = -1;
};

}  // namespace cowmgr::bench
