// How much memory the control groups of this process leave it. What passes the limit of a group is not
// refused by the kernel: a process of the group is killed.
//
// A process is in one group, which lies in another, up to the root of the hierarchy. Each may have a limit,
// and counts what all below it use: memory.max and memory.high of cgroup v2, memory.limit_in_bytes of v1.
// Segments count for the daemon, which touches their pages first.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr {

inline constexpr const char* kCgroupRoot = "/sys/fs/cgroup";

// Thread-safe: no state changes after the constructor.
class MemoryGroups {
 public:
  // `root` is where the hierarchies are mounted, `own` tells the groups of this process, as /proc/self/cgroup
  // does. What cannot be read there limits nothing. Where a container shows its own group as the root, that
  // is looked at.
  explicit MemoryGroups(const std::filesystem::path& root = kCgroupRoot,
                        const std::filesystem::path& own = "/proc/self/cgroup");

  struct Room {
    std::uint64_t limit_bytes = UINT64_MAX;  // no limit
    std::uint64_t left_bytes = UINT64_MAX;   // what the limit leaves, with what the kernel would drop for it
    std::string group{};                     // its directory
  };
  // The group with the lowest limit. Reads files.
  [[nodiscard]] Room lowest_limit() const;
  // The group that leaves least now. Reads files.
  [[nodiscard]] Room least_left() const;

 private:
  [[nodiscard]] std::vector<Room> rooms() const;

  std::vector<std::filesystem::path> groups_{};  // from the process's own up to the root
  bool is_v2_ = false;
};

// Says whether the next piece of memory may be touched, for work that touches much of it piece by piece.
class GroupBudget {
 public:
  GroupBudget(const MemoryGroups& groups, std::uint64_t needed_bytes)
      : groups_(groups), needed_bytes_(needed_bytes) {}

  // Looks at the groups the first time, for all that is needed, and then as often as what they leave may be
  // gone meanwhile. Errors: out_of_memory, with what they leave.
  [[nodiscard]] Result<void> take(std::uint64_t size_bytes);

 private:
  const MemoryGroups& groups_;
  std::uint64_t needed_bytes_;       // from now on
  std::uint64_t granted_bytes_ = 0;  // without another look
};

}  // namespace cowmgr
