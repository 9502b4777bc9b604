// What an array is (type, shape, order), and the .npy header that says so.
// Source: NumPy, "The .npy format" (numpy/doc, NEP 1): magic, version, header length, a Python dict.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "proto/dtype.hpp"
#include "proto/errors.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxDimensions = 32;  // NumPy 1's limit

enum class Order : std::uint8_t { c, fortran };

// The length of each axis; empty for a single value (0 dimensions).
using Shape = std::vector<std::uint64_t>;

// What the bytes of an array mean.
struct ArraySpec {
  Dtype dtype;
  Shape shape;
  Order order = Order::c;

  friend bool operator==(const ArraySpec&, const ArraySpec&) = default;
};

// Number of bytes of data that `spec` describes. Errors: invalid_shape when it has over 32 dimensions, or
// when the count passes 2^48 (what a process can map), empty axes notwithstanding.
[[nodiscard]] Result<std::uint64_t> data_bytes(const ArraySpec& spec);

// "(60000, 784)", "(3,)", "()": as Python writes a tuple.
[[nodiscard]] std::string to_string(const Shape& shape);

// A whole .npy header of exactly `padded_bytes`, after which the data follows. Errors: invalid_dtype when
// the type's text does not fit.
[[nodiscard]] Result<std::string> make_npy_header(const ArraySpec& spec, std::size_t padded_bytes);

// The header that numpy.save writes of the same array, byte for byte (NumPy 1.23 and later): as short as it
// can be, with room for the growing axis to get longer, up to a multiple of 64 bytes; of the oldest format
// version that can say it. NumPy calls an array Fortran-ordered only where its bytes do not lie in C order as
// well.
[[nodiscard]] std::string make_numpy_header(const ArraySpec& spec);

struct NpyHeader {
  ArraySpec spec;
  std::uint64_t data_offset = 0;  // bytes from the start of the file
  std::uint64_t data_bytes = 0;
};

inline constexpr std::size_t kNpyPreludeBytes = 12;  // magic, version, the longest length field
inline constexpr std::size_t kMaxNpyHeaderBytes = std::size_t{64} << 10;  // of any file that is read

// Number of bytes that the header takes, from a file's first kNpyPreludeBytes (fewer if it is shorter).
// Errors: invalid_file.
[[nodiscard]] Result<std::uint64_t> npy_header_bytes(std::span<const std::byte> prelude);

// Parses a header from a file's first bytes, which hold at least npy_header_bytes(). The header is hostile
// text: everything is checked. Errors: invalid_file, invalid_dtype, invalid_shape.
[[nodiscard]] Result<NpyHeader> parse_npy_header(std::span<const std::byte> bytes);

}  // namespace cowmgr
