#include "client/examples/knn/idx_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <span>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <zlib.h>

#include <fmt/format.h>

#include "proto/unique_fd.hpp"

namespace cowmgr::knn {
namespace {

constexpr std::uint8_t kUnsignedByte = 0x08;  // the element type, as the format numbers it
constexpr int kGzipOnly = 16 + MAX_WBITS;     // inflateInit2: a gzip header and checksum, nothing else
// Deflate cannot expand by more (zlib_tech.html, "Maximum Compression Factor"). A few forged bytes
// can therefore not make us reserve gigabytes for elements that do not follow.
constexpr std::uint64_t kMaxExpansion = 1032;

// One gzip member, decompressed as it is read. gzread() would not do: it passes files that are not
// compressed through as they are, and ignores whatever follows the member.
class GzipReader {
 public:
  GzipReader(UniqueFd fd, std::string name) : fd_(std::move(fd)), name_(std::move(name)) {}
  GzipReader(const GzipReader&) = delete;  // zlib's state points back at the z_stream
  GzipReader& operator=(const GzipReader&) = delete;
  GzipReader(GzipReader&&) = delete;
  GzipReader& operator=(GzipReader&&) = delete;
  ~GzipReader() { inflateEnd(&stream_); }

  Result<void> start() {
    if (inflateInit2(&stream_, kGzipOnly) != Z_OK) return fail(Errc::out_of_memory, "zlib cannot start");
    return {};
  }

  Result<void> read_exactly(std::span<std::uint8_t> out);
  Result<void> expect_end();
  [[nodiscard]] tl::unexpected<Error> invalid(std::string_view why) const {
    return fail(Errc::invalid_file, fmt::format("{}: {}", name_, why));
  }

 private:
  Result<bool> refill();
  Result<void> inflate_some();

  UniqueFd fd_;
  std::string name_;
  z_stream stream_{};
  bool ended_ = false;  // the member's checksum was read and is right
  std::uint8_t surplus_ = 0;
  std::array<std::uint8_t, 65536> input_{};
};

// False at the end of the file.
Result<bool> GzipReader::refill() {
  ssize_t count = 0;
  do {
    count = ::read(fd_.get(), input_.data(), input_.size());
  } while (count < 0 && errno == EINTR);
  if (count < 0) return tl::unexpected(os_error("read", name_, errno));
  stream_.next_in = input_.data();
  stream_.avail_in = static_cast<uInt>(count);
  return count > 0;
}

// Moves on by at least one byte of input or output.
Result<void> GzipReader::inflate_some() {
  if (stream_.avail_in == 0) {
    const Result<bool> more = refill();
    if (!more) return error_of(more);
    if (!*more) return invalid("truncated: the gzip stream has no end");
  }
  const int code = inflate(&stream_, Z_NO_FLUSH);
  ended_ = code == Z_STREAM_END;
  if (code == Z_MEM_ERROR) return fail(Errc::out_of_memory, "zlib has no memory for its window");
  // Z_BUF_ERROR: all that was read is consumed and none of it gave output yet; the next call reads on.
  if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR) {
    return invalid(stream_.msg != nullptr ? stream_.msg : "not a gzip stream");
  }
  return {};
}

Result<void> GzipReader::read_exactly(std::span<std::uint8_t> out) {
  while (!out.empty()) {
    if (ended_) return invalid("truncated: fewer elements than its dimensions say");
    const auto wanted = static_cast<uInt>(std::min<std::size_t>(out.size(), 1U << 30));  // uInt: 32 bits
    stream_.next_out = out.data();
    stream_.avail_out = wanted;
    if (Result<void> moved = inflate_some(); !moved) return moved;
    out = out.subspan(wanted - stream_.avail_out);
  }
  return {};
}

// The checksum may still be unread when the last element is out, so one more byte is asked for, in vain.
Result<void> GzipReader::expect_end() {
  stream_.next_out = &surplus_;
  stream_.avail_out = 1;
  while (!ended_) {
    if (Result<void> moved = inflate_some(); !moved) return moved;
    if (stream_.avail_out == 0) return invalid("more elements than its dimensions say");
  }
  if (stream_.avail_in == 0) {
    const Result<bool> more = refill();
    if (!more) return error_of(more);
  }
  if (stream_.avail_in != 0) return invalid("something follows the gzip stream");
  return {};
}

// The number of elements; refused if it is more than `limit`, at which no multiplication overflows.
Result<std::size_t> element_count(const std::vector<std::size_t>& dims, std::uint64_t limit,
                                  const GzipReader& file) {
  if (std::ranges::find(dims, 0U) != dims.end()) return 0;
  std::uint64_t count = 1;
  for (const std::size_t dim : dims) {
    if (dim > limit / count) return file.invalid("dimensions too large for a file of its size");
    count *= dim;
  }
  return count;
}

Result<std::vector<std::size_t>> read_dims(GzipReader& file) {
  std::array<std::uint8_t, 4> magic{};
  if (const auto read = file.read_exactly(magic); !read) return error_of(read);
  if (magic[0] != 0 || magic[1] != 0) return file.invalid("not an IDX file: wrong magic number");
  if (magic[2] != kUnsignedByte) {
    return file.invalid(fmt::format("its elements have type {:#04x}, not unsigned bytes (0x08)", magic[2]));
  }
  if (magic[3] == 0) return file.invalid("an IDX file without dimensions");
  std::vector<std::size_t> dims(magic[3]);
  for (std::size_t& dim : dims) {
    std::array<std::uint8_t, 4> big_endian{};
    if (const auto read = file.read_exactly(big_endian); !read) return error_of(read);
    for (const std::uint8_t byte : big_endian) dim = dim << 8U | byte;
  }
  return dims;
}

struct Opened {
  UniqueFd fd;
  std::uint64_t size_bytes = 0;
};

Result<Opened> open_regular(const std::string& name) {
  // O_NONBLOCK: the open of a FIFO would wait for a writer; it means nothing for regular files.
  UniqueFd fd(::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return tl::unexpected(os_error("open", name, errno));
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return tl::unexpected(os_error("fstat", name, errno));
  if (!S_ISREG(status.st_mode)) return fail(Errc::invalid_file, fmt::format("{}: not a regular file", name));
  return Opened{std::move(fd), static_cast<std::uint64_t>(status.st_size)};
}

}  // namespace

Result<IdxFile> read_idx(const std::filesystem::path& path) {
  auto opened = open_regular(path.string());
  if (!opened) return error_of(opened);
  const std::uint64_t limit = opened->size_bytes * kMaxExpansion;
  GzipReader file(std::move(opened->fd), path.string());
  if (const auto started = file.start(); !started) return error_of(started);
  auto dims = read_dims(file);
  if (!dims) return error_of(dims);
  const auto count = element_count(*dims, limit, file);
  if (!count) return error_of(count);
  IdxFile result{std::move(*dims), std::vector<std::uint8_t>(*count)};
  if (const auto read = file.read_exactly(result.bytes); !read) return error_of(read);
  if (const auto end = file.expect_end(); !end) return error_of(end);
  return result;
}

}  // namespace cowmgr::knn
