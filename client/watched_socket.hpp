// A channel's socket under a descriptor of its own, so that poll(2) tells of the daemon's end whatever
// becomes of the channel.
#pragma once

#include <sys/socket.h>
#include <utility>

#include "client/channel.hpp"
#include "client/fork_guard.hpp"
#include "client/socket_mark.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

// Guarded by pool_mutex(), so that no fork comes between: a number that stays registered with fork_guard.hpp
// would be closed in every child, whatever it names by then.
class WatchedSocket {
 public:
  WatchedSocket() = default;
  WatchedSocket(const WatchedSocket&) = delete;
  WatchedSocket& operator=(const WatchedSocket&) = delete;
  ~WatchedSocket() { reset(); }

  void watch(const Channel& channel) noexcept {
    reset();
    generation_ = fork_generation();
    fd_ = channel.duplicate();
    mark_ = SocketMark(fd_.get());
    close_in_children(fd_.get());
  }
  // -1: none is watched, or no descriptor was to be had.
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }
  // Whether the program closed the descriptor, or put another file in its place.
  [[nodiscard]] bool is_robbed() const noexcept { return fd_ && !mark_.is_still(fd_.get()); }
  // Ends the connection, and so a poll(2) of it.
  void shutdown() const noexcept {
    if (mark_.is_still(fd_.get())) ::shutdown(fd_.get(), SHUT_RDWR);
  }
  void reset() noexcept {
    if (generation_ != fork_generation()) {  // closed in this child already, at the fork
      (void)fd_.release();
      return;
    }
    forget_fd(fd_.get());
    if (is_robbed()) (void)fd_.release();
    fd_.reset();
  }

 private:
  UniqueFd fd_;
  SocketMark mark_{-1};
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
