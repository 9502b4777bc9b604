// One holder per path, as long as nobody removes the file: how a daemon makes sure that it is the only one at
// its socket, where whoever serves already also answers; for its instance there is more (instance_lock.hpp).
#pragma once

#include <optional>
#include <string>
#include <sys/types.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// Holds an exclusive flock(2) on a file, which the kernel gives up when the process ends, however it ends.
// Removes the file when it goes. Move-only.
class LockFile {
 public:
  // Takes the lock, or refuses at once. Writes the process into the file, if that has room. Errors: busy with
  // the holder's pid, if it can be told; permission_denied; out_of_memory when there is no room for the file.
  [[nodiscard]] static Result<LockFile> acquire(std::string path);

  // The process that holds the lock, if one does, as /proc/locks tells (proc(5)). Touches no lock: a daemon
  // that starts at this moment is not disturbed.
  [[nodiscard]] static std::optional<pid_t> holder_of(const std::string& path);

  LockFile(LockFile&&) noexcept = default;
  LockFile& operator=(LockFile&&) = delete;  // would have to give up a lock first
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;
  ~LockFile();

 private:
  LockFile(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  std::string path_;
  UniqueFd fd_;
};

}  // namespace cowmgr
