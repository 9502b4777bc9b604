// The last page of a segment. Its crc is put right first: a crc stops accidents, not whoever can write the
// file.
#include <cstring>

#include <boost/crc.hpp>

#include "proto/segment.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kCrcOffset = kTrailerBytes - sizeof(std::uint32_t);

void put_crc(TrailerPage& page) {
  boost::crc_32_type crc;
  crc.process_bytes(page.data(), kCrcOffset);
  const std::uint32_t checksum = crc.checksum();
  std::memcpy(page.data() + kCrcOffset, &checksum, sizeof checksum);
}

void check_page(const TrailerPage& page) {
  const auto info = decode_trailer(page);
  if (!info) return check_error(info.error(), {Errc::corrupted, Errc::unsupported});
  COWMGR_ASSERT(info->name.empty() || check_name(info->name));
  COWMGR_ASSERT(segment_bytes(info->data_bytes) > info->data_bytes);
  COWMGR_ASSERT(decode_trailer(encode_trailer(*info)) == info);
}

void check(std::span<const std::byte> file) {
  TrailerPage page{};  // short inputs end in zeros
  std::copy_n(file.begin(), std::min(file.size(), page.size()), page.begin());
  check_page(page);
  put_crc(page);
  check_page(page);
}

}  // namespace
}  // namespace cowmgr

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cowmgr::check(std::as_bytes(std::span(data, size)));
  return 0;
}
