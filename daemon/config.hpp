// What can be set from outside: flags, environment, configuration file. All of it, and the defaults, in
// config.cpp; `cowmgr --help` prints it.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "daemon/shm/cgroup.hpp"
#include "daemon/store/charges.hpp"
#include "proto/errors.hpp"

namespace cowmgr {

struct Config {
  std::string socket;                // path; its directory must exist, or is made if it is the default one
  std::string instance = "default";  // names the segments: /dev/shm/cowmgr.<instance>.<id>
  std::uint64_t capacity_bytes = 0;  // of all segments together; default: 80 % of what /dev/shm can hold,
                                     // or of the memory that the process's control groups may use
  std::string log_level = "info";
  bool needs_verified = false;  // refuse to start where the kernel gives no leases
  int socket_mode = 0666;       // who may connect; what they may do is decided for each array
  QuotaLimits quota{.owner_arrays = 0, .owner_sessions = 0};  // 0: as many as open files allow
  bool purge =
      false;  // arrays go with the daemon; default: they stay in memory for the next one of the instance
  std::chrono::seconds grace{10};  // for which the next daemon keeps what a process was writing or had leased
  bool fd_store = false;           // descriptors of sealed arrays go to the service manager too
  std::string cgroup_root = kCgroupRoot;  // where control groups are mounted; tests make them up
  int parent_fd = -1;  // embedded: one byte is written here when ready, and its end stops the daemon
};

// Reads the command line, then environment and file for what it leaves open. Returns the exit status where
// the program is to end at once: 0 after --help and --version, 2 for wrong usage.
[[nodiscard]] std::optional<int> parse_config(int argc, char** argv, Config& config);

}  // namespace cowmgr
