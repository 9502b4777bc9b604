// The socket of one connection in the loop: whole frames in and out.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>

#include "daemon/core/peer_log.hpp"
#include "daemon/core/waits.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

class Channel {
 public:
  // `socket`: connected, non-blocking; of a peer of user `uid`. With `may_bring_descriptors`, each record is
  // looked at before it is received.
  Channel(asio::io_context& io, PeerLog& log, UniqueFd socket, uid_t uid, bool may_bring_descriptors);
  // The socket, for whoever closes it. Nothing is under way, and nothing follows.
  [[nodiscard]] UniqueFd take_socket() { return UniqueFd(socket_.release()); }

  // The next frame, copied to `frame`. False when the connection ended or broke the protocol, as one that
  // brings descriptors does: they are still in the socket then.
  [[nodiscard]] asio::awaitable<bool> receive(std::vector<std::byte>& frame);

  enum class Sent { yes, connection_ended, too_many_descriptors, no_room };
  // Sends one frame with its descriptors, if the socket has room for it, as it has when the peer reads. The
  // kernel refuses descriptors when too many of this user are on their way through sockets already (unix(7),
  // ETOOMANYREFS): nothing was sent then.
  [[nodiscard]] Sent try_send(std::span<const std::byte> bytes, std::span<const int> fds);
  // After no_room: waits until there is.
  [[nodiscard]] asio::awaitable<Sent> send_late(std::span<const std::byte> bytes, std::span<const int> fds);

  // Waits in the peer's name.
  [[nodiscard]] Waiter waiter(WaitList& list) { return {list, socket_}; }
  [[nodiscard]] int fd() { return socket_.native_handle(); }

 private:
  [[nodiscard]] bool leaves_descriptors_unread();
  [[nodiscard]] bool close_for(std::string_view why);

  PeerLog& log_;
  uid_t uid_;
  bool may_bring_descriptors_;
  asio::posix::stream_descriptor socket_;
  bool has_sent_descriptors_ = false;  // with the last frame
};

}  // namespace cowmgr
