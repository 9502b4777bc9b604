#include "client/cowctl/output_file.hpp"

#include <cerrno>
#include <fcntl.h>
#include <filesystem>
#include <stdio.h>  // NOLINT(modernize-deprecated-headers): renameat2 is not in <cstdio>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

namespace fs = std::filesystem;

constexpr mode_t kFileMode = 0666;     // less the umask, as for any new file
constexpr mode_t kPrivateMode = 0600;  // until the file has the mode of what it takes the place of
constexpr const char* kStandardOutput = "standard output";

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

// A name that no other file has now, in the directory of `path`.
std::string partial_name(const std::string& path) {
  static int count = 0;
  return fs::path(path).parent_path() / fmt::format(".cowctl-{}-{}.partial", ::getpid(), ++count);
}

// The owner too where we may give the file away. Where not even its group can be kept, that of ours may do no
// more than all others.
bool take_over_mode(int fd, const struct stat& replaced) {
  mode_t mode = replaced.st_mode & 0777U;
  if (::fchown(fd, replaced.st_uid, replaced.st_gid) != 0 &&
      ::fchown(fd, static_cast<uid_t>(-1), replaced.st_gid) != 0)
    mode &= ~070U | (mode << 3U);
  return ::fchmod(fd, mode) == 0;
}

}  // namespace

Result<OutputFile> OutputFile::create(const std::string& path, bool overwrite) {
  if (path.empty()) return fail(Errc::invalid_argument, "the file's name is empty; name a file to write");
  struct stat old {};
  const bool is_there = ::lstat(path.c_str(), &old) == 0;
  if (!is_there && errno != ENOENT) return os_fail("look up", path, errno);
  const bool has_file = is_there && ::stat(path.c_str(), &old) == 0;  // a link can lead nowhere
  if (has_file && S_ISDIR(old.st_mode))
    return fail(Errc::invalid_argument, fmt::format("{} is a directory; name a file in it", printable(path)));
  if (is_there && !overwrite) return exists(path);
  if (!has_file) return create_beside(path, overwrite, nullptr);
  std::error_code ignored;
  // A symbolic link stays one: the file behind it is replaced.
  if (S_ISREG(old.st_mode)) return create_beside(fs::canonical(path, ignored), overwrite, &old);
  // A rename would put a file in the place of the device.
  UniqueFd device(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!device) return os_fail("open", path, errno);
  return OutputFile(std::move(device), path, overwrite, true);
}

Result<OutputFile> OutputFile::standard_output() {
  UniqueFd fd(::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  if (!fd) return os_fail("dup", kStandardOutput, errno);
  return OutputFile(std::move(fd), kStandardOutput, true, true);
}

// Without a name: the kernel frees it with its last descriptor. Where the file system knows no such files, it
// has its partial name from the start.
Result<OutputFile> OutputFile::create_beside(const std::string& path, bool overwrite,
                                             const struct stat* replaced) {
  const std::string parent = fs::path(path).parent_path();
  const std::string directory = parent.empty() ? "." : parent;
  const mode_t mode = replaced == nullptr ? kFileMode : kPrivateMode;
  UniqueFd unnamed(::open(directory.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, mode));
  if (!unnamed && errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)
    return os_fail("create a file in", directory, errno);
  OutputFile file(std::move(unnamed), path, overwrite, false);
  if (!file.fd_) {
    const std::string partial = partial_name(path);
    file.fd_.reset(::open(partial.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, mode));
    if (!file.fd_) return os_fail("create", partial, errno);
    file.partial_ = partial;
  }
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
  if (!is_direct_ && partial_.empty()) {
    const std::string partial = partial_name(path_);
    const std::string self = fmt::format("/proc/self/fd/{}", fd_.get());
    if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, partial.c_str(), AT_SYMLINK_FOLLOW) != 0)
      return os_fail("create", partial, errno);
    partial_ = partial;
  }
  // Network file systems report a full disk as late as here.
  if (::close(fd_.release()) != 0) return os_fail("close", path_, errno);
  return is_direct_ ? Result<void>() : rename_to_path();
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
  return {};
}

}  // namespace cowmgr::cli
