// A type string from a peer: what is accepted has one spelling, a size, and a header that says it again.
#include "proto/dtype.hpp"
#include "proto/npy.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace cowmgr {
namespace {

void check_header(const Dtype& dtype) {
  const ArraySpec spec{dtype, {2, 3}};
  const std::size_t room = dtype.str().size() + 128;
  if (room > kMaxNpyHeaderBytes) return;
  const auto header = make_npy_header(spec, room);
  COWMGR_ASSERT(header && header->size() == room);
  const auto back = parse_npy_header(bytes_of(*header));
  COWMGR_ASSERT(back && back->spec == spec && back->data_bytes == 6 * dtype.item_bytes());
}

void check(std::string_view text) {
  const auto dtype = Dtype::parse(text);
  if (!dtype) return check_error(dtype.error(), {Errc::invalid_dtype});
  COWMGR_ASSERT(dtype->item_bytes() < std::uint64_t{1} << 31U);
  COWMGR_ASSERT(is_utf8(dtype->str()));
  COWMGR_ASSERT(Dtype::parse(dtype->str()) == dtype);
  const auto literal = parse_py_literal(dtype->to_literal());
  COWMGR_ASSERT(literal && Dtype::from_literal(*literal) == dtype);
  check_header(*dtype);
}

}  // namespace
}  // namespace cowmgr

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cowmgr::check({reinterpret_cast<const char*>(data), size});
  return 0;
}
