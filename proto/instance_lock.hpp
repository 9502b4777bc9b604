// One daemon for each instance, whatever happens to the files in shared memory.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <sys/types.h>

#include "proto/directory_lock.hpp"
#include "proto/errors.hpp"
#include "proto/lock_file.hpp"

namespace cowmgr {

inline constexpr const char* kShmDirectory = "/dev/shm";  // where glibc's shm_open(3) puts its objects

// Holds the file /dev/shm/cowmgr.<instance>.lock, where people and older daemons look, and the same name in
// the directory itself, which nobody can remove. Where one of the two cannot be had, for want of room or of a
// kernel that knows it, the other one alone. Move-only.
class InstanceLock {
 public:
  // Errors: busy with the holder's pid, if it can be seen; others with a sentence that says what is wrong
  // with the directory, and the cure.
  [[nodiscard]] static Result<InstanceLock> acquire(std::string_view instance,
                                                    const std::string& directory = kShmDirectory);

  // The process that holds the instance, if one does; 0: it cannot be seen from here. Touches no lock: a
  // daemon that starts at this moment is not disturbed.
  [[nodiscard]] static std::optional<pid_t> holder_of(std::string_view instance,
                                                      const std::string& directory = kShmDirectory);

 private:
  InstanceLock(std::optional<LockFile> file, std::optional<DirectoryLock> name)
      : file_(std::move(file)), name_(std::move(name)) {}

  std::optional<LockFile> file_;
  std::optional<DirectoryLock> name_;
};

}  // namespace cowmgr
