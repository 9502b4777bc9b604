#include "proto/lock_file.hpp"

#include <array>
#include <cerrno>
#include <fcntl.h>
#include <fstream>
#include <sstream>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

namespace cowmgr {
namespace {

// Whether `path` still names the file behind `fd`: its last holder removes it before it lets the lock go.
bool is_current(const std::string& path, int fd) {
  struct stat by_path {};
  struct stat by_fd {};
  return ::stat(path.c_str(), &by_path) == 0 && ::fstat(fd, &by_fd) == 0 && by_path.st_ino == by_fd.st_ino &&
         by_path.st_dev == by_fd.st_dev;
}

// As the kernel says, else as the file does: of a process in another pid namespace /proc/locks does not tell.
std::string holder_in_words(const std::string& path, int fd) {
  if (const auto pid = LockFile::holder_of(path)) return fmt::format("process {}", *pid);
  std::array<char, 32> text{};
  const auto count = ::pread(fd, text.data(), text.size(), 0);
  if (count <= 0) return "a process that cannot be seen from here";
  return "process " + std::string(text.data(), static_cast<std::size_t>(count));
}

// For people who look into the file, and no more: a file system that is full takes no byte of it.
void write_pid(int fd) {
  const std::string pid = fmt::format("{}", ::getpid());
  if (::ftruncate(fd, 0) == 0) (void)!::pwrite(fd, pid.data(), pid.size(), 0);
}

}  // namespace

Result<LockFile> LockFile::acquire(std::string path) {
  for (;;) {
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return tl::unexpected(os_error("open", path, errno));
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno == EINTR) continue;
      if (errno != EWOULDBLOCK) return tl::unexpected(os_error("flock", path, errno));
      return fail(Errc::busy, fmt::format("{} is held by {}", path, holder_in_words(path, fd.get())));
    }
    if (!is_current(path, fd.get())) continue;
    write_pid(fd.get());
    return LockFile(std::move(path), std::move(fd));
  }
}

// "3: FLOCK  ADVISORY  WRITE 1234 00:17:5678 0 EOF": the process, then the file by device and inode.
std::optional<pid_t> LockFile::holder_of(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return std::nullopt;
  std::ifstream locks("/proc/locks");
  for (std::string line; std::getline(locks, line);) {
    std::istringstream fields(line);
    std::string number;
    std::string kind;
    std::string manner;
    std::string access;
    std::string file;
    pid_t pid = 0;
    if (!(fields >> number >> kind >> manner >> access >> pid >> file) || kind != "FLOCK") continue;
    if (file.ends_with(fmt::format(":{}", info.st_ino))) return pid;
  }
  return std::nullopt;
}

LockFile::~LockFile() {
  if (fd_ && is_current(path_, fd_.get())) ::unlink(path_.c_str());
}

}  // namespace cowmgr
