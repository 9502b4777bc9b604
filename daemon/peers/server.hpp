// The daemon as the world sees it: a socket that accepts, signals that stop, a parent that may end.
#pragma once

#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/signal_set.hpp>

#include "daemon/core/housekeeping.hpp"
#include "daemon/peers/sockets.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// The signal that tells of a broken lease: a real-time one, so that each is queued with its descriptor.
[[nodiscard]] int lease_signal() noexcept;

class Server {
 public:
  // `listener`: listening, non-blocking. `names`: of ShmEnv::watch_names(), from before the recovery.
  Server(asio::io_context& io, Core& core, Housekeeping& housekeeping, UniqueFd listener, UniqueFd names);

  // Serves until SIGTERM, SIGINT, a Shutdown request, or the end of the parent of an embedded daemon; then
  // ends every session. Blocks. What the arrays held is given back by then.
  void run();

 private:
  [[nodiscard]] asio::awaitable<void> accept_peers();
  [[nodiscard]] int accept_one();
  [[nodiscard]] asio::awaitable<void> watch_signals();
  [[nodiscard]] asio::awaitable<void> watch_leases();
  [[nodiscard]] asio::awaitable<void> watch_names();
  [[nodiscard]] asio::awaitable<void> watch_parent();
  void run_loop();
  void tend();
  [[nodiscard]] bool finds_more();
  [[nodiscard]] bool take_turns();
  void stop();

  asio::io_context& io_;
  Core& core_;
  Housekeeping& housekeeping_;
  Sockets sockets_;
  asio::posix::stream_descriptor listener_;
  asio::posix::stream_descriptor leases_;
  asio::posix::stream_descriptor names_;
  asio::posix::stream_descriptor parent_;
  asio::signal_set signals_;
  asio::steady_timer pause_;
  bool is_short_ = false;  // of what a connection takes
  bool is_stopping_ = false;
};

}  // namespace cowmgr
