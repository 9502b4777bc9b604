// Closes, away from the loop, sockets whose peers have passed descriptors that nobody asked for.
//
// Whoever closes the last descriptor of an open file waits for that: a TCP socket with SO_LINGER and unsent
// data takes as long as the peer said. Since Linux 6.16 the daemon's sockets take no descriptors at all
// (proto/fd_socket.hpp); this is for kernels before that.
#pragma once

#include <functional>
#include <memory>

#include "proto/unique_fd.hpp"

namespace cowmgr {

class Closer {
 public:
  // Starts the thread. Throws std::system_error when it cannot be had.
  Closer();
  // What is still being closed is closed in the background; nobody waits for that, the end of the process
  // neither.
  ~Closer();
  Closer(const Closer&) = delete;
  Closer& operator=(const Closer&) = delete;

  // Then `closed` is called, if there is any, in the thread; but not once this object has gone.
  void close(UniqueFd fd, std::function<void()> closed);

 private:
  struct Shared;
  static void work(Shared& shared);

  std::shared_ptr<Shared> shared_;
};

}  // namespace cowmgr
