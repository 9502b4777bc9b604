// What makes an error, for both sides: the codes themselves are public (cowmgr/errors.hpp).
//
// 1. Errors of the operating system are made by os_error() alone, so that each names the call and its object.
// 2. A bug of our own is not an Error: it asserts (COWMGR_ASSERT), in release builds too.
#pragma once

#include <string_view>

#include "cowmgr/errors.hpp"  // IWYU pragma: export

namespace cowmgr {

// The error for a failed system call: `what` is the call, `name` its object, `number` errno.
// ENOSPC and ENOMEM become out_of_memory, EACCES and EPERM permission_denied, ENOENT not_found.
[[nodiscard]] Error os_error(std::string_view what, std::string_view name, int number);

[[noreturn]] void assertion_failed(const char* expression, const char* file, int line) noexcept;

}  // namespace cowmgr

// Stops the process at a bug of our own. Stays in release builds: state that is wrong must not be served.
#define COWMGR_ASSERT(expression) \
  (static_cast<bool>(expression) ? void() : ::cowmgr::assertion_failed(#expression, __FILE__, __LINE__))
