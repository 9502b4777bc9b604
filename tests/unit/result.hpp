// How the tests of proto/ ask what a Result holds, and how a failed test prints the values of proto/.
#pragma once

#include <algorithm>
#include <ostream>
#include <string>
#include <string_view>

#include <gmock/gmock.h>

#include "proto/errors.hpp"
#include "proto/npy.hpp"
#include "proto/text.hpp"

namespace cowmgr {

inline void PrintTo(Errc code, std::ostream* out) {
  *out << to_string(code);
}
inline void PrintTo(const Error& error, std::ostream* out) {
  *out << to_string(error.code) << ": " << error.message;
}
inline void PrintTo(const Dtype& dtype, std::ostream* out) {
  *out << "dtype " << printable(dtype.str());
}
inline void PrintTo(const ArraySpec& spec, std::ostream* out) {
  *out << printable(spec.dtype.str()) << ' ' << to_string(spec.shape)
       << (spec.order == Order::fortran ? ", Fortran order" : "");
}
inline void PrintTo(const NpyHeader& header, std::ostream* out) {
  PrintTo(header.spec, out);
  *out << " at " << header.data_offset << ", " << header.data_bytes << " bytes";
}
template <class T>
void PrintTo(const tl::expected<T, Error>& result, std::ostream* out) {
  *out << (result ? testing::PrintToString(*result) : testing::PrintToString(result.error()));
}
inline void PrintTo(const tl::expected<void, Error>& result, std::ostream* out) {
  *out << (result ? "success" : testing::PrintToString(result.error()));
}

// What errors.hpp promises of every message, whatever bytes a peer sent: a sentence that a log may take as it
// is.
inline bool is_clean_message(std::string_view message) {
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; };
  return !message.empty() && is_utf8(message) && std::none_of(message.begin(), message.end(), is_control);
}

MATCHER(Succeeds, "") {
  return arg.has_value();
}

MATCHER_P(FailsWith, code,
          std::string("fails with ") + std::string(to_string(code)) + ", in a clean sentence") {
  return !arg.has_value() && arg.error().code == code && is_clean_message(arg.error().message);
}

}  // namespace cowmgr
