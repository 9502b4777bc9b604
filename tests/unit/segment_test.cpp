#include "proto/segment.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include <boost/crc.hpp>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

TrailerInfo info_of(std::string name) {
  return {.name = std::move(name),
          .id = 0x0123456789ABCDEF,
          .version = 7,
          .data_bytes = 47040000,
          .created_us = 1'700'000'000'000'001,
          .sealed_us = 1'700'000'000'000'002,
          .owner_uid = 1000,
          .owner_gid = 1001,
          .mode = 0640,
          .evictable = true,
          .checksum = 0xFEDCBA9876543210};
}

template <class T>
T at(const TrailerPage& page, std::size_t offset) {
  T value;
  std::memcpy(&value, page.data() + offset, sizeof value);
  return value;
}

template <class T>
void put(TrailerPage& page, std::size_t offset, T value) {
  std::memcpy(page.data() + offset, &value, sizeof value);
}

// What somebody would do who can write to the file: the crc is no secret.
TrailerPage with_crc(TrailerPage page) {
  boost::crc_32_type crc;
  crc.process_bytes(page.data(), 4092);
  put<std::uint32_t>(page, 4092, crc.checksum());
  return page;
}

// ---- Sizes and names ----

TEST(Segment, HasAPageBeforeItsDataAndOneAfter) {
  EXPECT_EQ(segment_bytes(0), 8192U);
  EXPECT_EQ(segment_bytes(1), 12288U);
  EXPECT_EQ(segment_bytes(4095), 12288U);
  EXPECT_EQ(segment_bytes(4096), 12288U);
  EXPECT_EQ(segment_bytes(4097), 16384U);
  EXPECT_EQ(segment_bytes((std::uint64_t{1} << 48U) - 1), (std::uint64_t{1} << 48U) + 8192);
  static_assert(kDataOffset % kPageBytes == 0 && kHugePageBytes % kPageBytes == 0);
}

TEST(Segment, IsNamedAfterItsInstanceAndId) {
  EXPECT_EQ(segment_name("default", 0), "/cowmgr.default.0000000000000000");
  EXPECT_EQ(segment_name("default", 0x1F), "/cowmgr.default.000000000000001f");
  EXPECT_EQ(segment_name("a-b_C", ~std::uint64_t{0}), "/cowmgr.a-b_C.ffffffffffffffff");
  EXPECT_LT(segment_name(std::string(64, 'i'), ~std::uint64_t{0}).size(), 255U) << "NAME_MAX";
}

// ---- The trailer as it lies in the file ----

TEST(Trailer, LiesWhereTheSpecificationSays) {
  const auto page = encode_trailer(info_of("train/x"));
  EXPECT_EQ(std::memcmp(page.data(), "COWMGRTR", 8), 0);
  EXPECT_EQ(at<std::uint32_t>(page, 8), 1U);
  EXPECT_EQ(at<std::uint32_t>(page, 12), 4096U);
  EXPECT_EQ(at<std::uint64_t>(page, 16), 0x0123456789ABCDEFU);
  EXPECT_EQ(at<std::uint64_t>(page, 24), 7U);
  EXPECT_EQ(at<std::uint64_t>(page, 32), 4096U);
  EXPECT_EQ(at<std::uint64_t>(page, 40), 47040000U);
  EXPECT_EQ(at<std::uint64_t>(page, 48), segment_bytes(47040000));
  EXPECT_EQ(at<std::int64_t>(page, 56), 1'700'000'000'000'001);
  EXPECT_EQ(at<std::int64_t>(page, 64), 1'700'000'000'000'002);
  EXPECT_EQ(at<std::uint32_t>(page, 72), 1000U);
  EXPECT_EQ(at<std::uint32_t>(page, 76), 1001U);
  EXPECT_EQ(at<std::uint32_t>(page, 80), 0640U);
  EXPECT_EQ(at<std::uint32_t>(page, 84), 1U);
  EXPECT_EQ(at<std::uint64_t>(page, 88), 0xFEDCBA9876543210U);
  EXPECT_EQ(at<std::uint32_t>(page, 96), 7U);
  EXPECT_EQ(std::memcmp(page.data() + 104, "train/x", 8), 0) << "with its final NUL";
  EXPECT_EQ(page, with_crc(page)) << "the crc is CRC-32 of all bytes before it";
}

TEST(Trailer, OfAHeaderOfTwoPagesIsLayout2) {
  auto info = info_of("x");
  info.data_offset = kMaxDataOffset;
  const auto page = encode_trailer(info);
  EXPECT_EQ(at<std::uint32_t>(page, 8), 2U);
  EXPECT_EQ(at<std::uint64_t>(page, 32), 8192U);
  EXPECT_EQ(at<std::uint64_t>(page, 48), segment_bytes(47040000) + 4096);
  EXPECT_EQ(decode_trailer(page), info);
}

TEST(Trailer, HasTheDataWhereItsLayoutHasIt) {
  for (const auto& [layout, data_offset] :
       {std::pair(1U, 8192U), std::pair(2U, 4096U), std::pair(2U, 12288U), std::pair(2U, 0U)}) {
    auto page = encode_trailer(info_of("x"));
    put<std::uint32_t>(page, 8, layout);
    put<std::uint64_t>(page, 32, data_offset);
    put<std::uint64_t>(page, 48, segment_bytes(47040000, data_offset));
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << layout << ", " << data_offset;
  }
}

// A structured dtype whose .npy header has `header_bytes` at least, and less than one field more.
ArraySpec spec_with_header(std::size_t header_bytes) {
  std::string fields;
  const auto parse = [&] { return Dtype::parse("[" + fields + "]"); };
  for (int i = 0;; ++i) {
    fields += fmt::format("('field_{:04}', '<f4'), ", i);
    ArraySpec spec{*parse(), {3}};
    if (!make_npy_header(spec, header_bytes)) return spec;
  }
}

TEST(Segment, ItsHeaderTakesOnePageOrTwo) {
  EXPECT_EQ(make_segment_header({Dtype::of<float>(), {3}})->size(), 4096U);
  EXPECT_EQ(make_segment_header(spec_with_header(4096))->size(), 8192U);
  const auto refused = make_segment_header(spec_with_header(8192));
  ASSERT_THAT(refused, FailsWith(Errc::invalid_dtype));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("NumPy reads in place"));
}

TEST(Trailer, HasTheCrcOfIeee8023) {
  boost::crc_32_type crc;
  crc.process_bytes("123456789", 9);
  EXPECT_EQ(crc.checksum(), 0xCBF43926U);
}

TEST(Trailer, IsZeroWhereItSaysNothing) {
  const auto page = encode_trailer(info_of("x"));
  EXPECT_EQ(at<std::uint32_t>(page, 100), 0U);
  for (std::size_t i = 105; i < 4092; ++i) ASSERT_EQ(page[i], std::byte{0}) << i;
}

// ---- Round trip ----

TEST(Trailer, ReadsBackWhatItWrote) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  for (const std::string name : {"x", "train/x", "\xC3\xA9\xF0\x9F\x90\x84"}) {
    const auto info = info_of(name);
    EXPECT_EQ(decode_trailer(encode_trailer(info)), info);
  }
  for (const auto& info : {info_of(std::string(255, 'n')), TrailerInfo{.name = "least"},
                           TrailerInfo{.name = "most",
                           .id = ~std::uint64_t{0},
                           .version = ~std::uint64_t{0},
                           .data_bytes = (std::uint64_t{1} << 48U) - 1,
                           .created_us = kMost,
                           .sealed_us = -kMost,
                           .owner_uid = ~uid_t{0},
                           .owner_gid = ~gid_t{0},
                           .mode = ~std::uint32_t{0},
                           .evictable = true,
                           .checksum = ~std::uint64_t{0}}}) {
    EXPECT_EQ(decode_trailer(encode_trailer(info)), info) << info.name;
  }
}

TEST(Trailer, DoesNotTakeANameThatDoesNotFit) {
  EXPECT_DEATH(static_cast<void>(encode_trailer(info_of(std::string(256, 'n')))), "does not hold");
}

// ---- Damage ----

TEST(Trailer, RefusesEachSingleFlippedBit) {
  const auto whole = encode_trailer(info_of("train/x"));
  for (std::size_t bit = 0; bit < 8 * kTrailerBytes; ++bit) {
    auto page = whole;
    page[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto decoded = decode_trailer(page);
    ASSERT_FALSE(decoded) << "bit " << bit;
    const bool is_newer = bit > 64 && bit < 96;  // the layout version, 1, reads as a larger number
    ASSERT_EQ(decoded.error().code, is_newer ? Errc::unsupported : Errc::corrupted) << "bit " << bit;
  }
}

TEST(Trailer, RefusesPagesThatAreNone) {
  TrailerPage page{};
  EXPECT_THAT(decode_trailer(page), FailsWith(Errc::corrupted)) << "a page that was never written";
  page.fill(std::byte{0xFF});
  EXPECT_THAT(decode_trailer(page), FailsWith(Errc::corrupted));
}

TEST(Trailer, RefusesOneThatIsCutOff) {
  const auto whole = encode_trailer(info_of("train/x"));
  for (const std::size_t kept : {8U, 16U, 104U, 111U, 2048U, 4092U, 4095U}) {
    TrailerPage page{};
    std::copy_n(whole.begin(), kept, page.begin());
    EXPECT_THAT(decode_trailer(page), FailsWith(Errc::corrupted)) << kept;
  }
}

TEST(Trailer, SaysOfANewerLayoutThatItIsNotSupported) {
  for (const std::uint32_t version : {3U, 4U, 0xFFFFFFFFU}) {
    auto page = encode_trailer(info_of("x"));
    put(page, 8, version);
    EXPECT_THAT(decode_trailer(page), FailsWith(Errc::unsupported)) << "its crc may be elsewhere";
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::unsupported));
  }
}

// ---- Forgery: a correct crc over numbers that contradict each other ----

TEST(Trailer, RefusesALayoutVersionThatNeverWas) {
  auto page = encode_trailer(info_of("x"));
  put<std::uint32_t>(page, 8, 0);
  EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted));
}

TEST(Trailer, RefusesByteCountsThatContradictEachOther) {
  struct Forgery {
    std::size_t offset;
    std::uint64_t value;
  };
  for (const auto& [offset, value] :
       {Forgery{32, 0}, Forgery{32, 4095}, Forgery{32, 8192}, Forgery{40, 0}, Forgery{40, 47040000 + 4096},
        Forgery{48, 0}, Forgery{48, 8192}, Forgery{48, ~std::uint64_t{0}}}) {
    auto page = encode_trailer(info_of("x"));
    put(page, offset, value);
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << offset << ": " << value;
  }
  for (const std::uint32_t trailer_bytes : {0U, 4095U, 8192U}) {
    auto page = encode_trailer(info_of("x"));
    put(page, 12, trailer_bytes);
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << trailer_bytes;
  }
}

TEST(Trailer, RefusesByteCountsThatOverflow) {
  for (const std::uint64_t data_bytes :
       {~std::uint64_t{0}, ~std::uint64_t{0} - 4095, ~std::uint64_t{0} - 8191, std::uint64_t{1} << 63U,
        (std::uint64_t{1} << 48U) + 1}) {
    auto page = encode_trailer(info_of("x"));
    put(page, 40, data_bytes);
    put(page, 48, segment_bytes(data_bytes));  // fits by wrapping around
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << data_bytes;
  }
}

TEST(Trailer, RefusesANameThatNoArrayMayHave) {
  for (const std::uint32_t name_bytes : {256U, 4096U, 0xFFFFFFFFU}) {
    auto page = encode_trailer(info_of("x"));
    put(page, 96, name_bytes);
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << name_bytes;
  }
  for (const std::string name : {"a\nb", "\x1B[2J", "\xFF", "\xED\xA0\x80", "\x7F"}) {
    auto page = encode_trailer(info_of("x"));
    std::memcpy(page.data() + 104, name.data(), name.size());
    put(page, 96, static_cast<std::uint32_t>(name.size()));
    EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << printable(name);
  }
  auto page = encode_trailer(info_of("x"));
  put<std::uint32_t>(page, 96, 2);
  EXPECT_THAT(decode_trailer(with_crc(page)), FailsWith(Errc::corrupted)) << "a NUL inside";
}

}  // namespace
}  // namespace cowmgr
