#include "daemon/store/peer.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <linux/ioctl.h>
#include <sstream>
#include <sys/ioctl.h>
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

// struct pidfd_info of linux/pidfd.h, which is newer than Debian 12's headers.
struct PidfdInfo {
  std::uint64_t mask;
  std::array<std::uint32_t, 13> others;  // a cgroup's id, ids of processes and users
  std::int32_t exit_code;                // as waitpid(2) gives it
};
static_assert(sizeof(PidfdInfo) == 64);
constexpr std::uint64_t kExitInfo = 8;  // PIDFD_INFO_EXIT: told once the process was waited for
constexpr unsigned long kGetInfo = _IOWR(0xFF, 11, PidfdInfo);

int wait_status_of_reaped(int pidfd) {
  PidfdInfo info{.mask = kExitInfo, .others = {}, .exit_code = 0};
  if (pidfd < 0 || ::ioctl(pidfd, kGetInfo, &info) != 0 || (info.mask & kExitInfo) == 0) return 0;
  return info.exit_code;
}

}  // namespace

std::string end_of(pid_t pid, int pidfd) {
  // In this order: it may be waited for at any moment, which makes one silent and lets the other speak.
  int status = wait_status_of(pid);
  if (status == 0) status = wait_status_of_reaped(pidfd);
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
