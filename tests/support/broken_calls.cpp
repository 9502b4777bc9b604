// What stands between `cowmgr-broken` and the kernel; see broken_calls.hpp.
//
// 1. `ld --wrap=NAME` sends every call of NAME in the daemon's object files to wrap_NAME here, and real_NAME
// to
//    the library: what Boost's headers call is among them, what shared libraries call is not.
// 2. A call counts when its path or the file behind its descriptor is a segment of the instance, whichever
// part of
//    the daemon makes it; the lock file is none. Advice on memory is given to segments alone. So the numbers
//    do not depend on what others do.
// 3. std::filesystem reads the directory of the segments inside libstdc++. The dynamic linker looks for its
//    fdopendir() and readdir() in the program first, and finds those here. Of what is read, segments count,
//    and the end.
#include "tests/support/broken_calls.hpp"

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

using cowmgr::test::BreakPage;

extern "C" {
void* real_mmap(void*, std::size_t, int, int, int, off_t) __asm__("__real_mmap");
void* wrap_mmap(void*, std::size_t, int, int, int, off_t) __asm__("__wrap_mmap");
int real_madvise(void*, std::size_t, int) __asm__("__real_madvise");
int wrap_madvise(void*, std::size_t, int) __asm__("__wrap_madvise");
int real_shm_open(const char*, int, mode_t) __asm__("__real_shm_open");
int wrap_shm_open(const char*, int, mode_t) __asm__("__wrap_shm_open");
int real_shm_unlink(const char*) __asm__("__real_shm_unlink");
int wrap_shm_unlink(const char*) __asm__("__wrap_shm_unlink");
int real_rename(const char*, const char*) __asm__("__real_rename");
int wrap_rename(const char*, const char*) __asm__("__wrap_rename");
int real_statvfs(const char*, struct statvfs*) __asm__("__real_statvfs");
int wrap_statvfs(const char*, struct statvfs*) __asm__("__wrap_statvfs");
int real_ftruncate(int, off_t) __asm__("__real_ftruncate");
int wrap_ftruncate(int, off_t) __asm__("__wrap_ftruncate");
int real_fallocate(int, int, off_t, off_t) __asm__("__real_fallocate");
int wrap_fallocate(int, int, off_t, off_t) __asm__("__wrap_fallocate");
int real_fcntl(int, int, ...) __asm__("__real_fcntl");
int wrap_fcntl(int, int, ...) __asm__("__wrap_fcntl");
int real_dup(int) __asm__("__real_dup");
int wrap_dup(int) __asm__("__wrap_dup");
int real_fchmod(int, mode_t) __asm__("__real_fchmod");
int wrap_fchmod(int, mode_t) __asm__("__wrap_fchmod");
int real_fstat(int, struct stat*) __asm__("__real_fstat");
int wrap_fstat(int, struct stat*) __asm__("__wrap_fstat");
ssize_t real_pread(int, void*, std::size_t, off_t) __asm__("__real_pread");
ssize_t wrap_pread(int, void*, std::size_t, off_t) __asm__("__wrap_pread");
ssize_t real_pwrite(int, const void*, std::size_t, off_t) __asm__("__real_pwrite");
ssize_t wrap_pwrite(int, const void*, std::size_t, off_t) __asm__("__wrap_pwrite");
int real_getsockopt(int, int, int, void*, socklen_t*) __asm__("__real_getsockopt");
int wrap_getsockopt(int, int, int, void*, socklen_t*) __asm__("__wrap_getsockopt");
int real_setsockopt(int, int, int, const void*, socklen_t) __asm__("__real_setsockopt");
int wrap_setsockopt(int, int, int, const void*, socklen_t) __asm__("__wrap_setsockopt");
}

namespace {

constexpr std::string_view kDirectory = "/dev/shm";
constexpr std::string_view kLock = ".lock";
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ: Linux 5.14
constexpr int kCollapse = 25;      // MADV_COLLAPSE: Linux 6.1, newer than Debian 12's libc

BreakPage* find_page() noexcept {
  const char* number = std::getenv(cowmgr::test::kBreakVariable);
  if (number == nullptr) return nullptr;
  void* page =
      real_mmap(nullptr, sizeof(BreakPage), PROT_READ | PROT_WRITE, MAP_SHARED, std::atoi(number), 0);
  return page == MAP_FAILED ? nullptr : static_cast<BreakPage*>(page);
}

BreakPage* the_page() noexcept {
  static BreakPage* const page = find_page();
  return page;
}

// Counts a call. Whether it is to fail; errno says with what.
bool breaks(const char* name) noexcept {
  BreakPage* page = the_page();
  if (page == nullptr) return false;
  const std::uint64_t call = ++page->calls;
  if (call == page->broken_call) {
    std::strncpy(page->name.data(), name, page->name.size() - 1);
    page->has_failed = true;
  } else if (page->broken_call == 0 || !page->lasts || !page->has_failed ||
             std::strcmp(page->name.data(), name) != 0 || std::strcmp(name, "shm_unlink") == 0) {
    return false;
  }
  errno = page->error;
  return true;
}

bool is_segment(std::string_view name) noexcept {
  const BreakPage* page = the_page();
  return page != nullptr && name.starts_with(page->segments.data()) && !name.ends_with(kLock);
}

bool is_segment_path(std::string_view path) noexcept {
  return path.starts_with(kDirectory) && is_segment(path.substr(kDirectory.size()));
}

// Where the descriptor leads; a segment without a name has " (deleted)" behind it.
class Link {
 public:
  explicit Link(int fd) noexcept {
    const int error = errno;
    std::array<char, 32> path{};
    std::snprintf(path.data(), path.size(), "/proc/self/fd/%d", fd);
    const auto count = ::readlink(path.data(), text_.data(), text_.size());
    size_ = count > 0 ? static_cast<std::size_t>(count) : 0;
    errno = error;
  }
  [[nodiscard]] std::string_view path() const noexcept { return {text_.data(), size_}; }

 private:
  std::array<char, 512> text_{};
  std::size_t size_ = 0;
};

bool is_segment(int fd) noexcept {
  return is_segment_path(Link(fd).path());
}

const char* name_of_command(int command) noexcept {
  switch (command) {
    case F_SETLEASE:
      return "fcntl(F_SETLEASE)";
    case F_GETLEASE:
      return "fcntl(F_GETLEASE)";
    case F_SETSIG:
      return "fcntl(F_SETSIG)";
    case F_DUPFD_CLOEXEC:
      return "fcntl(F_DUPFD_CLOEXEC)";
    default:
      return "fcntl";
  }
}

const char* name_of_advice(int advice) noexcept {
  switch (advice) {
    case MADV_DONTFORK:
      return "madvise(MADV_DONTFORK)";
    case kPopulateRead:
      return "madvise(MADV_POPULATE_READ)";
    case kCollapse:
      return "madvise(MADV_COLLAPSE)";
    default:
      return "madvise";
  }
}

// Whether the kernel is to be one that does not know that option: SO_PASSRIGHTS, Linux 6.16.
bool is_unknown(int level, int option) noexcept {
  constexpr int kPassRights = 83;
  return level == SOL_SOCKET && option == kPassRights &&
         std::getenv(cowmgr::test::kPassesRightsVariable) != nullptr;
}

// The function of that name that would be called if it were not here.
template <class Function>
Function* next(const char* name) noexcept {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void* wrap_mmap(void* address, std::size_t length, int protection, int flags, int fd, off_t offset) {
  if (fd >= 0 && is_segment(fd) && breaks("mmap")) return MAP_FAILED;
  return real_mmap(address, length, protection, flags, fd, offset);
}

int wrap_madvise(void* address, std::size_t length, int advice) {
  return breaks(name_of_advice(advice)) ? -1 : real_madvise(address, length, advice);
}

int wrap_shm_open(const char* name, int flags, mode_t mode) {
  return is_segment(name) && breaks("shm_open") ? -1 : real_shm_open(name, flags, mode);
}

int wrap_shm_unlink(const char* name) {
  return is_segment(name) && breaks("shm_unlink") ? -1 : real_shm_unlink(name);
}

int wrap_rename(const char* from, const char* to) {
  return is_segment_path(from) && breaks("rename") ? -1 : real_rename(from, to);
}

int wrap_statvfs(const char* path, struct statvfs* info) {
  return path == kDirectory && breaks("statvfs") ? -1 : real_statvfs(path, info);
}

int wrap_ftruncate(int fd, off_t length) {
  return is_segment(fd) && breaks("ftruncate") ? -1 : real_ftruncate(fd, length);
}

int wrap_fallocate(int fd, int mode, off_t offset, off_t length) {
  return is_segment(fd) && breaks("fallocate") ? -1 : real_fallocate(fd, mode, offset, length);
}

// The third argument, if there is any, is an int or a pointer; the library itself takes it for a pointer.
int wrap_fcntl(int fd, int command, ...) {
  std::va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  return is_segment(fd) && breaks(name_of_command(command)) ? -1 : real_fcntl(fd, command, argument);
}

int wrap_dup(int fd) {
  return is_segment(fd) && breaks("dup") ? -1 : real_dup(fd);
}

int wrap_fchmod(int fd, mode_t mode) {
  return is_segment(fd) && breaks("fchmod") ? -1 : real_fchmod(fd, mode);
}

int wrap_fstat(int fd, struct stat* info) {
  return is_segment(fd) && breaks("fstat") ? -1 : real_fstat(fd, info);
}

ssize_t wrap_pread(int fd, void* bytes, std::size_t count, off_t offset) {
  return is_segment(fd) && breaks("pread") ? -1 : real_pread(fd, bytes, count, offset);
}

ssize_t wrap_pwrite(int fd, const void* bytes, std::size_t count, off_t offset) {
  return is_segment(fd) && breaks("pwrite") ? -1 : real_pwrite(fd, bytes, count, offset);
}

int wrap_getsockopt(int socket, int level, int option, void* value, socklen_t* bytes) {
  if (!is_unknown(level, option)) return real_getsockopt(socket, level, option, value, bytes);
  errno = ENOPROTOOPT;
  return -1;
}

int wrap_setsockopt(int socket, int level, int option, const void* value, socklen_t bytes) {
  if (!is_unknown(level, option)) return real_setsockopt(socket, level, option, value, bytes);
  errno = ENOPROTOOPT;
  return -1;
}

DIR* fdopendir(int fd) {
  static auto* const real = next<DIR*(int)>("fdopendir");
  return Link(fd).path() == kDirectory && breaks("fdopendir") ? nullptr : real(fd);
}

dirent* readdir(DIR* directory) {
  static auto* const real = next<dirent*(DIR*)>("readdir");
  dirent* entry = real(directory);
  const bool counts = entry == nullptr || is_segment(std::string("/") + entry->d_name);
  if (!counts || Link(::dirfd(directory)).path() != kDirectory) return entry;
  return breaks("readdir") ? nullptr : entry;
}
}
