#include "proto/py_literal.hpp"

#include <algorithm>
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

// One byte as repr() writes it.
std::string escaped(char c) {
  constexpr std::string_view kSpecial = "\\'\n\r\t";
  constexpr std::string_view kSpelled = "\\'nrt";
  if (const auto at = kSpecial.find(c); at != std::string_view::npos) return {'\\', kSpelled[at]};
  const auto byte = static_cast<unsigned char>(c);
  return byte < 0x20 || byte == 0x7F ? fmt::format("\\x{:02x}", byte) : std::string{c};
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
  std::string out = "'";
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    // U+0080 to U+009F are C2 80 to C2 9F in UTF-8; other control characters are one byte.
    const auto next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0U;
    if (byte == 0xC2 && next >= 0x80 && next < 0xA0) {
      out += fmt::format("\\x{:02x}", next);
      ++i;
    } else {
      out += escaped(text[i]);
    }
  }
  return out + "'";
}

}  // namespace cowmgr
