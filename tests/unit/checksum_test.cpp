#include "proto/checksum.hpp"

#include <algorithm>
#include <span>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace cowmgr {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// As `xxhsum -H3` says of the same bytes.
TEST(Checksum, IsXxh3) {
  EXPECT_EQ(checksum_of({}), 0x2d06800538d394c2U);
  EXPECT_EQ(checksum_of(bytes_of("cowmgr")), 0xae33ae3885476587U);
}

TEST(Checksum, IsTheSameInPieces) {
  std::vector<std::byte> data(100'000);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 7 + i / 256);
  for (const std::size_t piece : {1U, 13U, 4096U, 99'999U, 100'000U}) {
    Checksum checksum;
    for (std::size_t at = 0; at < data.size(); at += piece)
      checksum.add(std::span(data).subspan(at, std::min(piece, data.size() - at)));
    EXPECT_EQ(checksum.value(), checksum_of(data)) << piece;
  }
}

TEST(Checksum, ChangesWithEveryBit) {
  std::vector<std::byte> data(300);
  const std::uint64_t before = checksum_of(data);
  for (std::size_t bit = 0; bit < data.size() * 8; ++bit) {
    data[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_NE(checksum_of(data), before) << bit;
    data[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

}  // namespace
}  // namespace cowmgr
