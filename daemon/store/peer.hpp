// Who asks: the process behind a connection, as the kernel says, and what it may do.
#pragma once

#include <cstdint>
#include <string>
#include <sys/types.h>
#include <vector>

#include "proto/session.hpp"

namespace cowmgr {

struct Peer {
  pid_t pid = 0;
  uid_t uid = 0;
  gid_t gid = 0;
  std::vector<gid_t> groups{};
};

// Owner and permission bits of an array, read as for a file (path_resolution(7)): the owner's bits if the
// peer is the owner, else the group's if it is in the group, else the others'.
struct Ownership {
  uid_t uid = 0;
  gid_t gid = 0;
  std::uint32_t mode = 0;  // 0 to 0777; execute bits mean nothing
};

enum class Right : std::uint32_t { write = 02, read = 04 };

// `admin` is the daemon's own user; it and root may do everything.
[[nodiscard]] bool is_allowed(const Peer& peer, const Ownership& owned, Right right, uid_t admin) noexcept;

// What became of a process whose connection ended, in words: "process 12 was killed by signal 9 (Killed)",
// "process 12 exited with 3", "process 12 went away". As far as /proc still tells (proc(5)), or, once its
// parent has waited for it, the pidfd (-1: none), which tells since Linux 6.15.
[[nodiscard]] std::string end_of(pid_t pid, int pidfd = -1);

}  // namespace cowmgr
