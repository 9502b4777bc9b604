// One connection from its first frame to its last: introduce, then read, check, act, reply, repeat.
#pragma once

#include "daemon/core/core.hpp"
#include "daemon/peers/sockets.hpp"
#include "daemon/store/peer.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// Serves one connection until it ends. `peer` is who the kernel says it is; `pidfd` (or none) its process.
// `socket` is one of `sockets`, which close it at the end.
[[nodiscard]] asio::awaitable<void> serve(Core& core, Sockets& sockets, UniqueFd socket, Peer peer,
                                          UniqueFd pidfd);

// Tells a peer that it is not served, if its socket takes that at once.
void refuse(int socket, const Error& error);

}  // namespace cowmgr
