#include "client/cowctl/npy_file.hpp"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

constexpr std::size_t kChunkBytes = std::size_t{8}
                                    << 20;  // often enough for a progress bar, seldom for the kernel

tl::unexpected<Error> os_fail(std::string_view what, const std::string& path, int number) {
  return tl::unexpected<Error>(os_error(what, printable(path), number));
}

// The same error, about the file `path`.
tl::unexpected<Error> about(const std::string& path, const Error& error) {
  return fail(error.code, fmt::format("{}: {}", printable(path), error.message));
}

// Fills as much of `bytes` as is still to come; returns how much that is.
Result<std::size_t> read_on(int fd, const std::string& path, std::span<std::byte> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const auto rest = bytes.subspan(done);
    const ssize_t count = ::read(fd, rest.data(), rest.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_fail("read", path, errno);
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  return done;
}

// Reads the header and no byte more: what follows is the data, in a pipe too.
Result<NpyHeader> read_header(int fd, const std::string& path) {
  std::vector<std::byte> bytes(kNpyPreludeBytes);
  auto count = read_on(fd, path, bytes);
  if (!count) return error_of(count);
  bytes.resize(*count);
  const auto header_bytes = npy_header_bytes(bytes);
  if (!header_bytes) return about(path, header_bytes.error());
  if (*header_bytes > bytes.size()) {
    bytes.resize(*header_bytes);
    count = read_on(fd, path, std::span(bytes).subspan(*count));
    if (!count) return error_of(count);
    bytes.resize(std::min(bytes.size(), kNpyPreludeBytes + *count));
  }
  auto header = parse_npy_header(bytes);
  if (!header) return about(path, header.error());
  return header;
}

Result<std::uint64_t> regular_file_bytes(int fd, const std::string& path) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) return os_fail("fstat", path, errno);
  if (!S_ISREG(status.st_mode)) {
    return fail(Errc::invalid_file,
                fmt::format("{} is not a regular file; name a .npy file", printable(path)));
  }
  return static_cast<std::uint64_t>(status.st_size);
}

}  // namespace

Result<NpyInput> NpyInput::open(const std::string& path) {
  // O_NONBLOCK: a named pipe would hold us up until somebody writes to it.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return os_fail("open", path, errno);
  const auto file_bytes = regular_file_bytes(fd.get(), path);
  if (!file_bytes) return error_of(file_bytes);
  auto header = read_header(fd.get(), path);
  if (!header) return error_of(std::move(header));
  if (*file_bytes < header->data_offset + header->data_bytes) {
    return fail(Errc::invalid_file,
                fmt::format("{} is truncated: its header promises {} bytes of data, {} are there; "
                            "write the file again",
                            printable(path), header->data_bytes,
                            *file_bytes - std::min(*file_bytes, header->data_offset)));
  }
  static_cast<void>(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL));  // reads ahead further
  return NpyInput(std::move(fd), path, *std::move(header));
}

Result<NpyInput> NpyInput::standard_input() {
  const std::string path = "standard input";
  UniqueFd fd(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  if (!fd) return os_fail("dup", path, errno);
  auto header = read_header(fd.get(), path);
  if (!header) return error_of(std::move(header));
  return NpyInput(std::move(fd), path, *std::move(header));
}

Result<void> NpyInput::read(std::span<std::byte> memory, const OnProgress& on_progress) {
  COWMGR_ASSERT(memory.size() == data_bytes());
  for (std::size_t done = 0; done < memory.size();) {
    const auto chunk = memory.subspan(done, std::min(kChunkBytes, memory.size() - done));
    const auto count = read_on(fd_.get(), path_, chunk);
    if (!count) return error_of(count);
    if (*count < chunk.size()) {
      return fail(
          Errc::invalid_file,
          fmt::format("{} ends after {} of {} bytes of data; write it again, and put it when nobody writes "
                      "to it",
                      printable(path_), done + *count, memory.size()));
    }
    done += *count;
    on_progress(done);
  }
  return {};
}

}  // namespace cowmgr::cli
