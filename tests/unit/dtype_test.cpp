#include "proto/dtype.hpp"

#include <complex>
#include <cstdint>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/npy.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using namespace std::string_literals;

struct Canonical {
  std::string text, expected;
  std::uint64_t item_bytes;
};

void expect_canonical(const std::vector<Canonical>& cases) {
  for (const auto& [text, expected, item_bytes] : cases) {
    const auto dtype = Dtype::parse(text);
    ASSERT_THAT(dtype, Succeeds()) << text;
    EXPECT_EQ(dtype->str(), expected) << text;
    EXPECT_EQ(dtype->item_bytes(), item_bytes) << text;
    EXPECT_EQ(Dtype::parse(expected), dtype) << "the canonical text stands for the same type: " << text;
  }
}

void expect_refused(const std::vector<std::string>& texts) {
  for (const auto& text : texts) {
    EXPECT_THAT(Dtype::parse(text), FailsWith(Errc::invalid_dtype)) << printable(text);
  }
}

// [('a', [('a', ... inner ...)])], `levels` lists deep.
std::string nested(int levels, std::string inner) {
  for (int i = 0; i < levels; ++i) inner = fmt::format("[('a', {})]", inner);
  return inner;
}

// ---- Scalars ----

TEST(Dtype, ReadsEveryKindAndSizeOfScalar) {
  expect_canonical({
      {"|b1", "|b1", 1},         {"|i1", "|i1", 1},       {"<i2", "<i2", 2},    {"<i4", "<i4", 4},
      {"<i8", "<i8", 8},         {"|u1", "|u1", 1},       {"<u2", "<u2", 2},    {"<u4", "<u4", 4},
      {"<u8", "<u8", 8},         {"<f2", "<f2", 2},       {"<f4", "<f4", 4},    {"<f8", "<f8", 8},
      {"<f16", "<f16", 16},      {"<c8", "<c8", 8},       {"<c16", "<c16", 16}, {"<c32", "<c32", 32},
      {"<M8[ns]", "<M8[ns]", 8}, {"<m8[s]", "<m8[s]", 8}, {"<M8", "<M8", 8},    {"<m8", "<m8", 8},
      {"|S12", "|S12", 12},      {"<U5", "<U5", 20},      {"|V16", "|V16", 16}, {"|S0", "|S0", 0},
      {"<U0", "<U0", 0},         {"|V0", "|V0", 0},
  });
}

TEST(Dtype, TakesLittleEndianWhereNoOrderIsSaid) {
  expect_canonical({{"f4", "<f4", 4},
                    {"=f4", "<f4", 4},
                    {"<f4", "<f4", 4},
                    {"u1", "|u1", 1},
                    {"=u1", "|u1", 1},
                    {"M8[ns]", "<M8[ns]", 8},
                    {"U3", "<U3", 12},
                    {"S3", "|S3", 3},
                    {"=c16", "<c16", 16}});
}

TEST(Dtype, KeepsBigEndian) {
  expect_canonical(
      {{">i2", ">i2", 2}, {">f8", ">f8", 8}, {">c8", ">c8", 8}, {">M8[D]", ">M8[D]", 8}, {">U2", ">U2", 8}});
  EXPECT_NE(Dtype::parse(">f4"), Dtype::parse("<f4"));
}

TEST(Dtype, DropsAnOrderThatMeansNothing) {
  expect_canonical(
      {{">u1", "|u1", 1}, {"<i1", "|i1", 1}, {"=b1", "|b1", 1}, {">S3", "|S3", 3}, {"<V4", "|V4", 4}});
}

TEST(Dtype, WantsAnOrderWhereThereAreTwo) {
  expect_refused({"|i2", "|i4", "|u8", "|f2", "|f4", "|c8", "|U1", "|M8", "|m8[s]"});
}

TEST(Dtype, RefusesSizesThatNumPyDoesNotHave) {
  expect_refused({"b",          "b0",  "b2",  "b4",   "i",     "i0",    "i3",     "i5",
                  "i16",        "u0",  "u3",  "u16",  "f",     "f0",    "f1",     "f3",
                  "f12",        "f32", "c2",  "c4",   "c24",   "c64",   "M1",     "M4",
                  "M16",        "m4",  "M8s", "S",    "U",     "V",     "f-4",    "f+4",
                  "f 4",        "f4 ", " f4", "f4f4", "f4,f4", "<f4\n", "<f4\0"s, "i18446744073709551617",
                  "i4294967300"});
}

TEST(Dtype, RefusesWhatIsNoTypeString) {
  expect_refused({"",
                  "<",
                  ">",
                  "=",
                  "|",
                  "<<f4",
                  "<=f4",
                  "4",
                  "<4",
                  "float32",
                  "double",
                  "int",
                  "?",
                  "a5",
                  "e",
                  "g",
                  "x4",
                  "F4",
                  "B1",
                  "T16",
                  "'<f4'",
                  "('<f4', (2,))",
                  "{'x': '<f4'}",
                  "None",
                  "<f4]",
                  "\xFF",
                  "\xC3\xA9",
                  std::string(100'000, 'f')});
}

TEST(Dtype, RefusesPythonObjectsAndSaysWhy) {
  expect_refused({"O", "|O", "<O8", "=O", "[('x', '|O')]", "[('x', 'O', (2,))]", "[('x', [('y', '|O')])]",
                  "[('a', '<f4'), ('b', [('c', [('d', '|O8')])])]"});
  EXPECT_THAT(Dtype::parse("|O").error().message, testing::HasSubstr("Python objects"));
  EXPECT_THAT(Dtype::parse("[('x', '|O')]").error().message, testing::HasSubstr("Python objects"));
}

TEST(Dtype, KnowsEveryUnitOfTime) {
  for (const std::string unit : {"Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"}) {
    for (const std::string kind : {"M8", "m8"}) {
      const auto text = fmt::format("<{}[{}]", kind, unit);
      expect_canonical(
          {{text, text, 8}, {fmt::format("<{}[25{}]", kind, unit), fmt::format("<{}[25{}]", kind, unit), 8}});
    }
  }
}

TEST(Dtype, SpellsEqualTimesEqually) {
  expect_canonical({{"<M8[generic]", "<M8", 8},
                    {"<m8[generic]", "<m8", 8},
                    {"<M8[1s]", "<M8[s]", 8},
                    {"<M8[1ns]", "<M8[ns]", 8},
                    {"<M8[10s]", "<M8[10s]", 8},
                    {"<M8[11s]", "<M8[11s]", 8}});
}

TEST(Dtype, RefusesUnitsThatNumPyDoesNotHave) {
  expect_refused({"<M8[]",      "<M8[",           "<M8]",      "<M8[]]",           "<M8[x]",
                  "<M8[B]",     "<M8[sec]",       "<M8[NS]",   "<M8[n]",           "<M8[ns",
                  "<M8ns]",     "<M8[ns]x",       "<M8[ ns]",  "<M8[ns ]",         "<M8[0s]",
                  "<M8[007s]",  "<M8[-1s]",       "<M8[1.5s]", "<M8[9999999999s]", "<M8[25]",
                  "<M8[us/10]", "<M8[25generic]", "<f4[ns]",   "<i8[s]",           "<S3[s]"});
}

TEST(Dtype, KeepsItemsBelow2GiB) {
  expect_canonical({{"|S2147483647", "|S2147483647", 2147483647},
                    {"|V2147483647", "|V2147483647", 2147483647},
                    {"<U536870911", "<U536870911", 2147483644}});
  expect_refused({"|S2147483648", "|V2147483648", "<U536870912", "|S4294967296", "|V18446744073709551615",
                  "|V18446744073709551616", "<U4611686018427387904", "|V" + std::string(100'000, '9')});
}

// ---- Structured types ----

TEST(Dtype, ReadsStructuredTypes) {
  expect_canonical({
      {"[('x', '<f4')]", "[('x', '<f4')]", 4},
      {"[('x','f4'),('y','=i2'),('z','>u1')]", "[('x', '<f4'), ('y', '<i2'), ('z', '|u1')]", 7},
      {R"([ ( "x" , "<f4" , ) , ])", "[('x', '<f4')]", 4},
      {"[('x', '<f4'), ('y', '<i2', (3,))]", "[('x', '<f4'), ('y', '<i2', (3,))]", 10},
      {"[('x', '<M8[ns]'), ('y', '|S3'), ('z', '<U2')]", "[('x', '<M8[ns]'), ('y', '|S3'), ('z', '<U2')]",
       19},
      {"[('x', '|V0')]", "[('x', '|V0')]", 0},
  });
  EXPECT_TRUE(Dtype::parse("[('x', '<f4')]")->is_structured());
  EXPECT_FALSE(Dtype::parse("<f4")->is_structured());
}

TEST(Dtype, ReadsNestedTypes) {
  expect_canonical({
      {"[('p', [('x', 'f8'), ('y', 'f8')]), ('n', 'i4')]",
       "[('p', [('x', '<f8'), ('y', '<f8')]), ('n', '<i4')]", 20},
      {"[('p', [('x', '<f8', (2,))], (3,))]", "[('p', [('x', '<f8', (2,))], (3,))]", 48},
      {"[('a', [('a', [('a', '|u1')])])]", "[('a', [('a', [('a', '|u1')])])]", 1},
  });
}

TEST(Dtype, ReadsSubArrayShapes) {
  expect_canonical({
      {"[('x', '<f4', (2, 3))]", "[('x', '<f4', (2, 3))]", 24},
      {"[('x', '<f4', (1,))]", "[('x', '<f4', (1,))]", 4},
      {"[('x', '<f4', 2)]", "[('x', '<f4', (2,))]", 8},
      {"[('x', '<f4', (2))]", "[('x', '<f4', (2,))]", 8},
      {"[('x', '<f4', (0,)), ('y', '|u1')]", "[('x', '<f4', (0,)), ('y', '|u1')]", 1},
      {"[('x', '<f4', ())]", "[('x', '<f4')]", 4},
  });
}

TEST(Dtype, RefusesSubArrayShapesThatNumPyRefuses) {
  expect_refused({"[('x', '<f4', (-1,))]", "[('x', '<f4', -1)]", "[('x', '<f4', (2, -3))]",
                  "[('x', '<f4', [2])]", "[('x', '<f4', '2')]", "[('x', '<f4', None)]",
                  "[('x', '<f4', True)]", "[('x', '<f4', (True,))]", "[('x', '<f4', ((2,),))]",
                  "[('x', '<f4', (2147483648, 0))]", "[('x', '<f4', (0, 2147483648))]",
                  "[('x', '<f4', (0, 9223372036854775807))]", "[('x', '|V0', (4611686018427387904,))]"});
}

TEST(Dtype, GivesNoShapeToAFieldWithoutSize) {
  expect_refused(
      {"[('x', '|S0', (2,))]", "[('x', '<U0', (2, 3))]", "[('x', '|V0', (0,))]", "[('', '|V0', (2,))]"});
  expect_canonical({{"[('x', '|S0', ())]", "[('x', '|S0')]", 0},
                    {"[('x', [('y', '|S0')], (2,))]", "[('x', [('y', '|S0')], (2,))]", 0}});
}

TEST(Dtype, GivesASubArrayAtMost32Dimensions) {
  const auto with_axes = [](int count) {
    std::string shape;
    for (int i = 0; i < count; ++i) shape += "1, ";
    return "[('x', '<f4', (" + shape + "))]";
  };
  EXPECT_THAT(Dtype::parse(with_axes(32)), Succeeds());
  expect_refused({with_axes(33), with_axes(10'000)});
}

TEST(Dtype, ReadsTitles) {
  expect_canonical({
      {"[(('a title', 'x'), '<f4')]", "[(('a title', 'x'), '<f4')]", 4},
      {"[((\"it's\", 'x'), '<f4'), (('y?', 'y'), 'f4', (2,))]",
       R"([(("it's", 'x'), '<f4'), (('y?', 'y'), '<f4', (2,))])", 12},
      {"[(('', 'x'), '<f4')]", "[(('', 'x'), '<f4')]", 4},
  });
  expect_refused({"[(('t',), '<f4')]", "[(('t', 'x', 'y'), '<f4')]", "[((1, 'x'), '<f4')]",
                  "[(('t', 1), '<f4')]", "[(['t', 'x'], '<f4')]", "[((), '<f4')]", "[(None, '<f4')]",
                  "[((None, 'x'), '<f4')]"});
}

TEST(Dtype, RefusesNamesThatAreTaken) {
  expect_refused({
      "[('x', '<f4'), ('x', '<f4')]",
      "[('x', '<f4'), ('y', '<f4'), ('x', '|u1')]",
      R"([('a', '<f4'), ('\x61', '<f4')])",
      "[(('t', 'x'), '<f4'), (('u', 'x'), '<f4')]",
      "[(('t', 'x'), '<f4'), (('t', 'y'), '<f4')]",
      "[(('x', 'x'), '<f4')]",
      "[('x', '<f4'), (('x', 'y'), '<f4')]",
      "[(('x', 'y'), '<f4'), ('x', '<f4')]",
      "[('p', [('x', '<f4'), ('x', '<f4')])]",
  });
  EXPECT_THAT(Dtype::parse("[('p', [('x', '<f4')]), ('x', '<f4')]"), Succeeds())
      << "each level has names of its own";
}

TEST(Dtype, SpellsPaddingAsOneField) {
  expect_canonical({
      {"[('x', '|u1'), ('', '|V3'), ('y', '<f4')]", "[('x', '|u1'), ('', '|V3'), ('y', '<f4')]", 8},
      {"[('x', '|u1'), ('', '|V1'), ('', '|V2')]", "[('x', '|u1'), ('', '|V3')]", 4},
      {"[('x', '|u1'), ('', '|V2', (2,)), ('', '|u1', (3,))]", "[('x', '|u1'), ('', '|V7')]", 8},
      {"[('', '|V4'), ('x', '|u1'), ('', '|V4')]", "[('', '|V4'), ('x', '|u1'), ('', '|V4')]", 9},
      {"[('x', '|u1'), ('', '|V0')]", "[('x', '|u1')]", 1},
      {"[('', '|V4')]", "[('', '|V4')]", 4},
  });
}

// numpy.lib.format.descr_to_dtype() takes an empty name for padding only where the type is void or a
// sub-array.
TEST(Dtype, TakesAnEmptyNameOfAnotherTypeForAName) {
  expect_canonical({{"[('', '<f4')]", "[('', '<f4')]", 4},
                    {"[('', [('x', '<f4')]), ('y', '|u1')]", "[('', [('x', '<f4')]), ('y', '|u1')]", 5},
                    {"[(('t', ''), '|V4')]", "[(('t', ''), '|V4')]", 4}});
  expect_refused({"[('', '<f4'), ('', '<f4')]", "[('', '<f4'), ('', [('x', '|u1')])]",
                  "[(('t', ''), '|V4'), ('', '<f4')]"});
}

TEST(Dtype, RefusesFieldsThatAreNone) {
  expect_refused({"[]", "[('', '|V0')]", "[()]", "[('x',)]", "[('x')]", "['x']", "[('x', '<f4', (2,), 1)]",
                  "[['x', '<f4']]", "[(1, '<f4')]", "[('x', 4)]", "[('x', None)]", "[('x', '')]",
                  "[('x', [])]", "[('x', '[]')]", "[('x', \"[('y', '<f4')]\")]", "[('x', ('<f4', (2,)))]",
                  "[('x', {'y': '<f4'})]", "[None]", "[[]]"});
}

TEST(Dtype, RefusesListsThatAreCutOff) {
  const std::string whole = R"([(('t', 'x'), '<f4', (2, 3)), ('y', [('z\n', '<M8[ns]')])])";
  ASSERT_THAT(Dtype::parse(whole), Succeeds());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THAT(Dtype::parse(whole.substr(0, size)), FailsWith(Errc::invalid_dtype)) << whole.substr(0, size);
  }
  expect_refused({whole + "]", whole + "x", whole + whole, whole + ",", "[" + whole + "]"});
  EXPECT_THAT(Dtype::parse(whole + " "), Succeeds());
}

TEST(Dtype, KeepsStructuredItemsBelow2GiB) {
  expect_canonical(
      {{"[('x', '|V2147483646'), ('y', '|u1')]", "[('x', '|V2147483646'), ('y', '|u1')]", 2147483647},
       {"[('x', '|u1', (2147483647,))]", "[('x', '|u1', (2147483647,))]", 2147483647}});
  expect_refused({
      "[('x', '|V2147483647'), ('y', '|u1')]",
      "[('x', '|u1', (2147483647,)), ('y', '|u1')]",
      "[('x', '<f4', (536870912,))]",
      "[('x', '<f8', (1073741824, 1073741824))]",
      "[('x', '|u1', (2147483647, 2147483647, 2147483647))]",
      "[('x', '|V2147483647', (2147483647, 2147483647))]",
      "[('x', [('y', '|V2147483647')], (2,))]",
      "[('x', [('y', '<f4', (65536,))], (65536,))]",
      "[('x', '|V1073741824'), ('y', '|V1073741824')]",
      "[('x', '|V1073741824'), ('', '|V1073741824')]",
      "[('', '|V2147483647'), ('', '|V2147483647'), ('', '|V2147483647')]",
  });
}

TEST(Dtype, KeepsFieldNamesOfAllKinds) {
  expect_canonical({
      {"[('\xC3\xA9', '<f4'), ('\xF0\x9F\x90\x84', '<i2')]",
       "[('\xC3\xA9', '<f4'), ('\xF0\x9F\x90\x84', '<i2')]", 6},
      {R"([('it\'s', '<f4')])", R"([("it's", '<f4')])", 4},
      {R"([('a\\', '<f4')])", R"([('a\\', '<f4')])", 4},
      {R"([('a\n\x00\x85', '<f4')])", R"([('a\n\x00\x85', '<f4')])", 4},
      {"[('a\nb', '<f4')]", R"([('a\nb', '<f4')])", 4},
      {R"([('\u00e9', '<f4')])", "[('\xC3\xA9', '<f4')]", 4},
  });
  expect_refused({"[('\xFF', '<f4')]", "[('\xED\xA0\x80', '<f4')]", R"([('\ud800', '<f4')])"});
}

// ---- Depth ----

TEST(Dtype, NestsAsDeepAsAHeaderCanSay) {
  int deepest = 0;
  while (deepest < 100 && Dtype::parse(nested(deepest + 1, "'<f4'"))) ++deepest;
  EXPECT_GE(deepest, 8);
  EXPECT_LT(deepest, 32);
  const auto dtype = Dtype::parse(nested(deepest - 1, "[('a', '<f4', (2, 3))]"));
  ASSERT_THAT(dtype, Succeeds());
  const auto header = make_npy_header({*dtype, {1}}, 4096);
  ASSERT_THAT(header, Succeeds());
  const auto back = parse_npy_header(std::as_bytes(std::span(*header)));
  ASSERT_THAT(back, Succeeds()) << "what may be created can be read again";
  EXPECT_EQ(back->spec.dtype, *dtype);
}

TEST(Dtype, SurvivesADepthBomb) {
  constexpr int kMany = 100'000;
  std::string fields;
  for (int i = 0; i < kMany; ++i) fields += "[('a', ";
  expect_refused({std::string(kMany, '['), std::string(kMany, '[') + std::string(kMany, ']'), fields,
                  nested(100, "'<f4'"), "[(" + std::string(kMany, '('),
                  "[('x', '<f4', " + std::string(kMany, '(')});
}

TEST(Dtype, TakesManyFields) {
  std::string text = "[";
  for (int i = 0; i < 5000; ++i) text += fmt::format("('f{}', '|u1'), ", i);
  const auto dtype = Dtype::parse(text + "]");
  ASSERT_THAT(dtype, Succeeds());
  EXPECT_EQ(dtype->item_bytes(), 5000U);
}

// ---- Literals, C++ types ----

TEST(Dtype, IsALiteralOfItself) {
  EXPECT_EQ(Dtype::parse("<f4")->to_literal(), "'<f4'");
  EXPECT_EQ(Dtype::parse("[('x', '<f4')]")->to_literal(), "[('x', '<f4')]");
  for (const std::string text :
       {"<f4", "|S3", "<M8[25us]", R"([(('t', '\n'), '<f4', (2,)), ('', '|V3'), ('y', '|u1')])"}) {
    const auto dtype = Dtype::parse(text);
    ASSERT_THAT(dtype, Succeeds());
    const auto literal = parse_py_literal(dtype->to_literal());
    ASSERT_THAT(literal, Succeeds());
    EXPECT_EQ(Dtype::from_literal(*literal), dtype);
  }
}

TEST(Dtype, RefusesLiteralsOfOtherKinds) {
  for (const std::string text :
       {"None", "True", "4", "()", "('x', '<f4')", "{}", "{'x': '<f4'}", "''", "'[]'"}) {
    EXPECT_THAT(Dtype::from_literal(*parse_py_literal(text)), FailsWith(Errc::invalid_dtype)) << text;
  }
}

template <class T>
void expect_cpp_type(const std::string& expected) {
  EXPECT_EQ(Dtype::of<T>().str(), expected);
  EXPECT_EQ(Dtype::of<T>().item_bytes(), sizeof(T));
  EXPECT_EQ(Dtype::parse(expected), Dtype::of<T>());
}

TEST(Dtype, NamesCppTypes) {
  expect_cpp_type<bool>("|b1");
  expect_cpp_type<std::int8_t>("|i1");
  expect_cpp_type<std::int16_t>("<i2");
  expect_cpp_type<std::int32_t>("<i4");
  expect_cpp_type<std::int64_t>("<i8");
  expect_cpp_type<std::uint8_t>("|u1");
  expect_cpp_type<std::uint16_t>("<u2");
  expect_cpp_type<std::uint32_t>("<u4");
  expect_cpp_type<std::uint64_t>("<u8");
  expect_cpp_type<long long>("<i8");
  expect_cpp_type<char16_t>("<u2");
  expect_cpp_type<float>("<f4");
  expect_cpp_type<double>("<f8");
  expect_cpp_type<long double>("<f16");
  expect_cpp_type<std::complex<float>>("<c8");
  expect_cpp_type<std::complex<double>>("<c16");
  static_assert(!Scalar<void*> && !Scalar<std::complex<int>> && !Scalar<std::string>);
}

}  // namespace
}  // namespace cowmgr
