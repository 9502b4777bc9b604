#include "client/pool/deadlock.hpp"

#include <filesystem>
#include <fstream>
#include <linux/futex.h>
#include <sstream>
#include <string>
#include <string_view>
#include <sys/syscall.h>
#include <system_error>

#include <fmt/format.h>

#include "client/own_thread.hpp"

namespace cowmgr::detail {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// The system call that a thread waits in, from /proc/<pid>/task/<tid>/syscall: its number and arguments, or
// "running", or "-1" outside of any. As proc(5) says, only who may trace the process can read it: its parent
// can, unless the process changed its user.
struct Call {
  long number = -1;
  std::uint64_t arguments[6] = {};
};
Call call_of(const fs::path& task) {
  std::istringstream in(first_line(task / "syscall"));
  Call call;
  if (!(in >> call.number)) return {};
  in >> std::hex;
  for (std::uint64_t& argument : call.arguments) in >> argument;
  return call;
}

// futex(uaddr, op, val, timeout, ...) without a timeout, in memory that is not shared with other processes.
bool waits_for_a_sibling(const Call& call) {
  if (call.number != SYS_futex || (call.arguments[1] & FUTEX_PRIVATE_FLAG) == 0) return false;
  const auto operation = static_cast<int>(call.arguments[1]) & FUTEX_CMD_MASK;
  const bool is_wait = operation == FUTEX_WAIT || operation == FUTEX_WAIT_BITSET ||
                       operation == FUTEX_LOCK_PI || operation == FUTEX_WAIT_REQUEUE_PI;
  return is_wait && call.arguments[3] == 0;
}

bool is_poll(const Call& call) {
#ifdef SYS_poll
  if (call.number == SYS_poll) return true;
#endif
  return call.number == SYS_ppoll;
}

// From /proc/<pid>/task/<tid>/status; nothing when the thread has ended.
std::optional<std::uint64_t> switches_of(const fs::path& task) {
  std::ifstream in(task / "status");
  std::uint64_t sum = 0;
  int found = 0;
  for (std::string word; in >> word;) {
    std::uint64_t count = 0;
    if (word != "voluntary_ctxt_switches:" && word != "nonvoluntary_ctxt_switches:") continue;
    if (in >> count) ++found;
    sum += count;
  }
  return found == 2 ? std::optional(sum) : std::nullopt;
}

}  // namespace

std::optional<std::uint64_t> deadlock_mark(pid_t pid) {
  const fs::path process = fmt::format("/proc/{}/task", pid);
  // The first thread alone tells of nearly every process that it goes on.
  if (!waits_for_a_sibling(call_of(process / std::to_string(pid)))) return std::nullopt;
  std::uint64_t mark = 0;
  std::error_code error;
  fs::directory_iterator tasks(process, error);
  for (; !error && tasks != fs::directory_iterator(); tasks.increment(error)) {
    const fs::path& task = tasks->path();
    const Call call = call_of(task);
    if (is_poll(call) && first_line(task / "comm") == kThreadName) continue;
    if (!waits_for_a_sibling(call)) return std::nullopt;
    const auto switches = switches_of(task);
    if (!switches) return std::nullopt;
    mark += *switches;
  }
  if (error) return std::nullopt;
  return mark;
}

std::uint32_t count_threads() {
  std::uint32_t count = 0;
  std::error_code error;
  fs::directory_iterator tasks("/proc/self/task", error);
  for (; !error && tasks != fs::directory_iterator(); tasks.increment(error)) {
    if (first_line(tasks->path() / "comm") != kThreadName) ++count;
  }
  return count;
}

}  // namespace cowmgr::detail
