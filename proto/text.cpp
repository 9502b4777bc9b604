#include "proto/text.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

#include <fmt/format.h>

namespace cowmgr {
namespace {

constexpr std::size_t kMaxPrinted = 120;

bool is_control(std::uint32_t code) noexcept {
  return code < 0x20 || (code >= 0x7F && code < 0xA0);
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::string_view trimmed(std::string_view text) {
  while (text.starts_with(' ')) text.remove_prefix(1);
  while (text.ends_with(' ')) text.remove_suffix(1);
  return text;
}

// The start of `text` that is shown, which does not end within a character.
std::string_view shown(std::string_view text) {
  if (text.size() <= kMaxPrinted) return text;
  for (std::size_t end = kMaxPrinted; end + 3 >= kMaxPrinted; --end) {
    const auto [code, length] = decode_utf8(text.substr(end));
    if (length > 1 && end + length > kMaxPrinted) return text.substr(0, end);
  }
  return text.substr(0, kMaxPrinted);
}

}  // namespace

Decoded decode_utf8(std::string_view bytes) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  if (byte(0) < 0x80) return {byte(0), 1};
  const std::size_t length = byte(0) >= 0xF0 ? 4 : byte(0) >= 0xE0 ? 3 : 2;
  if (byte(0) < 0xC2 || byte(0) > 0xF4 || bytes.size() < length) return {0, 0};
  std::uint32_t code = byte(0) & (0xFFU >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0U) != 0x80) return {0, 0};
    code = (code << 6U) | (byte(i) & 0x3FU);
  }
  constexpr std::array<std::uint32_t, 5> kLeast = {0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = code >= 0xD800 && code <= 0xDFFF;
  if (code < kLeast[length] || code > 0x10FFFF || is_surrogate) return {0, 0};
  return {code, length};
}

bool is_utf8(std::string_view bytes) noexcept {
  while (!bytes.empty()) {
    const auto [code, length] = decode_utf8(bytes);
    if (length == 0) return false;
    bytes.remove_prefix(length);
  }
  return true;
}

Result<void> check_name(std::string_view name) {
  if (name.empty()) return fail(Errc::invalid_name, "the name is empty; give the array a name");
  if (name.size() > kMaxNameBytes) {
    return fail(Errc::invalid_name,
                fmt::format("the name has {} bytes; at most {} are allowed", name.size(), kMaxNameBytes));
  }
  for (auto rest = name; !rest.empty();) {
    const auto [code, length] = decode_utf8(rest);
    if (length == 0) {
      return fail(Errc::invalid_name, fmt::format("the name {} is not UTF-8", printable(name)));
    }
    if (is_control(code)) {
      return fail(
          Errc::invalid_name,
          fmt::format("the name {} holds the control character U+{:04X}; remove it", printable(name), code));
    }
    rest.remove_prefix(length);
  }
  return {};
}

Result<void> check_instance(std::string_view name) {
  const auto is_allowed = [](unsigned char c) { return std::isalnum(c) != 0 || c == '_' || c == '-'; };
  if (name.empty() || name.size() > 64 || !std::all_of(name.begin(), name.end(), is_allowed)) {
    return fail(Errc::invalid_argument,
                fmt::format("instance {}: use 1 to 64 letters, digits, '_' or '-'", printable(name)));
  }
  return {};
}

std::string printable(std::string_view text) {
  std::string out = "\"";
  for (auto rest = shown(text); !rest.empty();) {
    const auto [code, length] = decode_utf8(rest);
    const bool is_plain = length > 0 && !is_control(code) && code != '"' && code != '\\';
    const std::size_t step = std::max<std::size_t>(length, 1);
    if (is_plain) {
      out += rest.substr(0, step);
    } else {
      for (const char c : rest.substr(0, step))
        out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
    rest.remove_prefix(step);
  }
  return out + (text.size() > kMaxPrinted ? "\"..." : "\"");
}

Result<std::uint64_t> parse_size(std::string_view text) {
  const auto refuse = [&] {
    return fail(Errc::invalid_argument,
                fmt::format("{} is not a size; write it as 4096, 200MB, 1.5GiB or 2G", printable(text)));
  };
  const std::string clean = lower(trimmed(text));
  double number = 0;
  const auto [end, error] =
      std::from_chars(clean.data(), clean.data() + clean.size(), number, std::chars_format::fixed);
  if (error != std::errc() || number < 0) return refuse();
  std::string_view unit = trimmed({end, static_cast<std::size_t>(clean.data() + clean.size() - end)});
  int power = 0;
  double base = 1024;
  if (!unit.empty() && unit != "b") {
    power = 1 + static_cast<int>(std::string_view("kmgtp").find(unit.front()));
    if (power == 0) return refuse();
    unit.remove_prefix(1);
    if (unit == "b")
      base = 1000;
    else if (!unit.empty() && unit != "i" && unit != "ib")
      return refuse();
  }
  const double size = std::round(number * std::pow(base, power));
  if (!(size < 0x1p63)) return refuse();
  return static_cast<std::uint64_t>(size);
}

std::string format_size(std::uint64_t size_bytes) {
  if (size_bytes < 1024) return fmt::format("{} B", size_bytes);
  constexpr std::array<std::string_view, 6> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(size_bytes) / 1024;
  std::size_t unit = 0;
  while (value >= 999.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  const int digits = value < 0.9995 ? 3 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  std::string number = fmt::format("{:.{}f}", value, digits);
  if (digits > 0) {
    number.erase(number.find_last_not_of('0') + 1);
    if (number.back() == '.') number.pop_back();
  }
  return fmt::format("{} {}", number, kUnits[unit]);
}

}  // namespace cowmgr
