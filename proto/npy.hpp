// The .npy header that says what an array is (cowmgr/array_spec.hpp).
// Source: NumPy, "The .npy format" (numpy/doc, NEP 1): magic, version, header length, a Python dict.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "cowmgr/array_spec.hpp"  // IWYU pragma: export
#include "proto/dtype.hpp"
#include "proto/errors.hpp"

namespace cowmgr {

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
