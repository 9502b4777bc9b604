// The start of a file that claims to be .npy: what is accepted can be written again and reads as the same.
#include "proto/npy.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace cowmgr {
namespace {

void check_again(const NpyHeader& header) {
  constexpr std::size_t kWithoutDtype = 1024;  // 32 axes of 15 digits, and the rest of the dict
  const std::size_t room = kWithoutDtype + header.spec.dtype.str().size();
  if (room > kMaxNpyHeaderBytes) return;  // escapes made it longer than what is read
  const auto made = make_npy_header(header.spec, room);
  COWMGR_ASSERT(made && made->size() == room);
  const auto back = parse_npy_header(bytes_of(*made));
  COWMGR_ASSERT(back && back->spec == header.spec);
  COWMGR_ASSERT(back->data_bytes == header.data_bytes && back->data_offset == room);
}

void check(std::span<const std::byte> file) {
  const auto header_bytes = npy_header_bytes(file.first(std::min(file.size(), kNpyPreludeBytes)));
  const auto header = parse_npy_header(file);
  if (!header)
    return check_error(header.error(), {Errc::invalid_file, Errc::invalid_dtype, Errc::invalid_shape});
  COWMGR_ASSERT(header_bytes == header->data_offset && header->data_offset <= file.size());
  COWMGR_ASSERT(data_bytes(header->spec) == header->data_bytes);
  COWMGR_ASSERT(is_utf8(header->spec.dtype.str()) && header->spec.shape.size() <= kMaxDimensions);
  check_again(*header);
}

}  // namespace
}  // namespace cowmgr

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cowmgr::check(std::as_bytes(std::span(data, size)));
  return 0;
}
