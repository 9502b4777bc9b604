#include "proto/glob.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace cowmgr {
namespace {

constexpr std::uint16_t kOne = 0x100;   // `?`
constexpr std::uint16_t kMany = 0x101;  // `*`

std::uint16_t token_of(char c) noexcept {
  if (c == '*') return kMany;
  return c == '?' ? kOne : static_cast<unsigned char>(c);
}

// Where the character after the one at `at` starts.
std::size_t next_character(std::string_view name, std::size_t at) noexcept {
  ++at;
  while (at < name.size() && (static_cast<unsigned char>(name[at]) & 0xC0U) == 0x80) ++at;
  return at;
}

}  // namespace

Result<Glob> Glob::parse(std::string_view pattern) {
  if (pattern.size() > kMaxGlobBytes) {
    return fail(Errc::invalid_argument,
                fmt::format("a pattern has at most {} bytes, not {}", kMaxGlobBytes, pattern.size()));
  }
  Glob glob(pattern);
  for (std::size_t at = 0; at < pattern.size(); ++at) {
    const bool is_escape = pattern[at] == '\\' && at + 1 < pattern.size();
    if (is_escape) ++at;
    const std::uint16_t token = is_escape ? static_cast<unsigned char>(pattern[at]) : token_of(pattern[at]);
    // Two stars mean what one does.
    if (token == kMany && !glob.tokens_.empty() && glob.tokens_.back() == kMany) continue;
    glob.tokens_.push_back(token);
    if (token != kMany) ++glob.least_bytes_;
  }
  return glob;
}

// Only the last star takes more when what follows it does not fit: what an earlier one took can stay, since
// the shortest that fits leaves most for the rest.
bool Glob::matches(std::string_view name, std::uint64_t& steps) const noexcept {
  ++steps;
  if (name.size() < least_bytes_) return false;
  constexpr std::size_t kNone = SIZE_MAX;
  std::size_t at = 0;
  std::size_t token = 0;
  std::size_t after_star = kNone;
  std::size_t star_end = 0;  // of what the last star has taken
  while (at < name.size()) {
    ++steps;
    const std::uint16_t wanted = token < tokens_.size() ? tokens_[token] : kMany + 1;
    if (wanted == kMany) {
      after_star = ++token;
      star_end = at;
    } else if (wanted == kOne) {
      at = next_character(name, at);
      ++token;
    } else if (wanted == static_cast<unsigned char>(name[at])) {
      ++at;
      ++token;
    } else if (after_star == tokens_.size()) {
      return true;  // the last star takes all that is left
    } else if (after_star != kNone) {
      star_end = next_character(name, star_end);
      at = star_end;
      token = after_star;
    } else {
      return false;
    }
  }
  return std::all_of(tokens_.begin() + static_cast<std::ptrdiff_t>(token), tokens_.end(),
                     [](std::uint16_t rest) { return rest == kMany; });
}

std::string literal_pattern(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (std::string_view("*?[\\").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

}  // namespace cowmgr
