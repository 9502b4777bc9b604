// What a program does first of all about its standard streams.
#pragma once

#include <fcntl.h>
#include <unistd.h>

namespace cowmgr {

// Where a caller closed a standard stream, the next file that is opened would get its number: a socket, or a
// lock file, and then our text. To be called before anything is opened. Writing to such a stream still fails.
inline void occupy_standard_streams() noexcept {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(fd, F_GETFD) < 0) static_cast<void>(::open("/dev/null", O_RDONLY));
  }
}

}  // namespace cowmgr
