#include "proto/text.hpp"

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using namespace std::string_literals;

// `code` in the bit pattern of `length` bytes, also where UTF-8 forbids that length or that code.
std::string pattern_of(std::uint32_t code, std::size_t length) {
  if (length == 1) return {static_cast<char>(code)};
  std::string bytes(length, '\0');
  for (std::size_t i = length - 1; i > 0; --i, code >>= 6U)
    bytes[i] = static_cast<char>(0x80U | (code & 0x3FU));
  bytes[0] = static_cast<char>((0xFF00U >> length & 0xFFU) | code);
  return bytes;
}

std::string repeated(std::string_view part, std::size_t count) {
  std::string out;
  for (std::size_t i = 0; i < count; ++i) out += part;
  return out;
}

// ---- UTF-8 ----

TEST(Utf8, KnowsTheBordersOfEveryLength) {
  for (const auto& text : {""s, "a"s, "\0"s, "\x7F"s, "\xC2\x80"s, "\xDF\xBF"s, "\xE0\xA0\x80"s,
                           "\xED\x9F\xBF"s, "\xEE\x80\x80"s, "\xEF\xBF\xBF"s, "\xF0\x90\x80\x80"s,
                           "\xF4\x8F\xBF\xBF"s, "mixed: \xC3\xA9 \xE2\x82\xAC \xF0\x9F\x90\x84"s}) {
    EXPECT_TRUE(is_utf8(text)) << printable(text);
  }
}

TEST(Utf8, RefusesBytesThatTable37DoesNotList) {
  for (const auto& text : {"\x80"s,
                           "\xBF"s,
                           "a\x80"s,
                           "\xC2\x80\x80"s,  // a continuation without its start
                           "\xC0\x80"s,
                           "\xC1\xBF"s,  // overlong, 2 bytes
                           "\xE0\x80\x80"s,
                           "\xE0\x9F\xBF"s,  // overlong, 3 bytes
                           "\xF0\x80\x80\x80"s,
                           "\xF0\x8F\xBF\xBF"s,  // overlong, 4 bytes
                           "\xED\xA0\x80"s,
                           "\xED\xBF\xBF"s,              // surrogates
                           "\xED\xA0\xBD\xED\xB2\xA9"s,  // a surrogate pair (CESU-8)
                           "\xF4\x90\x80\x80"s,
                           "\xF5\x80\x80\x80"s,  // over U+10FFFF
                           "\xF8\x88\x80\x80\x80"s,
                           "\xFE"s,
                           "\xFF"s,  // never UTF-8
                           "\xC2"s,
                           "\xE2\x82"s,
                           "\xF0\x9F\x90"s,
                           "\xF0"s,  // cut off
                           "\xC2\x41"s,
                           "\xE2\x82\x41"s,
                           "\xE2\x41\xAC"s,
                           "\xF0\x9F\x90\x41"s,
                           "\xC2\xC2\x80"s}) {
    EXPECT_FALSE(is_utf8(text)) << printable(text);
  }
}

TEST(Utf8, TakesEachCodePointInItsShortestFormOnly) {
  struct Range {
    std::uint32_t least, most;
  };
  const std::vector<Range> shortest = {{0, 0x7F}, {0x80, 0x7FF}, {0x800, 0xFFFF}, {0x10000, 0x10FFFF}};
  const std::vector<std::uint32_t> patterns = {1U << 7U, 1U << 11U, 1U << 16U, 1U << 21U};
  for (std::size_t length = 1; length <= 4; ++length) {
    const auto [least, most] = shortest[length - 1];
    for (std::uint32_t code = 0; code < patterns[length - 1]; ++code) {
      const bool is_surrogate = code >= 0xD800 && code <= 0xDFFF;
      const bool expected = code >= least && code <= most && !is_surrogate;
      ASSERT_EQ(is_utf8(pattern_of(code, length)), expected)
          << std::hex << code << " in " << length << " bytes";
    }
  }
}

// ---- Names ----

TEST(ArrayName, MayBeAnyUtf8WithoutControlCharacters) {
  for (const auto& name : {"a"s, "train/x"s, "with spaces"s, R"("quoted")"s, "\xC2\xA0"s,
                           "\xC3\xA9t\xC3\xA9"s, "\xF0\x9F\x90\x84"s, "~"s, ".."s, std::string(255, 'n')}) {
    EXPECT_THAT(check_name(name), Succeeds()) << printable(name);
  }
}

TEST(ArrayName, IsNotEmpty) {
  EXPECT_THAT(check_name(""), FailsWith(Errc::invalid_name));
}

TEST(ArrayName, HasAtMost255Bytes) {
  EXPECT_THAT(check_name(std::string(255, 'n')), Succeeds());
  EXPECT_THAT(check_name(std::string(256, 'n')), FailsWith(Errc::invalid_name));
  EXPECT_THAT(check_name(repeated("\xC3\xA9", 127) + "n"), Succeeds()) << "255 bytes, 128 characters";
  EXPECT_THAT(check_name(repeated("\xC3\xA9", 128)), FailsWith(Errc::invalid_name))
      << "256 bytes, 128 characters";
  EXPECT_THAT(check_name(std::string(std::size_t{1} << 20, 'n')), FailsWith(Errc::invalid_name));
}

TEST(ArrayName, HoldsNoControlCharacterAnywhere) {
  for (std::uint32_t code = 0; code < 0x100; ++code) {
    const bool is_control = code < 0x20 || (code >= 0x7F && code <= 0x9F);
    const std::string character = pattern_of(code, code < 0x80 ? 1 : 2);
    for (const auto& name :
         {character, "before" + character, character + "after", "in" + character + "side"}) {
      EXPECT_EQ(check_name(name).has_value(), !is_control) << printable(name);
    }
  }
}

TEST(ArrayName, SaysWhichRuleIsBroken) {
  EXPECT_THAT(check_name("").error().message, testing::HasSubstr("empty"));
  EXPECT_THAT(check_name(std::string(300, 'n')).error().message, testing::HasSubstr("300 bytes"));
  EXPECT_THAT(check_name("bell\a").error().message, testing::HasSubstr("U+0007"));
  EXPECT_THAT(check_name("\xFF").error().message, testing::HasSubstr("not UTF-8"));
  EXPECT_THAT(check_name("\xFF\n"), FailsWith(Errc::invalid_name)) << "and the message is clean";
}

TEST(InstanceName, IsWhatMayStandInAFileName) {
  for (const auto& name : {"default"s, "a"s, "A-1_z"s, std::string(64, 'i')}) {
    EXPECT_THAT(check_instance(name), Succeeds()) << name;
  }
  for (const auto& name :
       {""s, std::string(65, 'i'), "a/b"s, ".."s, "a.b"s, "a b"s, "a\n"s, "a\0b"s, "\xC3\xA9"s, "*"s}) {
    EXPECT_THAT(check_instance(name), FailsWith(Errc::invalid_argument)) << printable(name);
  }
}

// ---- Text for a message ----

TEST(Printable, QuotesAndEscapes) {
  struct Case {
    std::string text, expected;
  };
  for (const auto& [text, expected] :
       std::vector<Case>{{"", R"("")"},
                         {"plain", R"("plain")"},
                         {"\xC3\xA9\xF0\x9F\x90\x84", "\"\xC3\xA9\xF0\x9F\x90\x84\""},
                         {"say \"hi\"", R"("say \x22hi\x22")"},
                         {"back\\slash", R"("back\x5cslash")"},
                         {"a\nb\x1B[31m", R"("a\x0ab\x1b[31m")"},
                         {"\0"s, R"("\x00")"},
                         {"\x7F", R"("\x7f")"},
                         {"\xC2\x85", R"("\xc2\x85")"},
                         {"\xFF\xFE", R"("\xff\xfe")"},
                         {"\xE2\x82", R"("\xe2\x82")"},
                         {"\xE2\x82(", R"("\xe2\x82(")"}}) {
    EXPECT_EQ(printable(text), expected);
  }
}

TEST(Printable, CutsWhatIsLong) {
  EXPECT_EQ(printable(std::string(120, 'x')), '"' + std::string(120, 'x') + '"');
  EXPECT_EQ(printable(std::string(121, 'x')), '"' + std::string(120, 'x') + "\"...");
}

TEST(Printable, CutsBetweenCharactersOnly) {
  for (const auto& character : {"\xC3\xA9"s, "\xE2\x82\xAC"s, "\xF0\x9F\x90\x84"s}) {
    for (std::size_t before = 0; before < 4; ++before) {
      const auto text = std::string(before, 'x') + repeated(character, 120);
      const auto printed = printable(text);
      EXPECT_EQ(printed.find("\\x"), std::string::npos) << printed;
      EXPECT_TRUE(printed.ends_with("\"...")) << printed;
      EXPECT_GE(printed.size(), 117U);
    }
  }
}

TEST(Printable, StillEscapesACharacterThatIsReallyCutOff) {
  EXPECT_EQ(printable(std::string(119, 'x') + "\xE2"), '"' + std::string(119, 'x') + "\\xe2\"");
  EXPECT_EQ(printable(repeated("\x80", 130)), '"' + repeated("\\x80", 120) + "\"...");
}

// ---- Sizes ----

TEST(Size, IsReadAsPeopleTypeIt) {
  constexpr std::uint64_t kKi = 1024;
  struct Case {
    std::string text;
    std::uint64_t expected;
  };
  for (const auto& [text, expected] : std::vector<Case>{{"0", 0},
                                                        {"0B", 0},
                                                        {"4096", 4096},
                                                        {"4096b", 4096},
                                                        {"1.5GiB", 3 * kKi * kKi * kKi / 2},
                                                        {"200MB", 200'000'000},
                                                        {"200 MB", 200'000'000},
                                                        {"200mb", 200'000'000},
                                                        {" 4 k", 4 * kKi},
                                                        {"4k ", 4 * kKi},
                                                        {"2g", 2 * kKi * kKi * kKi},
                                                        {"2Gi", 2 * kKi * kKi * kKi},
                                                        {"1KB", 1000},
                                                        {"1Ki", kKi},
                                                        {"1kib", kKi},
                                                        {"3T", 3 * kKi * kKi * kKi * kKi},
                                                        {"3TB", 3'000'000'000'000},
                                                        {"0.5k", 512},
                                                        {".5k", 512},
                                                        {"1.MB", 1'000'000},
                                                        {"8388607T", 8388607 * kKi * kKi * kKi * kKi}}) {
    const auto size = parse_size(text);
    ASSERT_THAT(size, Succeeds()) << printable(text);
    EXPECT_EQ(*size, expected) << printable(text);
  }
}

TEST(Size, IsRefusedWhereItMeansNothing) {
  for (const auto& text : {""s,
                           " "s,
                           "."s,
                           "k"s,
                           "MB"s,
                           "-1"s,
                           "-1k"s,
                           "+1"s,
                           "1e3"s,
                           "1e3k"s,
                           "0x10"s,
                           "nan"s,
                           "inf"s,
                           "infinity"s,
                           "1,5G"s,
                           "1_000"s,
                           "1..5"s,
                           "1.5.2k"s,
                           "1 0"s,
                           "1 0 k"s,
                           "1. 5k"s,
                           "2 M B"s,
                           "2M iB"s,
                           "5X"s,
                           "5kk"s,
                           "5ib"s,
                           "5bb"s,
                           "5KBi"s,
                           "5kibi"s,
                           "4\tk"s,
                           "4k\n"s,
                           "4\0k"s,
                           "4k\0"s,
                           "\xFF"s,
                           "\xD9\xA3"s,
                           "9999999P"s,
                           "8388608T"s,
                           "9223372036854775808"s,
                           std::string(400, '9'),
                           std::string(100'000, '1') + "k"}) {
    EXPECT_THAT(parse_size(text), FailsWith(Errc::invalid_argument)) << printable(text);
  }
}

TEST(Size, IsWrittenWithThreeSignificantDigits) {
  struct Case {
    std::uint64_t size;
    std::string expected;
  };
  constexpr auto kMost = std::numeric_limits<std::uint64_t>::max();
  for (const auto& [size, expected] : std::vector<Case>{{0, "0 B"},
                                                        {1, "1 B"},
                                                        {1023, "1023 B"},
                                                        {1024, "1 KiB"},
                                                        {1029, "1 KiB"},
                                                        {1030, "1.01 KiB"},
                                                        {1536, "1.5 KiB"},
                                                        {10234, "9.99 KiB"},
                                                        {10235, "10 KiB"},
                                                        {10291, "10 KiB"},
                                                        {10292, "10.1 KiB"},
                                                        {102348, "99.9 KiB"},
                                                        {102349, "100 KiB"},
                                                        {1023487, "999 KiB"},
                                                        {1023488, "0.976 MiB"},  // never 1000 KiB
                                                        {1048051, "0.999 MiB"},
                                                        {1048052, "1 MiB"},
                                                        {1048575, "1 MiB"},
                                                        {1048576, "1 MiB"},
                                                        {197132288, "188 MiB"},
                                                        {1610612736, "1.5 GiB"},
                                                        {std::uint64_t{1} << 40U, "1 TiB"},
                                                        {std::uint64_t{1} << 50U, "1 PiB"},
                                                        {(std::uint64_t{1} << 60U) - 1, "1 EiB"},
                                                        {kMost, "16 EiB"}}) {
    EXPECT_EQ(format_size(size), expected) << size;
  }
}

TEST(Size, ReadsBackWhatItWrote) {
  for (unsigned shift = 0; shift < 58; ++shift) {
    for (const std::uint64_t factor : {4U, 5U, 6U, 7U}) {
      const std::uint64_t size = (factor << shift) / 4;
      const auto back = parse_size(format_size(size));
      ASSERT_THAT(back, Succeeds()) << size;
      EXPECT_NEAR(static_cast<double>(*back), static_cast<double>(size), static_cast<double>(size) * 0.005);
    }
  }
}

}  // namespace
}  // namespace cowmgr
