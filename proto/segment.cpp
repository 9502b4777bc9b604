#include "proto/segment.hpp"

#include <algorithm>
#include <cstring>
#include <zlib.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::array<char, 8> kMagic = {'C', 'O', 'W', 'M', 'G', 'R', 'T', 'R'};
constexpr std::uint32_t kFlagEvictable = 1U;
constexpr std::uint64_t kMaxDataBytes = std::uint64_t{1} << 48;  // data_bytes() of npy.hpp allows no more

// The page as it lies in the file, little-endian. The crc is CRC-32 (IEEE 802.3) of all bytes before it.
struct RawTrailer {
  std::array<char, 8> magic;
  std::uint32_t layout_version;
  std::uint32_t trailer_bytes;
  std::uint64_t id;
  std::uint64_t version;
  std::uint64_t data_offset;
  std::uint64_t data_bytes;
  std::uint64_t segment_bytes;
  std::int64_t created_us;
  std::int64_t sealed_us;
  std::uint32_t owner_uid;
  std::uint32_t owner_gid;
  std::uint32_t mode;
  std::uint32_t flags;
  std::uint64_t checksum;
  std::uint32_t name_bytes;
  std::uint32_t reserved;
  std::array<char, kMaxNameBytes + 1> name;
  std::uint64_t writer;
  std::array<char, 3724> zero;
  std::uint32_t crc;
};
static_assert(sizeof(RawTrailer) == kTrailerBytes);
static_assert(offsetof(RawTrailer, layout_version) == 8);
static_assert(offsetof(RawTrailer, trailer_bytes) == 12);
static_assert(offsetof(RawTrailer, id) == 16);
static_assert(offsetof(RawTrailer, version) == 24);
static_assert(offsetof(RawTrailer, data_offset) == 32);
static_assert(offsetof(RawTrailer, data_bytes) == 40);
static_assert(offsetof(RawTrailer, segment_bytes) == 48);
static_assert(offsetof(RawTrailer, created_us) == 56);
static_assert(offsetof(RawTrailer, sealed_us) == 64);
static_assert(offsetof(RawTrailer, owner_uid) == 72);
static_assert(offsetof(RawTrailer, owner_gid) == 76);
static_assert(offsetof(RawTrailer, mode) == 80);
static_assert(offsetof(RawTrailer, flags) == 84);
static_assert(offsetof(RawTrailer, checksum) == 88);
static_assert(offsetof(RawTrailer, name_bytes) == 96);
static_assert(offsetof(RawTrailer, reserved) == 100);
static_assert(offsetof(RawTrailer, name) == 104);
static_assert(offsetof(RawTrailer, writer) == 360);
static_assert(offsetof(RawTrailer, zero) == 368);
static_assert(offsetof(RawTrailer, crc) == 4092);

std::uint32_t crc_of(const RawTrailer& raw) {
  return static_cast<std::uint32_t>(
      ::crc32_z(0, reinterpret_cast<const unsigned char*>(&raw), offsetof(RawTrailer, crc)));
}

// The oldest layout that has the data there; 0: none has.
std::uint32_t layout_of(std::uint64_t data_offset) {
  if (data_offset == kDataOffset) return 1;
  return data_offset == kMaxDataOffset ? 2 : 0;
}

tl::unexpected<Error> refuse(std::string_view why) {
  return fail(Errc::corrupted, fmt::format("the segment's trailer is damaged: {}", why));
}

}  // namespace

std::string segment_name(std::string_view instance, std::uint64_t id) {
  return fmt::format("/cowmgr.{}.{:016x}", instance, id);
}

Result<std::string> make_segment_header(const ArraySpec& spec) {
  if (auto one_page = make_npy_header(spec, kDataOffset)) return one_page;
  if (auto two_pages = make_npy_header(spec, kMaxDataOffset)) return two_pages;
  return fail(
      Errc::invalid_dtype,
      fmt::format(
          "the dtype's description has {} bytes; with it the header would be longer than the two pages "
          "that NumPy reads in place (10,000 bytes at most)",
          spec.dtype.str().size()));
}

TrailerPage encode_trailer(const TrailerInfo& info) {
  COWMGR_ASSERT(info.name.size() <= kMaxNameBytes);
  RawTrailer raw{};
  raw.magic = kMagic;
  raw.layout_version = layout_of(info.data_offset);
  raw.trailer_bytes = kTrailerBytes;
  raw.id = info.id;
  raw.version = info.version;
  raw.data_offset = info.data_offset;
  raw.data_bytes = info.data_bytes;
  raw.segment_bytes = segment_bytes(info.data_bytes, info.data_offset);
  raw.created_us = info.created_us;
  raw.sealed_us = info.sealed_us;
  raw.owner_uid = info.owner_uid;
  raw.owner_gid = info.owner_gid;
  raw.mode = info.mode;
  raw.flags = info.evictable ? kFlagEvictable : 0;
  raw.checksum = info.checksum;
  raw.writer = info.writer;
  raw.name_bytes = static_cast<std::uint32_t>(info.name.size());
  std::copy(info.name.begin(), info.name.end(), raw.name.begin());
  raw.crc = crc_of(raw);
  TrailerPage page;
  std::memcpy(page.data(), &raw, sizeof raw);
  return page;
}

Result<TrailerInfo> decode_trailer(std::span<const std::byte, kTrailerBytes> page) {
  RawTrailer raw{};
  std::memcpy(&raw, page.data(), sizeof raw);
  if (raw.magic != kMagic) return refuse("no magic");
  if (raw.layout_version > kLayoutVersion) {
    return fail(Errc::unsupported,
                fmt::format("the segment has layout version {}, this program reads up to {}; upgrade it",
                            raw.layout_version, kLayoutVersion));
  }
  if (raw.crc != crc_of(raw)) return refuse("the crc does not match");
  // A crc can be forged, so what it covers is still hostile.
  if (raw.layout_version == 0) return refuse("its layout version is 0");
  if (raw.trailer_bytes != kTrailerBytes || layout_of(raw.data_offset) != raw.layout_version ||
      raw.data_bytes > kMaxDataBytes || raw.segment_bytes != segment_bytes(raw.data_bytes, raw.data_offset) ||
      raw.name_bytes > kMaxNameBytes) {
    return refuse("its byte counts contradict each other");
  }
  std::string name(raw.name.data(), raw.name_bytes);
  if (!name.empty() && !check_name(name)) return refuse("its name is malformed");
  return TrailerInfo{.name = std::move(name),
                     .id = raw.id,
                     .version = raw.version,
                     .data_bytes = raw.data_bytes,
                     .data_offset = raw.data_offset,
                     .created_us = raw.created_us,
                     .sealed_us = raw.sealed_us,
                     .owner_uid = raw.owner_uid,
                     .owner_gid = raw.owner_gid,
                     .mode = raw.mode,
                     .evictable = (raw.flags & kFlagEvictable) != 0,
                     .checksum = raw.checksum,
                     .writer = raw.writer};
}

}  // namespace cowmgr
