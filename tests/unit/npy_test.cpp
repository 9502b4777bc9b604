#include "proto/npy.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using namespace std::string_literals;

constexpr std::string_view kMagic = "\x93NUMPY";

std::span<const std::byte> bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// `value` as `count` bytes, the least significant one first.
std::string little_endian(std::uint64_t value, std::size_t count) {
  std::string out;
  for (std::size_t i = 0; i < count; ++i, value >>= 8U) out += static_cast<char>(value & 0xFFU);
  return out;
}

std::string prelude(int major, std::uint64_t text_bytes) {
  return std::string(kMagic) + static_cast<char>(major) + '\0' +
         little_endian(text_bytes, major == 1 ? 2 : 4);
}

// A header as numpy.lib.format writes it: filled up with spaces and a newline to a multiple of 64 bytes.
std::string numpy_header(int major, std::string dict) {
  const std::size_t before = prelude(major, 0).size();
  dict.resize((before + dict.size() + 1 + 63) / 64 * 64 - before - 1, ' ');
  return prelude(major, dict.size() + 1) + dict + '\n';
}

// The dict alone, without padding.
std::string tight_header(int major, const std::string& dict) {
  return prelude(major, dict.size()) + dict;
}

Result<NpyHeader> parse_dict(const std::string& dict) {
  return parse_npy_header(bytes(tight_header(1, dict)));
}

Result<NpyHeader> parse_shape(const std::string& shape, const std::string& descr = "'|u1'") {
  return parse_dict(fmt::format("{{'descr': {}, 'fortran_order': False, 'shape': {}, }}", descr, shape));
}

Dtype dtype_of(const std::string& text) {
  auto dtype = Dtype::parse(text);
  EXPECT_THAT(dtype, Succeeds()) << text;
  return dtype ? *dtype : Dtype::of<bool>();
}

// ---- Reading ----

TEST(Npy, ReadsWhatNumPyWrote) {
  struct Case {
    int major;
    std::string dict;
    ArraySpec expected;
    std::uint64_t data_bytes;
  };
  for (const auto& [major, dict, expected, data_bytes] : std::vector<Case>{
           {1,
            "{'descr': '|u1', 'fortran_order': False, 'shape': (60000, 784), }",
            {dtype_of("|u1"), {60000, 784}},
            47040000},
           {1,
            "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 784), }",
            {dtype_of("|u1"), {0, 784}},
            0},
           {1,
            "{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }",
            {dtype_of(">i2"), {2, 3}, Order::fortran},
            12},
           {1, "{'descr': '<f8', 'fortran_order': False, 'shape': (), }", {dtype_of("<f8"), {}}, 8},
           {1,
            "{'descr': '<M8[25us]', 'fortran_order': False, 'shape': (4,), }",
            {dtype_of("<M8[25us]"), {4}},
            32},
           {1,
            "{'descr': [('x', '|u1'), ('', '|V3'), ('y', '<f4')], 'fortran_order': False, 'shape': (3,), }",
            {dtype_of("[('x', '|u1'), ('', '|V3'), ('y', '<f4')]"), {3}},
            24},
           {1,
            R"({'descr': [(("it's\n", 'x'), '<f4')], 'fortran_order': False, 'shape': (1,), })",
            {dtype_of(R"([(('it\'s\n', 'x'), '<f4')])"), {1}},
            4},
           {1,
            "{'descr': [('\xE9', '<f4')], 'fortran_order': False, 'shape': (1,), }",
            {dtype_of("[('\xC3\xA9', '<f4')]"), {1}},
            4},
           {2,
            "{'descr': [('\xE9', '<f4')], 'fortran_order': False, 'shape': (1,), }",
            {dtype_of("[('\xC3\xA9', '<f4')]"), {1}},
            4},
           {2,
            "{'descr': [('x', '<f4'), ('y', '<i2', (3,))], 'fortran_order': False, 'shape': (3,), }",
            {dtype_of("[('x', '<f4'), ('y', '<i2', (3,))]"), {3}},
            30},
           {3,
            "{'descr': [('\xF0\x9F\x90\x84', '<f4')], 'fortran_order': False, 'shape': (1,), }",
            {dtype_of("[('\xF0\x9F\x90\x84', '<f4')]"), {1}},
            4}}) {
    const auto file = numpy_header(major, dict);
    const auto header = parse_npy_header(bytes(file));
    ASSERT_THAT(header, Succeeds()) << dict;
    EXPECT_EQ(header->spec, expected) << dict;
    EXPECT_EQ(header->data_offset, file.size());
    EXPECT_EQ(header->data_bytes, data_bytes);
    EXPECT_EQ(header->data_offset % 64, 0U);
  }
}

TEST(Npy, ReadsWhatPython2AndOthersWrote) {
  EXPECT_EQ(parse_shape("(60000L, 784L)")->spec.shape, (Shape{60000, 784}));
  EXPECT_EQ(parse_dict("{'shape':(3,),'fortran_order':False,'descr':'<f4'}")->spec.shape, (Shape{3}))
      << "any order";
  EXPECT_EQ(parse_dict("{\"descr\":\"<f4\",\"fortran_order\":False,\"shape\":(3,)}")->data_bytes, 12U);
  EXPECT_EQ(parse_dict("\n{'descr': 'f4' , 'fortran_order' : True,\t'shape': (3 , ) , }  \n")->spec.order,
            Order::fortran);
}

TEST(Npy, LeavesTheDataAlone) {
  const auto file = numpy_header(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }");
  const auto with_data = file + "\xFF{'" + std::string(5000, '\0');
  EXPECT_EQ(parse_npy_header(bytes(with_data))->data_offset, file.size());
}

TEST(Npy, RefusesAFileThatEndsAnywhereInItsHeader) {
  for (const int major : {1, 2, 3}) {
    const auto file =
        numpy_header(major, "{'descr': [('x', '<f4', (2,))], 'fortran_order': False, 'shape': (3, 4), }");
    ASSERT_THAT(parse_npy_header(bytes(file)), Succeeds());
    for (std::size_t size = 0; size < file.size(); ++size) {
      EXPECT_THAT(parse_npy_header(bytes(file.substr(0, size))), FailsWith(Errc::invalid_file))
          << major << ", " << size;
    }
  }
}

TEST(Npy, RefusesADictThatEndsAnywhere) {
  const std::string dict = "{'descr': [('x', '<f4', (2,))], 'fortran_order': False, 'shape': (3, 4), }";
  for (std::size_t size = 0; size < dict.size(); ++size) {
    const std::string cut = dict.substr(0, size);
    EXPECT_THAT(parse_dict(cut), FailsWith(Errc::invalid_file)) << cut;
    EXPECT_THAT(parse_dict(cut + std::string(dict.size() - size, ' ')), FailsWith(Errc::invalid_file)) << cut;
  }
}

TEST(Npy, RefusesAHeaderLengthThatLies) {
  const std::string dict = "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }";
  const std::string dict_and_data = dict + std::string(200, '\x01');
  for (const int major : {1, 2, 3}) {
    for (const std::size_t lie :
         {std::size_t{0}, std::size_t{1}, dict.size() - 1, dict.size() + 1, dict.size() + 200}) {
      EXPECT_THAT(parse_npy_header(bytes(prelude(major, lie).append(dict_and_data))),
                  FailsWith(Errc::invalid_file))
          << lie;
    }
    EXPECT_THAT(parse_npy_header(bytes(prelude(major, 65535).append(dict_and_data))),
                FailsWith(Errc::invalid_file));
  }
}

TEST(Npy, ReadsHeadersOfUpTo64KiB) {
  const auto padded = [](int major, std::size_t whole) {
    std::string dict = "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }";
    dict.resize(whole - prelude(major, 0).size(), ' ');
    return tight_header(major, dict);
  };
  for (const int major : {1, 2, 3}) {
    EXPECT_EQ(parse_npy_header(bytes(padded(major, kMaxNpyHeaderBytes)))->data_offset, kMaxNpyHeaderBytes);
    EXPECT_THAT(parse_npy_header(bytes(padded(major, kMaxNpyHeaderBytes + 1))),
                FailsWith(Errc::invalid_file));
  }
  for (const std::uint64_t lie :
       {std::uint64_t{1} << 20U, std::uint64_t{0x7FFFFFFF}, std::uint64_t{0xFFFFFFFF}}) {
    EXPECT_THAT(npy_header_bytes(bytes(prelude(2, lie))), FailsWith(Errc::invalid_file)) << lie;
  }
}

TEST(Npy, KnowsTheHeadersLengthFromItsFirstBytes) {
  EXPECT_EQ(npy_header_bytes(bytes(prelude(1, 118))), 128U);
  EXPECT_EQ(npy_header_bytes(bytes(prelude(1, 0x0102))), 10U + 0x0102);
  EXPECT_EQ(npy_header_bytes(bytes(prelude(2, 116))), 128U);
  EXPECT_EQ(npy_header_bytes(bytes(prelude(3, 0x0102))), 12U + 0x0102);
  EXPECT_EQ(prelude(3, 0).size(), kNpyPreludeBytes);
  for (const int major : {1, 2, 3}) {
    const auto whole = prelude(major, 116);
    for (std::size_t size = 0; size < whole.size(); ++size) {
      EXPECT_THAT(npy_header_bytes(bytes(whole.substr(0, size))), FailsWith(Errc::invalid_file));
    }
  }
}

TEST(Npy, RefusesOtherFormats) {
  const std::string dict = "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }";
  for (const auto& magic : {"\x93NUMPx"s, "\x92NUMPY"s, "NUMPY\x93"s, "\x93numpy"s, "\0NUMPY"s,
                            "PK\x03\x04\x14\0"s, "\x89HDF\r\n"s}) {
    EXPECT_THAT(parse_npy_header(bytes(magic + numpy_header(1, dict).substr(6))),
                FailsWith(Errc::invalid_file));
  }
}

TEST(Npy, RefusesFormatVersionsThatNumPyDoesNotHave) {
  for (int major = 0; major < 256; ++major) {
    for (const int minor : {0, 1, 2, 255}) {
      auto file = numpy_header(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }");
      if (major == 2 || major == 3) file.insert(10, 2, '\0');  // their length field has 4 bytes
      file[6] = static_cast<char>(major);
      file[7] = static_cast<char>(minor);
      const bool exists = major >= 1 && major <= 3 && minor == 0;
      EXPECT_EQ(parse_npy_header(bytes(file)).has_value(), exists) << major << '.' << minor;
    }
  }
}

TEST(Npy, RefusesAnyOtherDict) {
  for (const auto& dict :
       {""s,
        " "s,
        "{}"s,
        "[]"s,
        "None"s,
        "'<f4'"s,
        "{'descr': '<f4', 'fortran_order': False}"s,
        "{'descr': '<f4', 'shape': (3,)}"s,
        "{'fortran_order': False, 'shape': (3,)}"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'extra': 1}"s,
        "{'descr': '<f4', 'fortran_order': False, 'Shape': (3,)}"s,
        "{'descr': '<f4', 'descr': '<f4', 'shape': (3,)}"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'shape': (4,)}"s,
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}"s,
        "{'descr': '<f4', 'fortran_order': 'False', 'shape': (3,)}"s,
        "{'descr': '<f4', 'fortran_order': None, 'shape': (3,)}"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)} {}"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}x"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}\0"s,
        "({'descr': '<f4', 'fortran_order': False, 'shape': (3,)},)"s,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)"s + std::string(1000, '}')}) {
    EXPECT_THAT(parse_dict(dict), FailsWith(Errc::invalid_file)) << printable(dict);
  }
}

TEST(Npy, RefusesShapesThatAreNone) {
  for (const std::string shape :
       {"3", "(3)", "[3]", "None", "'3'", "{}", "(3.0,)", "('3',)", "(None,)", "(True,)", "((3,),)", "(-1,)",
        "(3, -4)", "(-9223372036854775808,)", "(9223372036854775808,)", "(0x10,)"}) {
    EXPECT_THAT(parse_shape(shape), FailsWith(Errc::invalid_file)) << shape;
  }
}

TEST(Npy, RefusesTypesThatCannotBeShared) {
  for (const std::string descr :
       {"'|O'", "[('x', '|O')]", "'<f3'", "''", "4", "None", "()", "[]", "'[]'", "('<f4', (2,))"}) {
    EXPECT_THAT(parse_shape("(3,)", descr), FailsWith(Errc::invalid_dtype)) << descr;
  }
}

TEST(Npy, RefusesShapesLargerThanMemory) {
  for (const std::string shape :
       {"(9223372036854775807,)", "(9223372036854775807, 9223372036854775807)", "(4294967296, 4294967296)",
        "(281474976710657,)", "(65536, 65536, 65536, 65536)", "(3, 6148914691236517206)",
        // An empty axis hides nothing:
        "(0, 9223372036854775807)", "(9223372036854775807, 0)", "(4294967296, 0, 4294967296)",
        "(0, 281474976710657)"}) {
    EXPECT_THAT(parse_shape(shape), FailsWith(Errc::invalid_shape)) << shape;
  }
  EXPECT_THAT(parse_shape("(2305843009213693953,)", "'<f8'"), FailsWith(Errc::invalid_shape))
      << "8 bytes, modulo 2^64";
  EXPECT_THAT(parse_shape("(281474976710657,)", "'|V0'"), FailsWith(Errc::invalid_shape))
      << "items of no bytes";
  EXPECT_EQ(parse_shape("(281474976710655,)")->data_bytes, 281474976710655U);
}

TEST(Npy, CountsAnEmptyArrayAsNoBytes) {
  for (const std::string shape : {"(0,)", "(0, 5)", "(5, 0)", "(0, 0, 0)", "(0, 281474976710655)"}) {
    EXPECT_EQ(parse_shape(shape)->data_bytes, 0U) << shape;
  }
  EXPECT_EQ(parse_shape("(5,)", "'|S0'")->data_bytes, 0U);
  EXPECT_EQ(parse_shape("()", "'|V0'")->data_bytes, 0U);
}

TEST(Npy, AllowsUpTo32Dimensions) {
  const auto ones = [](int count) {
    std::string shape = "(";
    for (int i = 0; i < count; ++i) shape += "1, ";
    return shape + ")";
  };
  EXPECT_EQ(parse_shape(ones(32))->data_bytes, 1U);
  EXPECT_THAT(parse_shape(ones(33)), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(parse_shape(ones(10'000)), FailsWith(Errc::invalid_shape));
}

TEST(Npy, ReadsVersions1And2AsLatin1) {
  std::string name;
  for (int code = 0xA0; code < 0x100; ++code) name += static_cast<char>(code);
  for (const int major : {1, 2}) {
    const auto dict = "{'descr': [('" + name + "', '<f4')], 'fortran_order': False, 'shape': (), }";
    const auto header = parse_npy_header(bytes(tight_header(major, dict)));
    ASSERT_THAT(header, Succeeds());
    EXPECT_TRUE(is_utf8(header->spec.dtype.str()));
    EXPECT_NE(header->spec.dtype.str().find("\\xa0\xC2\xA1"), std::string::npos);
    EXPECT_NE(header->spec.dtype.str().find("\xC3\xBE\xC3\xBF"), std::string::npos);
  }
}

TEST(Npy, RefusesAVersion3ThatIsNotUtf8) {
  for (const std::string name : {"\xE9", "\xED\xA0\x80", "\xF0\x9F\x90"}) {
    const auto dict = "{'descr': [('" + name + "', '<f4')], 'fortran_order': False, 'shape': (), }";
    EXPECT_THAT(parse_npy_header(bytes(tight_header(3, dict))), FailsWith(Errc::invalid_file));
  }
}

TEST(Npy, SurvivesADepthBomb) {
  for (const std::string open : {"[", "(", "{'descr': ", "[('a', "}) {
    std::string bomb;
    while (bomb.size() < 60'000) bomb += open;
    EXPECT_THAT(parse_dict(bomb), FailsWith(Errc::invalid_file)) << open;
    EXPECT_THAT(parse_dict("{'descr': " + bomb), FailsWith(Errc::invalid_file)) << open;
  }
}

// ---- Writing ----

TEST(Npy, ReadsBackWhatItMade) {
  for (const std::string text :
       {"|b1", "|u1", "<f4", ">f8", "<c16", "<M8[ns]", "<m8", "|S12", "<U5", "|V0",
        "[('x', '<f4'), ('y', '<i2', (3,))]", "[('x', '|u1'), ('', '|V3'), ('y', '<f4')]",
        R"([(("it's\n", 'x'), '<f4', (2, 2))])",
        "[('\xC3\xA9', '<f4'), ('\xF0\x9F\x90\x84', [('p', '>i8')])]"}) {
    for (const Shape& shape :
         {Shape{}, Shape{0}, Shape{1}, Shape{60000, 784}, Shape{2, 0, 3}, Shape(32, 1)}) {
      for (const auto order : {Order::c, Order::fortran}) {
        const ArraySpec spec{dtype_of(text), shape, order};
        const auto made = make_npy_header(spec, 4096);
        ASSERT_THAT(made, Succeeds()) << text;
        ASSERT_EQ(made->size(), 4096U);
        EXPECT_EQ(made->back(), '\n');
        const auto back = parse_npy_header(bytes(*made));
        ASSERT_THAT(back, Succeeds()) << *made;
        EXPECT_EQ(back->spec, spec);
        EXPECT_EQ(back->data_offset, 4096U);
        EXPECT_EQ(back->data_bytes, data_bytes(spec));
      }
    }
  }
}

TEST(Npy, WritesTheBytesThatNumPyWrites) {
  EXPECT_EQ(make_npy_header({dtype_of("<f4"), {2, 3}}, 128),
            numpy_header(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"));
  EXPECT_EQ(make_npy_header({dtype_of("|u1"), {7}, Order::fortran}, 128),
            numpy_header(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (7,), }"));
  EXPECT_EQ(
      make_npy_header({dtype_of("[('\xF0\x9F\x90\x84', '<f4')]"), {1}}, 128),
      numpy_header(3, "{'descr': [('\xF0\x9F\x90\x84', '<f4')], 'fortran_order': False, 'shape': (1,), }"));
}

// cowctl_get_test.py compares the rest with NumPy itself; a segment holds no type that needs version 2.
TEST(Npy, ChoosesTheFormatVersionAsNumPyDoes) {
  const auto major_of = [](const std::string& header) { return static_cast<int>(header.at(6)); };
  const std::string long_name(65'000, 'x');
  const auto type = [](const std::string& name) { return dtype_of("[('" + name + "', '<f4')]"); };
  EXPECT_EQ(major_of(make_numpy_header({type("x"), {1}})), 1);
  EXPECT_EQ(major_of(make_numpy_header({type("\xC3\xBF"), {1}})), 1) << "U+00FF is Latin-1";
  EXPECT_EQ(major_of(make_numpy_header({type("\xC4\x80"), {1}})), 3) << "U+0100 is not";
  EXPECT_EQ(major_of(make_numpy_header({type(long_name), {1}})), 1);
  EXPECT_EQ(major_of(make_numpy_header({type(long_name + std::string(500, 'x')), {1}})), 2);
  EXPECT_EQ(major_of(make_numpy_header({type(long_name + std::string(500, 'x') + "\xC4\x80"), {1}})), 3);
}

TEST(Npy, FillsExactlyTheBytesItWasGiven) {
  const ArraySpec spec{dtype_of("<f4"), {2, 3}};
  const std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  const std::size_t least = 10 + dict.size() + 1;
  for (const std::size_t size :
       {least, least + 1, std::size_t{4096}, std::size_t{65535}, kMaxNpyHeaderBytes}) {
    const auto made = make_npy_header(spec, size);
    ASSERT_THAT(made, Succeeds()) << size;
    EXPECT_EQ(made->size(), size);
    EXPECT_EQ(parse_npy_header(bytes(*made))->data_offset, size);
  }
  for (const std::size_t size :
       {least - 1, std::size_t{12}, std::size_t{10}, std::size_t{1}, std::size_t{0}}) {
    EXPECT_THAT(make_npy_header(spec, size), FailsWith(Errc::invalid_dtype)) << size;
  }
}

TEST(Npy, RefusesATypeWhoseTextDoesNotFit) {
  std::string text = "[";
  for (int i = 0; i < 300; ++i) text += fmt::format("('field{}', '<f4'), ", i);
  const ArraySpec spec{dtype_of(text + "]"), {1}};
  EXPECT_THAT(make_npy_header(spec, 4096), FailsWith(Errc::invalid_dtype));
  EXPECT_THAT(make_npy_header(spec, 16384), Succeeds());
}

TEST(Npy, DoesNotMakeHeadersThatNobodyReads) {
  EXPECT_DEATH(static_cast<void>(make_npy_header({Dtype::of<float>(), {2}}, kMaxNpyHeaderBytes + 1)),
               "does not hold");
}

// ---- Counting ----

TEST(DataBytes, CountsItemsAndChecksThem) {
  EXPECT_EQ(data_bytes({dtype_of("<f4"), {}}), 4U);
  EXPECT_EQ(data_bytes({dtype_of("<f4"), {3, 5}}), 60U);
  EXPECT_EQ(data_bytes({dtype_of("[('x', '<f4', (2,))]"), {3}}), 24U);
  EXPECT_EQ(data_bytes({dtype_of("<f4"), {3, 0}}), 0U);
  constexpr std::uint64_t kMost = ~std::uint64_t{0};
  for (const Shape& shape :
       {Shape{kMost}, Shape{kMost, kMost}, Shape{0, kMost}, Shape{kMost, 0, kMost}, Shape(33, 1),
        Shape(33, 0), Shape(32, kMost), Shape{1, (std::uint64_t{1} << 46U) + 1}}) {
    EXPECT_THAT(data_bytes({dtype_of("<f4"), shape}), FailsWith(Errc::invalid_shape)) << to_string(shape);
  }
}

TEST(ShapeText, IsAPythonTuple) {
  EXPECT_EQ(to_string(Shape{}), "()");
  EXPECT_EQ(to_string(Shape{3}), "(3,)");
  EXPECT_EQ(to_string(Shape{60000, 784}), "(60000, 784)");
  EXPECT_EQ(to_string(Shape{0, ~std::uint64_t{0}}), "(0, 18446744073709551615)");
}

}  // namespace
}  // namespace cowmgr
