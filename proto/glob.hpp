// Patterns of names, as people type them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxGlobBytes = 512;  // a name has 255, twice that with a backslash each

// `*` stands for any number of characters, `?` for one, a backslash takes away the meaning of what follows
// it. All else,
// `[` too, stands for itself. A character is a code point of UTF-8.
class Glob {
 public:
  // Errors: invalid_argument when it is longer than kMaxGlobBytes.
  [[nodiscard]] static Result<Glob> parse(std::string_view pattern);
  // Matches every name.
  [[nodiscard]] static Glob any() { return *parse("*"); }

  // Whether the whole of `name`, which is UTF-8, matches. Adds to `steps` what that took, a step being about
  // a nanosecond: at most one for each character of the pattern at each byte of the name, mostly one for each
  // byte.
  [[nodiscard]] bool matches(std::string_view name, std::uint64_t& steps) const noexcept;

  // As it was written.
  [[nodiscard]] const std::string& text() const noexcept { return text_; }

 private:
  explicit Glob(std::string_view text) : text_(text) {}

  std::string text_;
  std::vector<std::uint16_t> tokens_{};  // a byte, kOne or kMany
  std::size_t least_bytes_ = 0;          // that a name must have
};

// The pattern that matches `name` alone. Also fnmatch(3) takes it so.
[[nodiscard]] std::string literal_pattern(std::string_view name);

}  // namespace cowmgr
