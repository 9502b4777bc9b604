#include "proto/dtype.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

static_assert(std::endian::native == std::endian::little, "canonical type strings are little-endian");

constexpr std::int64_t kIntEnd = 1LL << 31;       // NumPy keeps item sizes and axes of fields in an int
constexpr std::uint64_t kMaxItemBytes = kIntEnd;  // items stay below it
constexpr std::size_t kMaxAxes = 32;              // of a field, in NumPy

// A level is a list and a tuple, the innermost may have a shape, and a .npy header puts a dict around them
// all: the 32 levels of py_literal.hpp, so whatever is a Dtype can be read from a header again.
constexpr int kMaxLevels = 15;

// A type's canonical text and size.
struct TypeText {
  std::string text;
  std::uint64_t item_bytes;
};

tl::unexpected<Error> refuse(std::string_view text, std::string_view why) {
  return fail(Errc::invalid_dtype, fmt::format("dtype {}: {}", printable(text), why));
}

tl::unexpected<Error> refuse(std::string_view why) {
  return fail(Errc::invalid_dtype, fmt::format("dtype: {}", why));
}

bool is_allowed_size(char kind, std::uint64_t size) {
  switch (kind) {
    case 'b':
      return size == 1;
    case 'i':
    case 'u':
      return size == 1 || size == 2 || size == 4 || size == 8;
    case 'f':
      return size == 2 || size == 4 || size == 8 || size == 16;
    case 'c':
      return size == 8 || size == 16 || size == 32;
    case 'M':
    case 'm':
      return size == 8;
    default:  // S, U, V: any, 0 too
      return size < kMaxItemBytes;
  }
}

// The part of `<M8[25us]` after the size, as NumPy spells it: `[1s]` is `[s]`, and `[generic]` is left out.
std::optional<std::string> canonical_unit(std::string_view text) {
  if (text.empty() || text == "[generic]") return std::string();
  if (text.size() < 3 || text.front() != '[' || text.back() != ']') return std::nullopt;
  const auto inner = text.substr(1, text.size() - 2);
  const auto count = inner.substr(0, std::min(inner.find_first_not_of("0123456789"), inner.size()));
  const auto unit = inner.substr(count.size());
  constexpr std::array<std::string_view, 13> kUnits = {"Y",  "M",  "W",  "D",  "h",  "m", "s",
                                                       "ms", "us", "ns", "ps", "fs", "as"};
  if (std::find(kUnits.begin(), kUnits.end(), unit) == kUnits.end()) return std::nullopt;
  if (count.size() > 9 || count.starts_with('0')) return std::nullopt;
  return fmt::format("[{}{}]", count == "1" ? "" : count, unit);
}

// Items whose bytes have no order: NumPy spells them `|`.
bool is_orderless(char kind, std::uint64_t size) {
  return kind == 'S' || kind == 'V' || kind == 'b' || ((kind == 'i' || kind == 'u') && size == 1);
}

Result<TypeText> parse_scalar(std::string_view text) {
  std::string_view rest = text;
  char order = '<';
  if (!rest.empty() && std::string_view("<>|=").find(rest.front()) != std::string_view::npos) {
    order = rest.front() == '=' ? '<' : rest.front();
    rest.remove_prefix(1);
  }
  if (rest.empty()) return refuse(text, "is empty; NumPy type strings look like '<f4'");
  const char kind = rest.front();
  if (kind == 'O') {
    return refuse(text, "holds Python objects, which other processes cannot read; convert to a fixed type");
  }
  if (std::string_view("biufcMmSUV").find(kind) == std::string_view::npos) {
    return refuse(text, "is not a NumPy type string; they look like '<f4', '|u1' or '<M8[ns]'");
  }
  rest.remove_prefix(1);
  std::uint64_t size = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), size);
  const auto suffix = rest.substr(static_cast<std::size_t>(end - rest.data()));
  const bool is_time = kind == 'M' || kind == 'm';
  const auto unit = is_time || suffix.empty() ? canonical_unit(suffix) : std::nullopt;
  if (error != std::errc() || !is_allowed_size(kind, size) || !unit)
    return refuse(text, "has no such size or unit");
  if (is_orderless(kind, size))
    order = '|';
  else if (order == '|')
    return refuse(text, "needs a byte order, '<' or '>'");
  const std::uint64_t item_bytes = kind == 'U' ? size * 4 : size;
  if (item_bytes >= kMaxItemBytes) return refuse(text, "is too large");
  return TypeText{fmt::format("{}{}{}{}", order, kind, size, *unit), item_bytes};
}

struct SubShape {
  std::string text;  // `(2, 3)`; empty when there is no axis
  std::uint64_t items = 1;
};

// The shape of a field. NumPy takes an integer for one axis.
Result<SubShape> parse_subshape(const PyLiteral& literal) {
  if (literal.kind == PyLiteral::Kind::integer) {
    return parse_subshape(PyLiteral{.kind = PyLiteral::Kind::tuple, .items = {literal}});
  }
  if (literal.kind != PyLiteral::Kind::tuple || literal.items.size() > kMaxAxes) {
    return refuse("a field's shape must be a tuple of at most 32 integers");
  }
  SubShape out;
  bool is_empty = false;
  for (const auto& axis : literal.items) {
    if (axis.kind != PyLiteral::Kind::integer || axis.integer < 0 || axis.integer >= kIntEnd) {
      return refuse("a field's shape must hold integers from 0 to 2^31 - 1");
    }
    // Both factors are below 2^31. Empty axes are left out, so that they cannot hide an overflow.
    if (axis.integer == 0)
      is_empty = true;
    else
      out.items *= static_cast<std::uint64_t>(axis.integer);
    if (out.items >= kMaxItemBytes) return refuse("a field's shape is too large");
    out.text += fmt::format("{}{}", out.text.empty() ? "(" : ", ", axis.integer);
  }
  if (is_empty) out.items = 0;
  if (!out.text.empty()) out.text += literal.items.size() == 1 ? ",)" : ")";
  return out;
}

struct FieldName {
  std::string text;                // as Python spells it: 'x', or ('title', 'x')
  std::vector<std::string> names;  // the name, and the title if there is one: both name the field
};

std::optional<FieldName> parse_field_name(const PyLiteral& literal) {
  if (literal.kind == PyLiteral::Kind::string) return FieldName{py_quote(literal.string), {literal.string}};
  if (literal.kind != PyLiteral::Kind::tuple || literal.items.size() != 2) return std::nullopt;
  const auto& title = literal.items[0];
  const auto& name = literal.items[1];
  if (title.kind != PyLiteral::Kind::string || name.kind != PyLiteral::Kind::string) return std::nullopt;
  return FieldName{fmt::format("({}, {})", py_quote(title.string), py_quote(name.string)),
                   {name.string, title.string}};
}

struct Field {
  FieldName name;
  TypeText type;
  SubShape shape;

  [[nodiscard]] std::uint64_t bytes() const { return type.item_bytes * shape.items; }  // both are below 2^31
  // As numpy.lib.format.descr_to_dtype() decides it.
  [[nodiscard]] bool is_padding() const {
    return name.text == "''" && (type.text.starts_with("|V") || !shape.text.empty());
  }
  [[nodiscard]] std::string text() const {
    const auto descr = type.text.front() == '[' ? type.text : py_quote(type.text);
    return fmt::format("({}, {}{}{})", name.text, descr, shape.text.empty() ? "" : ", ", shape.text);
  }
};

Result<TypeText> parse_type(const PyLiteral& descr, int levels_left);

// One `(name, type)` or `(name, type, shape)` of a structured type.
Result<Field> parse_field(const PyLiteral& field, int levels_left) {
  if (field.kind != PyLiteral::Kind::tuple || field.items.size() < 2 || field.items.size() > 3) {
    return refuse("a field must be (name, type) or (name, type, shape)");
  }
  auto name = parse_field_name(field.items[0]);
  if (!name) return refuse("a field's name must be a string");
  auto type = parse_type(field.items[1], levels_left);
  if (!type) return error_of(std::move(type));
  auto shape = field.items.size() == 3 ? parse_subshape(field.items[2]) : SubShape();
  if (!shape) return error_of(std::move(shape));
  const bool is_unsized = type->item_bytes == 0 && type->text.front() != '[';
  if (is_unsized && !shape->text.empty())
    return refuse(type->text, "has no size, so NumPy gives it no shape");
  return Field{*std::move(name), *std::move(type), *std::move(shape)};
}

// Puts a structured type's text together. Padding that follows padding is one field, as NumPy writes it.
class StructText {
 public:
  void add(const Field& field) {
    if (field.is_padding()) {
      padding_ += field.bytes();
    } else {
      flush();
      append(field.text());
    }
  }

  // Empty when there was no field.
  [[nodiscard]] std::string finish() {
    flush();
    return text_.empty() ? text_ : text_ + "]";
  }

 private:
  void flush() {
    if (padding_ > 0) append(fmt::format("('', '|V{}')", padding_));
    padding_ = 0;
  }
  void append(const std::string& field) { text_ += (text_.empty() ? "[" : ", ") + field; }

  std::string text_;
  std::uint64_t padding_ = 0;
};

Result<TypeText> parse_structured(const PyLiteral& list, int levels_left) {
  if (levels_left == 0) return refuse("is nested too deeply");
  StructText text;
  std::uint64_t item_bytes = 0;
  std::set<std::string> taken;
  for (const auto& item : list.items) {
    const auto field = parse_field(item, levels_left - 1);
    if (!field) return error_of(field);
    for (const auto& name : field->is_padding() ? std::vector<std::string>() : field->name.names) {
      if (!taken.insert(name).second) return refuse(name, "names two fields");
    }
    item_bytes += field->bytes();  // below 2^31 + 2^62
    if (item_bytes >= kMaxItemBytes) return refuse("the structured type is too large");
    text.add(*field);
  }
  auto canonical = text.finish();
  if (canonical.empty()) return refuse("a structured type needs a field");
  return TypeText{std::move(canonical), item_bytes};
}

Result<TypeText> parse_type(const PyLiteral& descr, int levels_left) {
  if (descr.kind == PyLiteral::Kind::string) return parse_scalar(descr.string);
  if (descr.kind == PyLiteral::Kind::list) return parse_structured(descr, levels_left);
  return refuse("must be a type string or a list of fields");
}

}  // namespace

Result<Dtype> Dtype::from_literal(const PyLiteral& descr) {
  auto type = parse_type(descr, kMaxLevels);
  if (!type) return error_of(std::move(type));
  return Dtype(std::move(type->text), type->item_bytes);
}

Result<Dtype> Dtype::parse(std::string_view text) {
  if (text.empty() || text.front() != '[') {
    return from_literal(PyLiteral{.kind = PyLiteral::Kind::string, .string = std::string(text)});
  }
  const auto literal = parse_py_literal(text);
  if (!literal) return refuse(text, literal.error().message);
  return from_literal(*literal);
}

std::string Dtype::to_literal() const {
  return is_structured() ? text_ : py_quote(text_);
}

}  // namespace cowmgr
