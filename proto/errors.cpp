#include "proto/errors.hpp"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <sys/resource.h>
#include <system_error>
#include <unistd.h>

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
    case EFBIG:
      return Errc::out_of_memory;
    case EMFILE:
    case ENFILE:
      return Errc::quota_exceeded;
    case EACCES:
    case EPERM:
      return Errc::permission_denied;
    case ENOENT:
      return Errc::not_found;
    default:
      return Errc::os_failure;
  }
}

// " (address space of this process is limited to 1 GiB: `ulimit -v`)", or nothing where there is no such
// limit.
std::string limit_in_words(__rlimit_resource_t resource, std::string_view what, std::string_view flag) {
  rlimit limit{};
  if (::getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return {};
  return fmt::format(" ({} of process {} is limited to {}: `ulimit {}`)", what, ::getpid(), limit.rlim_cur,
                     flag);
}

// Which of the process's own limits it was, as far as it can be one: the error says only that there is no
// more.
std::string cause_of(int number) {
  switch (number) {
    case ENOMEM:
      return limit_in_words(RLIMIT_AS, "the address space in bytes", "-v") +
             limit_in_words(RLIMIT_DATA, "the data in bytes", "-d");
    case EFBIG:
      return limit_in_words(RLIMIT_FSIZE, "the size of a file in bytes", "-f");
    case EMFILE:
      return limit_in_words(RLIMIT_NOFILE, "the number of open files", "-n");
    default:
      return {};
  }
}

}  // namespace

std::string_view to_string(Errc code) noexcept {
  const auto index = static_cast<std::size_t>(code);
  return index < kNames.size() ? kNames[index] : "unknown_error";
}

Error os_error(std::string_view what, std::string_view name, int number) {
  return {code_of(number),
          fmt::format("{} {}: {}{}", what, name, std::generic_category().message(number), cause_of(number))};
}

void assertion_failed(const char* expression, const char* file, int line) noexcept {
  std::fprintf(stderr, "cowmgr: internal error: %s does not hold (%s:%d)\n", expression, file, line);
  std::abort();
}

}  // namespace cowmgr
