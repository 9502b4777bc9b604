// How much memory a process takes, as the kernel counts it.
#pragma once

#include <cstdint>
#include <sys/types.h>

#include "proto/errors.hpp"

namespace cowmgr::knn {

struct MemoryUse {
  std::uint64_t rss_bytes = 0;      // all that is mapped and in memory, shared pages in full
  std::uint64_t pss_bytes = 0;      // the same, each page divided by the number of processes that map it
  std::uint64_t private_bytes = 0;  // what would be freed if the process ended
};

// From /proc/<pid>/smaps_rollup. Errors: not_found when there is no such process, permission_denied,
// os_failure.
[[nodiscard]] Result<MemoryUse> memory_use(pid_t pid);

}  // namespace cowmgr::knn
