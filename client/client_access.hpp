// What the pool, which lies above the library, must know of a client's connection.
#pragma once

#include <string>

namespace cowmgr {
class Client;
}  // namespace cowmgr

namespace cowmgr::detail {

struct ClientAccess {
  // As ConnectOptions::daemon_user, for the workers' own connections.
  [[nodiscard]] static const std::string& daemon_user(const Client& client) noexcept;
  // Whether the program ever took a descriptor from the connection.
  [[nodiscard]] static bool was_robbed(const Client& client) noexcept;
};

}  // namespace cowmgr::detail
