// What the fuzzers share. Each defines LLVMFuzzerTestOneInput; replay_main.cpp or libFuzzer calls it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "proto/errors.hpp"
#include "proto/text.hpp"

// 0, as libFuzzer wants it. What must hold is asserted, in every build.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace cowmgr {

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// A message goes to logs, terminals and other languages: it never repeats hostile bytes as they are.
inline void check_error(const Error& error, std::initializer_list<Errc> allowed) {
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; };
  COWMGR_ASSERT(std::find(allowed.begin(), allowed.end(), error.code) != allowed.end());
  COWMGR_ASSERT(!error.message.empty() && error.message.size() < 2000 && is_utf8(error.message));
  COWMGR_ASSERT(std::none_of(error.message.begin(), error.message.end(), is_control));
}

}  // namespace cowmgr
