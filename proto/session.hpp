// The number of a session: who is behind it, for whoever finds the number in shared memory. Specified in
// README.md beside this file, "Sessions".
#pragma once

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <sys/types.h>

namespace cowmgr {

using SessionId = std::uint64_t;  // never used again; 0: no session

// The kernel's pids have 22 bits (PID_MAX_LIMIT of linux/threads.h); 53 in all are exact in a double too, for
// whoever reads JSON.
inline constexpr int kPidBits = 22;
inline constexpr int kSessionRandomBits = 31;

// `random`: kSessionRandomBits of it count; it makes the number one that no other process can foresee, and
// that no later session of a process with the same pid has.
[[nodiscard]] constexpr SessionId session_id(std::uint64_t random, pid_t pid) noexcept {
  return (random & ((std::uint64_t{1} << kSessionRandomBits) - 1)) << kPidBits | static_cast<SessionId>(pid);
}
// Whether it is a number that session_id() makes. All others may mean something inside a program: whatever
// comes from outside is asked this first.
[[nodiscard]] constexpr bool is_session_id(std::uint64_t number) noexcept {
  return number != 0 && number >> (kSessionRandomBits + kPidBits) == 0;
}
[[nodiscard]] constexpr pid_t pid_of(SessionId session) noexcept {
  return static_cast<pid_t>(session & ((SessionId{1} << kPidBits) - 1));
}

// Whether a process with that session's pid lives: if not, nobody can come back to the session.
[[nodiscard]] inline bool has_process(SessionId session) noexcept {
  return pid_of(session) > 0 && (::kill(pid_of(session), 0) == 0 || errno == EPERM);
}

}  // namespace cowmgr
