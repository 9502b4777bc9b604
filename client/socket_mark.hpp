// Which socket a descriptor is. A program may close a descriptor that is not its own, or open another file at
// its number: whatever is done with the number after that would be done to the program's file.
#pragma once

#include <sys/stat.h>

namespace cowmgr::detail {

class SocketMark {
 public:
  // Of what `fd` is now; of a number that is none, nothing.
  explicit SocketMark(int fd) noexcept {
    struct stat now {};
    if (fd < 0 || ::fstat(fd, &now) != 0) return;
    device_ = now.st_dev;
    inode_ = now.st_ino;  // each socket has one of its own
  }
  [[nodiscard]] bool is_still(int fd) const noexcept {
    const SocketMark now(fd);
    return inode_ != 0 && now.inode_ == inode_ && now.device_ == device_;
  }

 private:
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace cowmgr::detail
