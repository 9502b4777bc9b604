// Text that crosses a boundary: names that peers choose, sizes that people type and read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "proto/errors.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxNameBytes = 255;  // fits the trailer's field, with its final NUL

// Whether `name` may name an array or a result set: 1 to 255 bytes of UTF-8 without control characters
// (U+0000 to U+001F, U+007F to U+009F). Errors: invalid_name, saying which rule.
[[nodiscard]] Result<void> check_name(std::string_view name);

// Whether `name` may name an instance, which becomes part of a file name: 1 to 64 of [A-Za-z0-9_-].
[[nodiscard]] Result<void> check_instance(std::string_view name);

// Whether `bytes` is well-formed UTF-8 (Unicode 15, table 3-7: no surrogates, no overlong forms).
[[nodiscard]] bool is_utf8(std::string_view bytes) noexcept;

// The code point that `bytes`, which is not empty, starts with, and its number of bytes: 0 where that is
// malformed.
struct Decoded {
  std::uint32_t code_point = 0;
  std::size_t length = 0;
};
[[nodiscard]] Decoded decode_utf8(std::string_view bytes) noexcept;

// `text` quoted for a message or a log line: what is not printable is escaped, what is long is cut.
[[nodiscard]] std::string printable(std::string_view text);

// "1.5GiB", "200 MB", "4096", "2g": K/M/G/T with `i` or alone are powers of 1024 (as in df -h), with `B`
// alone (KB, MB) powers of 1000; any case. Errors: invalid_argument.
[[nodiscard]] Result<std::uint64_t> parse_size(std::string_view text);

// "0 B", "188 MiB", "1.5 GiB": three significant digits, powers of 1024.
[[nodiscard]] std::string format_size(std::uint64_t size_bytes);

}  // namespace cowmgr
