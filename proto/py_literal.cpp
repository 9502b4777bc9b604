#include "proto/py_literal.hpp"

#include <algorithm>
#include <array>
#include <charconv>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr int kMaxDepth = 32;  // NumPy itself nests structured dtypes no deeper

using Kind = PyLiteral::Kind;

// `code`, at most U+10FFFF, in UTF-8.
std::string utf8_of(std::uint32_t code) {
  const auto tail = [&](unsigned shift) { return static_cast<char>(0x80U | (code >> shift & 0x3FU)); };
  if (code < 0x80) return {static_cast<char>(code)};
  if (code < 0x800) return {static_cast<char>(0xC0U | code >> 6U), tail(0)};
  if (code < 0x10000) return {static_cast<char>(0xE0U | code >> 12U), tail(6), tail(0)};
  return {static_cast<char>(0xF0U | code >> 18U), tail(12), tail(6), tail(0)};
}

struct Range {
  std::uint32_t first;
  std::uint32_t last;
};

// What str.isprintable() denies, beyond ASCII: the categories Cc, Cf, Co, Zl, Zp and Zs of Unicode 15.
constexpr std::array<Range, 27> kUnprintable = {
    {{0x80, 0xA0},       {0xAD, 0xAD},        {0x600, 0x605},     {0x61C, 0x61C},     {0x6DD, 0x6DD},
     {0x70F, 0x70F},     {0x890, 0x891},      {0x8E2, 0x8E2},     {0x1680, 0x1680},   {0x180E, 0x180E},
     {0x2000, 0x200F},   {0x2028, 0x202F},    {0x205F, 0x2064},   {0x2066, 0x206F},   {0x3000, 0x3000},
     {0xE000, 0xF8FF},   {0xFEFF, 0xFEFF},    {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD}, {0x110CD, 0x110CD},
     {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3},  {0x1D173, 0x1D17A}, {0xE0001, 0xE0001}, {0xE0020, 0xE007F},
     {0xF0000, 0xFFFFD}, {0x100000, 0x10FFFD}}};

bool is_printable(std::uint32_t code) {
  if (code < 0x80) return code >= 0x20 && code != 0x7F;
  return std::ranges::none_of(kUnprintable,
                              [=](const Range& range) { return range.first <= code && code <= range.last; });
}

// One code point as repr() writes it between these quotes.
std::string escaped(std::uint32_t code, char quote) {
  constexpr std::string_view kSpecial = "\\\n\r\t";
  constexpr std::string_view kSpelled = "\\nrt";
  if (code == static_cast<unsigned char>(quote)) return {'\\', quote};
  if (const auto at = code < 0x80 ? kSpecial.find(static_cast<char>(code)) : std::string_view::npos;
      at != std::string_view::npos)
    return {'\\', kSpelled[at]};
  if (is_printable(code)) return utf8_of(code);
  if (code < 0x100) return fmt::format("\\x{:02x}", code);
  return code < 0x10000 ? fmt::format("\\u{:04x}", code) : fmt::format("\\U{:08x}", code);
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Result<PyLiteral> parse_all() {
    if (!is_utf8(text_)) return refuse("bytes that are not UTF-8");
    auto value = parse_value(0);
    if (!value) return value;
    skip_space();
    if (at_ != text_.size()) return refuse("unexpected text after the literal");
    return value;
  }

 private:
  Result<PyLiteral> parse_value(int depth) {
    skip_space();
    if (at_ == text_.size()) return refuse("unexpected end");
    const char c = text_[at_];
    const bool opens = c == '(' || c == '[' || c == '{';
    if (opens && depth == kMaxDepth) return refuse("nested too deeply");
    if (c == '\'' || c == '"') return parse_string();
    if (c == '(') return parse_sequence(Kind::tuple, ')', depth);
    if (c == '[') return parse_sequence(Kind::list, ']', depth);
    if (c == '{') return parse_dict(depth);
    if (c == '-' || (c >= '0' && c <= '9')) return parse_integer();
    return parse_word();
  }

  Result<PyLiteral> parse_string() {
    const char quote = text_[at_++];
    PyLiteral out{.kind = Kind::string};
    while (at_ < text_.size() && text_[at_] != quote) {
      const char c = text_[at_++];
      if (c != '\\') {
        out.string.push_back(c);
      } else if (!take_escape(out.string)) {
        return refuse("an escape that NumPy does not write");
      }
    }
    if (at_ == text_.size()) return refuse("a string without its end");
    ++at_;
    return out;
  }

  // What follows a backslash in Python's repr() of a str.
  bool take_escape(std::string& out) {
    constexpr std::string_view kShort = "\\'\"nrt";
    constexpr std::string_view kMeaning = "\\'\"\n\r\t";
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    if (const auto at = kShort.find(c); at != std::string_view::npos) {
      out.push_back(kMeaning[at]);
      return true;
    }
    return (c == 'x' && take_code(2, out)) || (c == 'u' && take_code(4, out)) ||
           (c == 'U' && take_code(8, out));
  }

  // A code point of exactly `digits` hexadecimal digits.
  bool take_code(std::size_t digits, std::string& out) {
    if (text_.size() - at_ < digits) return false;
    const char* const begin = text_.data() + at_;
    std::uint32_t code = 0;
    const auto [end, error] = std::from_chars(begin, begin + digits, code, 16);
    const bool is_surrogate = code >= 0xD800 && code <= 0xDFFF;
    if (error != std::errc() || end != begin + digits || code > 0x10FFFF || is_surrogate) return false;
    at_ += digits;
    out += utf8_of(code);
    return true;
  }

  Result<PyLiteral> parse_integer() {
    PyLiteral out{.kind = Kind::integer};
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), out.integer);
    if (error != std::errc()) return refuse("a number that does not fit in 64 bits");
    at_ = static_cast<std::size_t>(end - text_.data());
    if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // Python 2 wrote long integers so
    return out;
  }

  Result<PyLiteral> parse_word() {
    if (take("None")) return PyLiteral{};
    if (take("True")) return PyLiteral{.kind = Kind::boolean, .boolean = true};
    if (take("False")) return PyLiteral{.kind = Kind::boolean, .boolean = false};
    return refuse("not a literal");
  }

  // `(a)` is the value a itself, as in Python; `(a,)` and `()` are tuples.
  Result<PyLiteral> parse_sequence(Kind kind, char close, int depth) {
    ++at_;
    PyLiteral out{.kind = kind};
    bool comma = true;
    while (!take(close)) {
      if (!comma) return refuse("a comma is missing");
      auto item = parse_value(depth + 1);
      if (!item) return item;
      out.items.push_back(*std::move(item));
      comma = take(',');
    }
    if (kind == Kind::tuple && out.items.size() == 1 && !comma) return std::move(out.items.front());
    return out;
  }

  Result<PyLiteral> parse_dict(int depth) {
    ++at_;
    PyLiteral out{.kind = Kind::dict};
    bool comma = true;
    while (!take('}')) {
      if (!comma) return refuse("a comma is missing");
      auto key = parse_value(depth + 1);
      if (!key) return key;
      if (key->kind != Kind::string) return refuse("a key that is not a string");
      if (!take(':')) return refuse("a colon is missing");
      auto value = parse_value(depth + 1);
      if (!value) return value;
      out.keys.push_back(std::move(key->string));
      out.items.push_back(*std::move(value));
      comma = take(',');
    }
    return out;
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) ++at_;
  }

  bool take(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  [[nodiscard]] tl::unexpected<Error> refuse(std::string_view why) const {
    return fail(Errc::invalid_file, fmt::format("{} at byte {} of {}", why, at_, printable(text_)));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const PyLiteral* PyLiteral::find(std::string_view key) const noexcept {
  const auto at = std::find(keys.begin(), keys.end(), key);
  return at == keys.end() ? nullptr : &items[static_cast<std::size_t>(at - keys.begin())];
}

Result<PyLiteral> parse_py_literal(std::string_view text) {
  return Parser(text).parse_all();
}

std::string py_quote(std::string_view text) {
  const bool has_single_alone =
      text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = has_single_alone ? '"' : '\'';
  std::string out{quote};
  while (!text.empty()) {
    const auto [code, length] = decode_utf8(text);
    COWMGR_ASSERT(length > 0);
    out += escaped(code, quote);
    text.remove_prefix(length);
  }
  return out + quote;
}

}  // namespace cowmgr
