#include "proto/directory_lock.hpp"

#include <cerrno>
#include <charconv>
#include <chrono>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <sys/stat.h>
#include <thread>

#include <fmt/format.h>

#include "proto/checksum.hpp"

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

constexpr int kTries = 24;           // each needs both to have taken it at the same moment
constexpr int kLongestPauseMs = 20;  // a try takes microseconds
constexpr unsigned kPlaceBits = 62;  // the last byte of the range is one that off_t can name

// Where in the directory the name's byte lies.
off_t place_of(std::string_view name) {
  return static_cast<off_t>(checksum_of(std::as_bytes(std::span(name))) >> (64 - kPlaceBits));
}

UniqueFd open_directory(const std::string& directory) {
  return UniqueFd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

struct flock byte_at(off_t place, short type) {
  struct flock byte {};  // its l_pid must be 0
  byte.l_type = type;
  byte.l_whence = SEEK_SET;
  byte.l_start = place;
  byte.l_len = 1;
  return byte;
}

bool set_lock(int fd, off_t place, short type) {
  struct flock byte = byte_at(place, type);
  int rc = 0;
  do rc = ::fcntl(fd, F_OFD_SETLK, &byte);
  while (rc != 0 && errno == EINTR);
  return rc == 0;
}

// Whether another open file description has the byte. What cannot be asked counts as held.
bool is_held_by_others(int fd, off_t place) {
  struct flock byte = byte_at(place, F_WRLCK);
  return ::fcntl(fd, F_OFD_GETLK, &byte) != 0 || byte.l_type != F_UNLCK;
}

void pause_for_a_random_time() {
  static thread_local std::minstd_rand random{std::random_device{}()};
  std::this_thread::sleep_for(
      std::chrono::milliseconds(std::uniform_int_distribution<int>(1, kLongestPauseMs)(random)));
}

// The end of the line that a descriptor's lock has in fdinfo (proc(5)), from the inode on:
// "lock: 1: OFDLCK  ADVISORY  READ -1 00:1b:1 4611686018427387899 4611686018427387899".
std::string lock_text(const struct stat& directory, off_t place) {
  return fmt::format(":{} {} {}", directory.st_ino, place, place);
}

// /proc/locks says -1 for the process.
bool has_lock(const fs::path& process, const std::string& lock) {
  std::error_code ignored;
  for (const auto& fdinfo : fs::directory_iterator(process / "fdinfo", ignored)) {
    std::ifstream in(fdinfo.path());
    for (std::string line; std::getline(in, line);) {
      if (line.find("OFDLCK") != std::string::npos && line.ends_with(lock)) return true;
    }
  }
  return false;
}

pid_t find_holder(int fd, off_t place) {
  struct stat directory {};
  if (::fstat(fd, &directory) != 0) return 0;
  const std::string lock = lock_text(directory, place);
  std::error_code ignored;
  for (const auto& process : fs::directory_iterator("/proc", ignored)) {
    const std::string text = process.path().filename();
    const char* const end = text.data() + text.size();
    pid_t pid = 0;
    if (std::from_chars(text.data(), end, pid).ptr == end && has_lock(process.path(), lock)) return pid;
  }
  return 0;
}

}  // namespace

Result<DirectoryLock> DirectoryLock::acquire(const std::string& directory, std::string_view name) {
  UniqueFd fd = open_directory(directory);
  if (!fd) return tl::unexpected(os_error("open", directory, errno));
  const off_t place = place_of(name);
  for (int tries = 0; tries < kTries; ++tries) {
    if (tries > 0) pause_for_a_random_time();
    if (!set_lock(fd.get(), place, F_RDLCK)) {
      const int error = errno;
      if (error == EINVAL || error == ENOSYS || error == EOPNOTSUPP)
        return cowmgr::fail(Errc::unsupported, fmt::format("{} takes no locks", directory));
      return tl::unexpected(os_error("fcntl(F_OFD_SETLK)", directory, error));
    }
    if (!is_held_by_others(fd.get(), place)) return DirectoryLock(std::move(fd));
    set_lock(fd.get(), place, F_UNLCK);
  }
  const pid_t holder = find_holder(fd.get(), place);
  return cowmgr::fail(
      Errc::busy,
      fmt::format("the name {} is held in {} by {}", name, directory,
                  holder != 0
                      ? fmt::format("process {}", holder)
                      : "a process that cannot be seen from here, of another user or another container"));
}

std::optional<pid_t> DirectoryLock::holder_of(const std::string& directory, std::string_view name) {
  const UniqueFd fd = open_directory(directory);
  const off_t place = place_of(name);
  struct flock byte = byte_at(place, F_WRLCK);
  if (!fd || ::fcntl(fd.get(), F_OFD_GETLK, &byte) != 0 || byte.l_type == F_UNLCK) return std::nullopt;
  return find_holder(fd.get(), place);
}

}  // namespace cowmgr
