// Whether a process will never go on: each of its threads waits for another of them.
//
// A fork has one thread, whatever its parent had. A library that used threads before the fork (OpenMP, for
// one) may wait in the child for threads that are not there, and nothing ends that wait.
#pragma once

#include <cstdint>
#include <optional>
#include <sys/types.h>

namespace cowmgr::detail {

// A number that changes when any of the threads runs; nothing while one may go on by itself, or where /proc
// does not tell. Twice the same number means that no thread ran in between, and that none ever will.
//
// A thread counts as one that cannot go on when it waits in futex(2), without a time limit, for memory that
// is its process's own: only a thread of the same process ends that. The library's own threads, which wait
// for the daemon, have nobody waiting for them.
[[nodiscard]] std::optional<std::uint64_t> deadlock_mark(pid_t pid);

// How many threads this process has, the library's own left out; 0 where /proc does not tell.
[[nodiscard]] std::uint32_t count_threads();

}  // namespace cowmgr::detail
