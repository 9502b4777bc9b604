#include "daemon/peer.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <sstream>
#include <sys/wait.h>

#include <fmt/format.h>

namespace cowmgr {
namespace {

constexpr int kExitCodeField = 52;  // of /proc/<pid>/stat, counted from 1

// As waitpid(2) gives it; 0 also when the process has not ended, or is gone. The kernel sets it before it
// closes the descriptors of a process that ends (kernel/exit.c, do_exit).
int wait_status_of(pid_t pid) {
  std::ifstream in(fmt::format("/proc/{}/stat", pid));
  std::string line;
  std::getline(in, line);
  // The second field is the command in parentheses, which may itself hold spaces and parentheses.
  const auto command_end = line.rfind(')');
  if (command_end == std::string::npos) return 0;
  std::istringstream fields(line.substr(command_end + 1));
  std::string field;
  for (int number = 3; number <= kExitCodeField; ++number) fields >> field;
  return fields ? std::atoi(field.c_str()) : 0;
}

}  // namespace

std::string end_of(pid_t pid) {
  const int status = wait_status_of(pid);
  if (WIFSIGNALED(status)) {
    const int number = WTERMSIG(status);
    const char* name = ::sigdescr_np(number);
    return fmt::format("process {} was killed by signal {} ({})", pid, number, name == nullptr ? "?" : name);
  }
  if (WEXITSTATUS(status) != 0) return fmt::format("process {} exited with {}", pid, WEXITSTATUS(status));
  return fmt::format("process {} went away", pid);
}

bool is_allowed(const Peer& peer, const Ownership& owned, Right right, uid_t admin) noexcept {
  if (peer.uid == 0 || peer.uid == admin) return true;
  const bool is_member = peer.gid == owned.gid ||
                         std::find(peer.groups.begin(), peer.groups.end(), owned.gid) != peer.groups.end();
  const unsigned shift = peer.uid == owned.uid ? 6 : is_member ? 3 : 0;
  return (owned.mode >> shift & static_cast<std::uint32_t>(right)) != 0;
}

}  // namespace cowmgr
