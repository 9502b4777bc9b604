// Who serves: a socket at a path that others can write to may be anybody's.
#pragma once

#include <string>

#include "proto/errors.hpp"

namespace cowmgr::detail {

// Whether the process that listens at the other end of `socket`, which is connected to `path`, may be
// trusted: it is of this process's user, of root, of the user `named` (a name or a number; empty: none is
// named), or of the owner of the socket's directory where only root could have made that, as a packaged
// service has it.
//
// In a user namespace all users from outside look like one, the overflow user (user_namespaces(7)): that one
// is trusted only by name. Errors: permission_denied, which says whose it is, and how to allow it;
// invalid_argument when there is no user of that name.
[[nodiscard]] Result<void> check_server(int socket, const std::string& path, const std::string& named);

}  // namespace cowmgr::detail
