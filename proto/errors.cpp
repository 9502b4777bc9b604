#include "proto/errors.hpp"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <system_error>

#include <fmt/format.h>

namespace cowmgr {
namespace {

constexpr std::array<std::string_view, 30> kNames = {"ok",
                                                     "invalid_name",
                                                     "invalid_dtype",
                                                     "invalid_shape",
                                                     "invalid_argument",
                                                     "invalid_file",
                                                     "not_found",
                                                     "already_exists",
                                                     "permission_denied",
                                                     "out_of_memory",
                                                     "quota_exceeded",
                                                     "still_writable",
                                                     "busy",
                                                     "pinned",
                                                     "not_holder",
                                                     "already_committed",
                                                     "slot_failed",
                                                     "timed_out",
                                                     "no_daemon",
                                                     "disconnected",
                                                     "protocol_mismatch",
                                                     "protocol_error",
                                                     "tampered",
                                                     "corrupted",
                                                     "wrong_process",
                                                     "shutting_down",
                                                     "os_failure",
                                                     "unsupported",
                                                     "cancelled",
                                                     "no_workers"};

Errc code_of(int number) noexcept {
  switch (number) {
    case ENOSPC:
    case ENOMEM:
      return Errc::out_of_memory;
    case EACCES:
    case EPERM:
      return Errc::permission_denied;
    case ENOENT:
      return Errc::not_found;
    default:
      return Errc::os_failure;
  }
}

}  // namespace

std::string_view to_string(Errc code) noexcept {
  const auto index = static_cast<std::size_t>(code);
  return index < kNames.size() ? kNames[index] : "unknown_error";
}

Error os_error(std::string_view what, std::string_view name, int number) {
  return {code_of(number), fmt::format("{} {}: {}", what, name, std::generic_category().message(number))};
}

void assertion_failed(const char* expression, const char* file, int line) noexcept {
  std::fprintf(stderr, "cowmgr: internal error: %s does not hold (%s:%d)\n", expression, file, line);
  std::abort();
}

}  // namespace cowmgr
