// What the library must know about fork(2): a child shares its parent's sockets and memory, but is not the
// process that the daemon gave them to.
#pragma once

#include <cstdint>
#include <mutex>

namespace cowmgr::detail {

// Grows in every forked child. Remember it, and compare: a difference means "I am a child of the process that
// made this".
[[nodiscard]] std::uint64_t fork_generation() noexcept;

// The one mutex of the library: it is held across fork(2), so that a child finds nothing locked, and the
// library's pools never half changed. Held for moments, never during a system call that may block. Any other
// may be another thread's at a fork, and is locked in the child for ever (tests/unit/layering_test.py).
[[nodiscard]] std::mutex& pool_mutex() noexcept;

// Sockets that a child must not keep open: the daemon would not see its parent's end of the connection.
// Registered ones are closed in every child, right after the fork; their numbers mean nothing there.
void close_in_children(int fd) noexcept;
void forget_fd(int fd) noexcept;

}  // namespace cowmgr::detail
