#include "proto/py_literal.hpp"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using namespace std::string_literals;
using Kind = PyLiteral::Kind;

// The literal again, in one spelling: what was understood, for comparison.
std::string repr(const PyLiteral& value) {
  std::string inner;
  for (std::size_t i = 0; i < value.items.size(); ++i) {
    if (value.kind == Kind::dict) inner += py_quote(value.keys[i]) + ": ";
    inner += repr(value.items[i]) + (i + 1 < value.items.size() ? ", " : "");
  }
  switch (value.kind) {
    case Kind::none:
      return "None";
    case Kind::boolean:
      return value.boolean ? "True" : "False";
    case Kind::integer:
      return std::to_string(value.integer);
    case Kind::string:
      return py_quote(value.string);
    case Kind::tuple:
      return fmt::format("({}{})", inner, value.items.size() == 1 ? "," : "");
    case Kind::list:
      return fmt::format("[{}]", inner);
    default:
      return fmt::format("{{{}}}", inner);
  }
}

std::string nested(std::size_t levels, const std::string& open, const std::string& inner,
                   const std::string& close) {
  std::string out;
  for (std::size_t i = 0; i < levels; ++i) out += open;
  out += inner;
  for (std::size_t i = 0; i < levels; ++i) out += close;
  return out;
}

TEST(PyLiteral, ReadsWhatNumPyWrites) {
  struct Case {
    std::string text, expected;
  };
  for (const auto& [text, expected] :
       std::vector<Case>{{"None", "None"},
                         {"True", "True"},
                         {" False\n", "False"},
                         {"0", "0"},
                         {"-12", "-12"},
                         {"60000L", "60000"},
                         {"9223372036854775807", "9223372036854775807"},
                         {"-9223372036854775808", "-9223372036854775808"},
                         {"''", "''"},
                         {"'<f4'", "'<f4'"},
                         {"\"<f4\"", "'<f4'"},
                         {"()", "()"},
                         {"(3,)", "(3,)"},
                         {"(3)", "3"},
                         {"((3))", "3"},
                         {"((3,))", "(3,)"},
                         {"(60000, 784)", "(60000, 784)"},
                         {"( 60000 ,\t784 , )", "(60000, 784)"},
                         {"[]", "[]"},
                         {"[1]", "[1]"},
                         {"[1,]", "[1]"},
                         {"[('x', '<f4'), ('y', '<i2', (3,))]", "[('x', '<f4'), ('y', '<i2', (3,))]"},
                         {"{}", "{}"},
                         {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
                          "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}"},
                         {"{'a':[{'b':None}]}", "{'a': [{'b': None}]}"}}) {
    const auto value = parse_py_literal(text);
    ASSERT_THAT(value, Succeeds()) << text;
    EXPECT_EQ(repr(*value), expected);
  }
}

TEST(PyLiteral, KeepsTheKindsApart) {
  EXPECT_EQ(parse_py_literal("None")->kind, Kind::none);
  EXPECT_EQ(parse_py_literal("True")->kind, Kind::boolean);
  EXPECT_EQ(parse_py_literal("1")->kind, Kind::integer);
  EXPECT_EQ(parse_py_literal("'1'")->kind, Kind::string);
  EXPECT_EQ(parse_py_literal("(1,)")->kind, Kind::tuple);
  EXPECT_EQ(parse_py_literal("[1]")->kind, Kind::list);
  EXPECT_EQ(parse_py_literal("{'1': 1}")->kind, Kind::dict);
}

TEST(PyLiteral, FindsADictsValues) {
  const auto dict = parse_py_literal("{'a': 1, 'b': (2,), '': None}");
  ASSERT_THAT(dict, Succeeds());
  EXPECT_EQ(dict->find("a")->integer, 1);
  EXPECT_EQ(dict->find("b")->items.front().integer, 2);
  EXPECT_EQ(dict->find("")->kind, Kind::none);
  EXPECT_EQ(dict->find("c"), nullptr);
  EXPECT_EQ(dict->find("A"), nullptr);
}

TEST(PyLiteral, RefusesWhatIsNotOneLiteral) {
  for (const auto& text : {""s,
                           " "s,
                           ","s,
                           ":"s,
                           ")"s,
                           "]"s,
                           "}"s,
                           "none"s,
                           "true"s,
                           "Nonesense"s,
                           "True1"s,
                           "x"s,
                           "None None"s,
                           "1 2"s,
                           "1, 2"s,
                           "'a' 'b'"s,
                           "u'a'"s,
                           "b'a'"s,
                           "lambda: 1"s,
                           "__import__('os')"s,
                           "1+1"s,
                           "1.5"s,
                           "1e3"s,
                           "0x10"s,
                           "1_000"s,
                           "1LL"s,
                           "L"s,
                           "-"s,
                           "--1"s,
                           "- 1"s,
                           "+1"s,
                           "(,)"s,
                           "[,]"s,
                           "{,}"s,
                           "(1,,)"s,
                           "[1,,2]"s,
                           "[1 2]"s,
                           "(1 2)"s,
                           "(1"s,
                           "(1,"s,
                           "[1"s,
                           "[1,"s,
                           "{"s,
                           "{'a'"s,
                           "{'a':"s,
                           "{'a': 1"s,
                           "{'a': 1,"s,
                           "{'a' 1}"s,
                           "{'a': 1 'b': 2}"s,
                           "{1: 2}"s,
                           "{('a',): 2}"s,
                           "{'a'}"s,
                           "(1]"s,
                           "[1)"s,
                           "[1}"s,
                           "\0"s,
                           "1\0"s,
                           "# comment\n1"s,
                           "1 # comment"s,
                           "'a'\\\n"s,
                           "\xEF\xBB\xBF"
                           "1"s}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << printable(text);
  }
}

TEST(PyLiteral, SaysWhereItStopped) {
  EXPECT_THAT(parse_py_literal("(1, x)").error().message, testing::HasSubstr("byte 4"));
  EXPECT_THAT(parse_py_literal("(1, 2").error().message, testing::HasSubstr("byte 5"));
}

TEST(PyLiteral, RefusesIntegersOver64Bits) {
  for (const auto& text : {"9223372036854775808"s, "-9223372036854775809"s, "18446744073709551616"s,
                           std::string(100'000, '9')}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << text.substr(0, 30);
  }
}

TEST(PyLiteral, RefusesStringsWithoutTheirEnd) {
  for (const auto& text : {"'"s, "\""s, "'abc"s, "'abc\""s, "\"abc'"s, "'abc\\"s, "'abc\\'"s, "'\\x4"s,
                           "'\\u12"s, "('a"s, "{'a"s, "{'a': 'b"s, "'"s + std::string(100'000, 'a')}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << printable(text);
  }
}

TEST(PyLiteral, ReadsTheEscapesOfPythonsRepr) {
  struct Case {
    std::string text, expected;
  };
  for (const auto& [text, expected] : std::vector<Case>{{R"('it\'s')", "it's"},
                                                        {R"("it's")", "it's"},
                                                        {R"('"')", "\""},
                                                        {R"('a\\b')", "a\\b"},
                                                        {R"('\n\r\t')", "\n\r\t"},
                                                        {R"('\x00\x1b\x7f')", "\0\x1B\x7F"s},
                                                        {R"('\x85\xad')", "\xC2\x85\xC2\xAD"},
                                                        {R"('\xE9')", "\xC3\xA9"},
                                                        {R"('\u2028')", "\xE2\x80\xA8"},
                                                        {R"('\U0001f404')", "\xF0\x9F\x90\x84"},
                                                        {"'\xC3\xA9'", "\xC3\xA9"}}) {
    const auto value = parse_py_literal(text);
    ASSERT_THAT(value, Succeeds()) << text;
    EXPECT_EQ(value->string, expected) << text;
  }
}

TEST(PyLiteral, RefusesOtherEscapes) {
  for (const auto& text :
       {R"('\q')"s, R"('\0')"s, R"('\N{COW}')"s, R"('\x')"s, R"('\x4')"s, R"('\xg0')"s, R"('\x-1')"s,
        R"('\x+1')"s, R"('\u123')"s, R"('\ud83d')"s, R"('\udfff')"s, R"('\ud83d\udc04')"s, R"('\U00110000')"s,
        R"('\Uffffffff')"s, R"('\U0001f40')"s, "'\\\n'"s}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << text;
  }
}

TEST(PyLiteral, RefusesTextThatIsNotUtf8) {
  for (const auto& text : {"'\xFF'"s, "'\xC3'"s, "'\xED\xA0\x80'"s, "\xFF"s}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << printable(text);
  }
}

TEST(PyLiteral, NestsUpTo32Levels) {
  const std::vector<std::pair<std::string, std::string>> brackets = {
      {"[", "]"}, {"(", ",)"}, {"{'a': ", "}"}};
  for (const auto& [open, close] : brackets) {
    EXPECT_THAT(parse_py_literal(nested(32, open, "1", close)), Succeeds()) << open;
    EXPECT_THAT(parse_py_literal(nested(33, open, "1", close)), FailsWith(Errc::invalid_file)) << open;
  }
  EXPECT_THAT(parse_py_literal(nested(32, "[", "", "]")), Succeeds());
  EXPECT_THAT(parse_py_literal(nested(33, "[", "", "]")), FailsWith(Errc::invalid_file));
}

TEST(PyLiteral, SurvivesADepthBomb) {
  constexpr std::size_t kMany = 100'000;
  for (const std::string open : {"[", "(", "{'a': ", "[(", "{'a': ["}) {
    EXPECT_THAT(parse_py_literal(nested(kMany, open, "", "")), FailsWith(Errc::invalid_file)) << open;
  }
  EXPECT_THAT(parse_py_literal(nested(kMany, "[", "1", "]")), FailsWith(Errc::invalid_file));
}

TEST(PyLiteral, TakesManyItemsOnOneLevel) {
  const auto value = parse_py_literal("["s + nested(20'000, "(),", "", "") + "]");
  ASSERT_THAT(value, Succeeds());
  EXPECT_EQ(value->items.size(), 20'000U);
}

TEST(PyLiteral, ReportsHostileTextWithoutRepeatingItsBytes) {
  for (const auto& text : {"\x1B[2J"s, "['\n', oops"s, std::string(79, ' ') + "\xC3\xA9",
                           "["s + std::string(500, '\xFF'), "'\x01\x02"s}) {
    EXPECT_THAT(parse_py_literal(text), FailsWith(Errc::invalid_file)) << printable(text);
  }
}

// ---- Quoting ----

TEST(PyQuote, SpellsAStringAsPythonReadsIt) {
  struct Case {
    std::string text, expected;
  };
  for (const auto& [text, expected] :
       std::vector<Case>{{"", "''"},
                         {"<f4", "'<f4'"},
                         {"it's", R"("it's")"},
                         {"it's \"", R"('it\'s "')"},
                         {"\"", R"('"')"},
                         {"a\\b", R"('a\\b')"},
                         {"a\nb", R"('a\nb')"},
                         {"\r\t", R"('\r\t')"},
                         {"\0"s, R"('\x00')"},
                         {"\x1F\x7F", R"('\x1f\x7f')"},
                         {"\xC2\x80\xC2\x9F", R"('\x80\x9f')"},
                         {"\xC2\xA0", R"('\xa0')"},
                         {"\xC2\xA1", "'\xC2\xA1'"},
                         {"\xE2\x80\x8B", R"('\u200b')"},
                         {"\xF3\xA0\x80\x81", R"('\U000e0001')"},
                         {"\xC3\xA9\xF0\x9F\x90\x84", "'\xC3\xA9\xF0\x9F\x90\x84'"}}) {
    EXPECT_EQ(py_quote(text), expected);
  }
}

TEST(PyQuote, IsReadBackUnchanged) {
  for (std::uint32_t code = 0; code < 0x800; ++code) {
    const std::string character = code < 0x80 ? std::string{static_cast<char>(code)}
                                              : std::string{static_cast<char>(0xC0U | code >> 6U),
                                                            static_cast<char>(0x80U | (code & 0x3FU))};
    for (const auto& text : {character, character + "'", "\\" + character, character + character}) {
      const auto back = parse_py_literal(py_quote(text));
      ASSERT_THAT(back, Succeeds()) << printable(text);
      EXPECT_EQ(back->string, text) << printable(text);
    }
  }
}

}  // namespace
}  // namespace cowmgr
