// Reads the file format of the MNIST family: IDX, compressed with gzip.
//
//   offset 0   two zero bytes, the element type, the number of dimensions
//   offset 4   the dimensions, 32 bits each, most significant byte first
//   then       the elements, the last dimension varying fastest
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr::knn {

struct IdxFile {
  std::vector<std::size_t> dims;    // at least one
  std::vector<std::uint8_t> bytes;  // as many as the product of the dimensions
};

// Reads a whole file of unsigned bytes. Blocks on the disk; holds the decompressed elements and 64 KiB more.
// not_found or permission_denied if it cannot be opened; invalid_file if it is not one gzip member, not IDX
// of unsigned bytes, shorter or longer than its dimensions say, or damaged (the checksum of gzip is
// verified).
[[nodiscard]] Result<IdxFile> read_idx(const std::filesystem::path& path);

}  // namespace cowmgr::knn
