// A lock on a name that needs no file of that name: what is removed from the directory does not end it.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <sys/types.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// Holds one byte of the directory's own inode, far behind its end and chosen by the name, with an open file
// description lock (fcntl(2), F_OFD_SETLK), which the kernel gives up when the process ends, however it ends.
// Whoever uses the same directory, in whichever mount namespace, asks for the same byte. Move-only.
//
// 1. A directory cannot be opened for writing, and a write lock needs that: so all take a read lock, and
//    whoever has one asks whether somebody else has another (F_OFD_GETLK, which needs no right but the
//    descriptor). A holder took its lock first and saw no other then: of two, the later one sees the earlier.
// 2. Two that see each other let go, and try again after pauses of random length. Whoever has it does not let
//    go.
// 3. Whoever may read the directory can take such a lock, and so keep a name from being taken: no right to
//    what it stands for comes with it.
class DirectoryLock {
 public:
  // Takes the name, or refuses within about 0.3 s. Errors: busy; unsupported where kernel or file system know
  // no such locks; not_found, permission_denied, os_failure of the directory.
  [[nodiscard]] static Result<DirectoryLock> acquire(const std::string& directory, std::string_view name);

  // The process that holds the name, if one does: 0 when it cannot be seen from here, since it is another
  // user's, or has no number in this pid namespace. Touches no lock. Reads /proc of every process when there
  // is a holder.
  [[nodiscard]] static std::optional<pid_t> holder_of(const std::string& directory, std::string_view name);

 private:
  explicit DirectoryLock(UniqueFd fd) : fd_(std::move(fd)) {}

  UniqueFd fd_;
};

}  // namespace cowmgr
