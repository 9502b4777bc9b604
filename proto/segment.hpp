// The layout of a segment: .npy header, data, trailer. Specified in proto/README.md, "Segments".
//
// 1. The data starts behind the header: at kDataOffset, or, where a dtype needs more words than fit there, a
// page
//    later. The first is layout 1, which every reader knows, the second layout 2.
// 2. The trailer is the last kTrailerBytes bytes of the file, so whoever has the file's size can find it.
// 3. Only the daemon writes header and trailer; both are checked again after the kernel has proven that
//    nobody can write any more.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>

#include "proto/errors.hpp"
#include "proto/npy.hpp"

namespace cowmgr {

inline constexpr std::uint64_t kPageBytes = 4096;
inline constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;  // x86-64 and most arm64
inline constexpr std::uint64_t kDataOffset = kPageBytes;
// NumPy reads a header of at most 10,000 bytes, padding counted, where it is not told otherwise: two pages.
inline constexpr std::uint64_t kMaxDataOffset = 2 * kPageBytes;
inline constexpr std::uint64_t kTrailerBytes = kPageBytes;
inline constexpr std::uint32_t kLayoutVersion = 2;  // the newest

// Number of bytes of the segment that holds `data_bytes` bytes of data: header, data up to a page, trailer.
[[nodiscard]] constexpr std::uint64_t segment_bytes(std::uint64_t data_bytes,
                                                    std::uint64_t data_offset = kDataOffset) noexcept {
  return data_offset + (data_bytes + kPageBytes - 1) / kPageBytes * kPageBytes + kTrailerBytes;
}

// The header of a segment, whose size is the data's offset: one page, or two. Errors: invalid_dtype when the
// type's text does not fit in two.
[[nodiscard]] Result<std::string> make_segment_header(const ArraySpec& spec);

// "/cowmgr.<instance>.<id>", as shm_open(3) takes it; `id` as 16 hexadecimal digits.
[[nodiscard]] std::string segment_name(std::string_view instance, std::uint64_t id);

// What the trailer says of an array. Times are microseconds since 1970 UTC.
struct TrailerInfo {
  std::string name;
  std::uint64_t id = 0;
  std::uint64_t version = 0;
  std::uint64_t data_bytes = 0;
  std::uint64_t data_offset = kDataOffset;  // or kMaxDataOffset
  std::int64_t created_us = 0;
  std::int64_t sealed_us = 0;
  uid_t owner_uid = 0;
  gid_t owner_gid = 0;
  std::uint32_t mode = 0;
  bool evictable = false;
  std::uint64_t checksum = 0;  // 0: none
  std::uint64_t writer = 0;    // the session that writes it, while it is not sealed

  friend bool operator==(const TrailerInfo&, const TrailerInfo&) = default;
};

using TrailerPage = std::array<std::byte, kTrailerBytes>;

[[nodiscard]] TrailerPage encode_trailer(const TrailerInfo& info);

// Errors: corrupted (magic, crc, or byte counts that do not fit), unsupported (a newer layout version).
[[nodiscard]] Result<TrailerInfo> decode_trailer(std::span<const std::byte, kTrailerBytes> page);

}  // namespace cowmgr
