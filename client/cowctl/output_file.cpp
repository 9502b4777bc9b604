#include "client/cowctl/output_file.hpp"

#include <array>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <memory>
#include <stdio.h>  // NOLINT(modernize-deprecated-headers): renameat2 is not in <cstdio>
#include <sys/stat.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

constexpr mode_t kFileMode = 0666;     // less the umask, as for any new file
constexpr mode_t kPrivateMode = 0600;  // until the file has the mode of what it takes the place of
constexpr const char* kStandardOutput = "standard output";
constexpr std::array<int, 3> kEndingSignals = {SIGINT, SIGTERM, SIGHUP};

tl::unexpected<Error> os_fail(std::string_view what, const std::string& path, int number) {
  Error error = os_error(what, printable(path), number);
  if (error.code == Errc::out_of_memory) error.code = Errc::os_failure;  // that is a want of room for arrays
  if (number == ENOSPC || number == EDQUOT) error.message += "; free space there, or name a file elsewhere";
  return tl::unexpected<Error>(std::move(error));
}

tl::unexpected<Error> exists(const std::string& path) {
  return fail(Errc::already_exists,
              fmt::format("the file {} exists; overwrite it with --force", printable(path)));
}

// The partial file that a signal must remove; empty when there is none. A handler has no other way to know.
std::array<char, PATH_MAX>& doomed_path() noexcept {
  static constinit std::array<char, PATH_MAX> path{};
  return path;
}

extern "C" void remove_partial_file(int signal) {
  ::unlink(doomed_path().data());
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

void remove_on_signal(const std::string& path) {
  if (path.size() >= doomed_path().size()) return;
  path.copy(doomed_path().data(), path.size());
  for (const int number : kEndingSignals) {
    // What was ignored stays ignored: nohup.
    if (std::signal(number, remove_partial_file) == SIG_IGN) static_cast<void>(std::signal(number, SIG_IGN));
  }
}

void keep_on_signal() noexcept {
  doomed_path().front() = '\0';
}

std::string directory_of(const std::string& path) {
  const auto directory = std::filesystem::path(path).parent_path().native();
  return directory.empty() ? "." : directory;
}

// A symbolic link stays one: the file behind it is replaced.
std::string resolved(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr), &std::free);
  return real ? real.get() : path;
}

// A name that no other process uses now, in the directory of `path`.
std::string partial_name(const std::string& path) {
  return fmt::format("{}/.cowctl-{}.partial", directory_of(path), ::getpid());
}

bool has_unnamed_files(int open_error) noexcept {
  return open_error != EOPNOTSUPP && open_error != EISDIR && open_error != EINVAL;
}

// The owner too where we may give the file away. Where not even its group can be kept, that of ours may do no
// more than all others.
bool take_over_mode(int fd, const struct stat& replaced) {
  constexpr mode_t kAll = 0777;
  constexpr mode_t kGroup = 070;
  mode_t mode = replaced.st_mode & kAll;
  const bool has_group = ::fchown(fd, replaced.st_uid, replaced.st_gid) == 0 ||
                         ::fchown(fd, static_cast<uid_t>(-1), replaced.st_gid) == 0;
  if (!has_group) mode &= ~kGroup | (mode << 3U);
  return ::fchmod(fd, mode) == 0;
}

}  // namespace

OutputFile::OutputFile(UniqueFd fd, Kind kind, std::string path, bool overwrite)
    : fd_(std::move(fd)), kind_(kind), path_(std::move(path)), overwrite_(overwrite) {}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : fd_(std::move(other.fd_)),
      kind_(other.kind_),
      path_(std::move(other.path_)),
      partial_(std::exchange(other.partial_, {})),
      overwrite_(other.overwrite_) {}

OutputFile::~OutputFile() {
  if (partial_.empty()) return;
  ::unlink(partial_.c_str());
  keep_on_signal();
}

Result<OutputFile> OutputFile::create(const std::string& path, bool overwrite) {
  if (path.empty()) return fail(Errc::invalid_argument, "the file's name is empty; name a file to write");
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? create_beside(path, overwrite, nullptr)
                           : Result<OutputFile>(os_fail("look up", path, errno));
  }
  const bool is_dangling = ::stat(path.c_str(), &status) != 0;
  if (!is_dangling && S_ISDIR(status.st_mode)) {
    return fail(Errc::invalid_argument, fmt::format("{} is a directory; name a file in it", printable(path)));
  }
  if (!overwrite) return exists(path);
  if (is_dangling) return create_beside(resolved(path), overwrite, nullptr);
  if (S_ISREG(status.st_mode)) return create_beside(resolved(path), overwrite, &status);
  // A rename would put a file in the place of the device.
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd) return os_fail("open", path, errno);
  return OutputFile(std::move(fd), Kind::direct, path, overwrite);
}

Result<OutputFile> OutputFile::standard_output() {
  UniqueFd fd(::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  if (!fd) return os_fail("dup", kStandardOutput, errno);
  return OutputFile(std::move(fd), Kind::direct, kStandardOutput, true);
}

Result<OutputFile> OutputFile::create_beside(const std::string& path, bool overwrite,
                                             const struct stat* replaced) {
  const std::string directory = directory_of(path);
  const mode_t mode = replaced == nullptr ? kFileMode : kPrivateMode;
  UniqueFd unnamed(::open(directory.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, mode));
  if (unnamed) {
    if (replaced != nullptr && !take_over_mode(unnamed.get(), *replaced))
      return os_fail("fchmod", path, errno);
    return OutputFile(std::move(unnamed), Kind::unnamed, path, overwrite);
  }
  if (has_unnamed_files(errno)) return os_fail("create a file in", directory, errno);

  const std::string partial = partial_name(path);
  remove_on_signal(partial);
  UniqueFd fd(::open(partial.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, mode));
  if (!fd) {
    const int error = errno;
    keep_on_signal();
    return os_fail("create", partial, error);
  }
  OutputFile file(std::move(fd), Kind::partial, path, overwrite);
  file.partial_ = partial;
  if (replaced != nullptr && !take_over_mode(file.fd_.get(), *replaced))
    return os_fail("fchmod", path, errno);
  return file;
}

Result<void> OutputFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_.get(), bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_fail("write", path_, errno);
    if (count == 0) return os_fail("write", path_, EIO);  // no errno, no progress: would loop forever
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
  return {};
}

Result<void> OutputFile::commit() {
  if (kind_ == Kind::direct) return close();
  if (kind_ == Kind::unnamed) {
    if (auto named = give_partial_name(); !named) return named;
  }
  if (auto closed = close(); !closed) return closed;
  return rename_to_path();
}

Result<void> OutputFile::give_partial_name() {
  const std::string partial = partial_name(path_);
  remove_on_signal(partial);
  const std::string self = fmt::format("/proc/self/fd/{}", fd_.get());
  if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, partial.c_str(), AT_SYMLINK_FOLLOW) != 0) {
    const int error = errno;
    keep_on_signal();
    return os_fail("create", partial, error);
  }
  partial_ = partial;
  return {};
}

// Network file systems report a full disk as late as here.
Result<void> OutputFile::close() {
  if (::close(fd_.release()) != 0) return os_fail("close", path_, errno);
  return {};
}

Result<void> OutputFile::rename_to_path() {
  const unsigned flags = overwrite_ ? 0 : RENAME_NOREPLACE;
  int result = ::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, path_.c_str(), flags);
  if (result != 0 && errno == EINVAL && !overwrite_) {  // a file system without that flag: NFS
    struct stat status {};
    if (::lstat(path_.c_str(), &status) == 0) return exists(path_);
    result = ::rename(partial_.c_str(), path_.c_str());
  }
  if (result != 0) return errno == EEXIST ? exists(path_) : os_fail("rename to", path_, errno);
  partial_.clear();
  keep_on_signal();
  return {};
}

}  // namespace cowmgr::cli
