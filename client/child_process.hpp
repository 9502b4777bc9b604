// Programs that this process starts as children.
#pragma once

#include <string>
#include <sys/types.h>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr::detail {

// A descriptor that a program gets, under the number `its`: below 10.
struct Handed {
  int ours;
  int its;
};

// Starts `arguments`, the program first: a path, or a name in $PATH. It has our environment, none of the
// signals that we block, and of our descriptors these beside those that are not closed at exec. Errors:
// not_found when there is no such program, os_failure.
[[nodiscard]] Result<pid_t> spawn(std::vector<std::string> arguments, const std::vector<Handed>& descriptors);

// waitpid(2), again when a signal interrupts it.
pid_t wait_for(pid_t pid, int& status, int flags = 0) noexcept;

// "ended with exit status 1", "was killed by signal 9 (Killed)": of what wait_for() gave.
[[nodiscard]] std::string end_in_words(int status);

}  // namespace cowmgr::detail
