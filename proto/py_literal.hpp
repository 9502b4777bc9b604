// The part of Python's literal syntax that NumPy writes into .npy headers and structured dtypes:
// strings, integers, True, False, None, tuples, lists and dicts with string keys.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr {

// One parsed literal. `items` holds the elements of a tuple or list, and the values of a dict in the order
// of its `keys`.
struct PyLiteral {
  enum class Kind : std::uint8_t { none, boolean, integer, string, tuple, list, dict };
  Kind kind = Kind::none;
  bool boolean = false;
  std::int64_t integer = 0;
  std::string string{};  // UTF-8
  std::vector<PyLiteral> items{};
  std::vector<std::string> keys{};

  // The value under `key`, or null; for dicts.
  [[nodiscard]] const PyLiteral* find(std::string_view key) const noexcept;
};

// Parses one literal that fills `text` up to white space. Nesting is limited to 32 levels, so that hostile
// text cannot exhaust the stack. Errors: invalid_file, with the offset of what was not understood.
[[nodiscard]] Result<PyLiteral> parse_py_literal(std::string_view text);

// `text`, which is UTF-8, as Python's repr() spells a str: in single quotes, or in double ones where it holds
// single ones alone; what is not printable is escaped. Code points that Unicode has not assigned yet are not:
// which these are depends on Python's version, and either spelling means the same.
[[nodiscard]] std::string py_quote(std::string_view text);

}  // namespace cowmgr
