#include "daemon/peer.hpp"

#include <algorithm>

namespace cowmgr {

bool is_allowed(const Peer& peer, const Ownership& owned, Right right, uid_t admin) noexcept {
  if (peer.uid == 0 || peer.uid == admin) return true;
  const bool is_member = peer.gid == owned.gid ||
                         std::find(peer.groups.begin(), peer.groups.end(), owned.gid) != peer.groups.end();
  const unsigned shift = peer.uid == owned.uid ? 6 : is_member ? 3 : 0;
  return (owned.mode >> shift & static_cast<std::uint32_t>(right)) != 0;
}

}  // namespace cowmgr
