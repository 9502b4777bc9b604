// One connection from its first frame to its last: introduce, then read, check, act, reply, repeat.
#pragma once

#include "daemon/core.hpp"
#include "daemon/peer.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// Serves one connection until it ends. `peer` is who the kernel says it is; `pidfd` (or none) its process.
// The peer's connection has been charged to its quota, and is released at the end.
[[nodiscard]] asio::awaitable<void> serve(Core& core, UniqueFd socket, Peer peer, UniqueFd pidfd);

// Tells a peer that it is not served, if its socket takes that at once.
void refuse(int socket, const Error& error);

}  // namespace cowmgr
