#include "proto/npy.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

#include <fmt/format.h>

#include "proto/py_literal.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::uint64_t kMaxDataBytes = std::uint64_t{1} << 48;  // x86-64 user space is 2^47

tl::unexpected<Error> refuse(std::string why) {
  return fail(Errc::invalid_file, "not a readable .npy file: " + std::move(why));
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

// The padding of a segment's header is most of its page.
std::string_view without_padding(std::string_view text) {
  const auto end = std::find_if(text.rbegin(), text.rend(), [](char c) { return c != ' ' && c != '\n'; });
  return text.substr(0, static_cast<std::size_t>(text.rend() - end));
}

// Format versions 1 and 2 are Latin-1, whose bytes are the first 256 code points.
std::string utf8_of_latin1(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (code < 0x80) {
      out.push_back(c);
    } else {
      out.push_back(static_cast<char>(0xC0U | code >> 6U));
      out.push_back(static_cast<char>(0x80U | (code & 0x3FU)));
    }
  }
  return out;
}

// Nothing if there is another code point.
std::optional<std::string> latin1_of_utf8(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const auto [code, length] = decode_utf8(text);
    if (code > 0xFF) return std::nullopt;
    out.push_back(static_cast<char>(code));
    text.remove_prefix(length);
  }
  return out;
}

std::string dict_of(const ArraySpec& spec, bool is_fortran) {
  return fmt::format("{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}", spec.dtype.to_literal(),
                     is_fortran ? "True" : "False", to_string(spec.shape));
}

// `dict`, filled up with spaces and a newline to `text_bytes`, after what stands before it.
std::string header_of(int major, std::string_view dict, std::size_t text_bytes) {
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::string header(kMagic);
  header += static_cast<char>(major);
  header += '\0';
  for (std::size_t i = 0; i < length_bytes; ++i) header += static_cast<char>(text_bytes >> (8 * i) & 0xFFU);
  const std::size_t end = header.size() + text_bytes;
  header += dict;
  header.resize(end - 1, ' ');
  return header + '\n';
}

// Whether Fortran order is another than C order: not with one axis that counts, nor without any item.
bool is_fortran_alone(const ArraySpec& spec) {
  const auto is_empty = [](std::uint64_t dim) { return dim == 0; };
  if (spec.order == Order::c || std::ranges::any_of(spec.shape, is_empty)) return false;
  return std::ranges::count_if(spec.shape, [](std::uint64_t dim) { return dim > 1; }) > 1;
}

struct Prelude {
  int major;
  std::size_t text_offset;  // where the dict starts
  std::uint64_t text_bytes;
};

Result<Prelude> parse_prelude(std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.substr(0, kMagic.size()) != kMagic) return refuse("it does not start with the magic string");
  if (text.size() < kMagic.size() + 4) return refuse("it ends within its first bytes");
  const auto byte = [&](std::size_t i) { return std::to_integer<std::uint64_t>(bytes[i]); };
  const int major = static_cast<int>(byte(6));
  if (major < 1 || major > 3 || byte(7) != 0) {
    return refuse(fmt::format("format version {}.{} is unknown", major, byte(7)));
  }
  if (major == 1) return Prelude{major, 10, byte(8) | byte(9) << 8U};
  if (text.size() < kNpyPreludeBytes) return refuse("it ends within its first bytes");
  return Prelude{major, 12, byte(8) | byte(9) << 8U | byte(10) << 16U | byte(11) << 24U};
}

Result<Shape> parse_shape(const PyLiteral* literal) {
  if (literal == nullptr || literal->kind != PyLiteral::Kind::tuple) return refuse("'shape' is not a tuple");
  Shape shape;
  for (const auto& dim : literal->items) {
    if (dim.kind != PyLiteral::Kind::integer || dim.integer < 0) {
      return refuse("'shape' holds something else than lengths");
    }
    shape.push_back(static_cast<std::uint64_t>(dim.integer));
  }
  return shape;
}

Result<ArraySpec> parse_dict(std::string_view text) {
  const auto dict = parse_py_literal(text);
  if (!dict) return refuse(dict.error().message);
  if (dict->kind != PyLiteral::Kind::dict || dict->keys.size() != 3) {
    return refuse("the header is not a dict of 'descr', 'fortran_order' and 'shape'");
  }
  const auto* descr = dict->find("descr");
  const auto* fortran = dict->find("fortran_order");
  if (descr == nullptr) return refuse("'descr' is missing");
  if (fortran == nullptr || fortran->kind != PyLiteral::Kind::boolean)
    return refuse("'fortran_order' is not a bool");
  auto dtype = Dtype::from_literal(*descr);
  if (!dtype) return error_of(std::move(dtype));
  auto shape = parse_shape(dict->find("shape"));
  if (!shape) return error_of(std::move(shape));
  return ArraySpec{*std::move(dtype), *std::move(shape), fortran->boolean ? Order::fortran : Order::c};
}

}  // namespace

Result<std::uint64_t> data_bytes(const ArraySpec& spec) {
  if (spec.shape.size() > kMaxDimensions) {
    return fail(Errc::invalid_shape, fmt::format("the shape has {} dimensions; at most {} are allowed",
                                                 spec.shape.size(), kMaxDimensions));
  }
  // Empty axes are left out of the product: (0, 2^63, 2^63) must not hide an overflow.
  std::uint64_t bytes = std::max<std::uint64_t>(spec.dtype.item_bytes(), 1);
  bool is_empty = spec.dtype.item_bytes() == 0;
  for (const auto dim : spec.shape) {
    if (dim == 0)
      is_empty = true;
    else if (__builtin_mul_overflow(bytes, dim, &bytes))
      bytes = kMaxDataBytes;
    if (bytes >= kMaxDataBytes) {
      return fail(Errc::invalid_shape, fmt::format("the shape {} of {} is larger than memory can be",
                                                   to_string(spec.shape), spec.dtype.str()));
    }
  }
  return is_empty ? 0 : bytes;
}

std::string to_string(const Shape& shape) {
  return fmt::format("({}{})", fmt::join(shape, ", "), shape.size() == 1 ? "," : "");
}

Result<std::string> make_npy_header(const ArraySpec& spec, std::size_t padded_bytes) {
  COWMGR_ASSERT(padded_bytes <= kMaxNpyHeaderBytes);  // version 1's length field has 16 bits
  const std::string dict = dict_of(spec, spec.order == Order::fortran);
  // Version 3 is version 2 with UTF-8 instead of Latin-1; version 1 has a shorter length field.
  const bool is_v1 = is_ascii(dict);
  const std::size_t prelude = is_v1 ? 10 : 12;
  if (prelude + dict.size() + 1 > padded_bytes) {
    return fail(Errc::invalid_dtype,
                fmt::format("the dtype's description has {} bytes, which does not fit in the header of {}",
                            spec.dtype.str().size(), padded_bytes));
  }
  return header_of(is_v1 ? 1 : 3, dict, padded_bytes - prelude);
}

std::string make_numpy_header(const ArraySpec& spec) {
  constexpr std::size_t kGrowthDigits = 21;  // numpy.lib.format.GROWTH_AXIS_MAX_DIGITS
  constexpr std::size_t kAlignment = 64;     // ARRAY_ALIGN
  const bool is_fortran = is_fortran_alone(spec);
  std::string dict = dict_of(spec, is_fortran);
  if (!spec.shape.empty()) {
    const auto axis = std::to_string(is_fortran ? spec.shape.back() : spec.shape.front());
    dict.append(kGrowthDigits - axis.size(), ' ');
  }
  const auto latin1 = latin1_of_utf8(dict);
  const std::string& text = latin1 ? *latin1 : dict;
  // Where all is aligned already NumPy adds 64 bytes more.
  const auto bytes_after = [&](std::size_t prelude) {
    return (prelude + text.size() + 1) / kAlignment * kAlignment + kAlignment - prelude;
  };
  const bool is_v1 = latin1 && bytes_after(10) <= UINT16_MAX;
  if (is_v1) return header_of(1, text, bytes_after(10));
  return header_of(latin1 ? 2 : 3, text, bytes_after(12));
}

Result<std::uint64_t> npy_header_bytes(std::span<const std::byte> prelude) {
  const auto parsed = parse_prelude(prelude);
  if (!parsed) return error_of(parsed);
  const std::uint64_t bytes = parsed->text_offset + parsed->text_bytes;
  if (bytes > kMaxNpyHeaderBytes) {
    return refuse(fmt::format("its header claims {} bytes; at most {} are read", bytes, kMaxNpyHeaderBytes));
  }
  return bytes;
}

Result<NpyHeader> parse_npy_header(std::span<const std::byte> bytes) {
  const auto header_bytes = npy_header_bytes(bytes);
  if (!header_bytes) return error_of(header_bytes);
  if (*header_bytes > bytes.size()) return refuse("it ends within its header");
  const auto prelude = parse_prelude(bytes);
  const auto text = without_padding({reinterpret_cast<const char*>(bytes.data()) + prelude->text_offset,
                                     static_cast<std::size_t>(prelude->text_bytes)});
  if (prelude->major == 3 && !is_utf8(text)) return refuse("its header is not UTF-8");
  auto spec = parse_dict(prelude->major == 3 ? std::string(text) : utf8_of_latin1(text));
  if (!spec) return error_of(std::move(spec));
  auto size = data_bytes(*spec);
  if (!size) return error_of(std::move(size));
  return NpyHeader{*std::move(spec), *header_bytes, *size};
}

}  // namespace cowmgr
