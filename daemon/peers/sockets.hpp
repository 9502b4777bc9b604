// The sockets of all connections: how they are closed, and how the end of the daemon reaches each.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

#include <boost/asio/io_context.hpp>

#include "daemon/peers/closer.hpp"
#include "daemon/store/charges.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

class Sockets {
 public:
  explicit Sockets(boost::asio::io_context& io) : io_(io) {}
  ~Sockets() = default;
  Sockets(const Sockets&) = delete;
  Sockets& operator=(const Sockets&) = delete;

  // Where this kernel lets peers pass descriptors to this listener, and so to all that it accepts: from here
  // on what they pass is closed away from the loop.
  void look_at(int listener);
  [[nodiscard]] bool may_bring_descriptors() const noexcept { return closer_.has_value(); }

  // A connection's, and what it was charged, until it is closed.
  void add(int socket, Charge charge) { open_.insert_or_assign(socket, std::move(charge)); }
  // Closes one, elsewhere where that may take its time.
  void close(UniqueFd socket);
  // Connections that nobody has accepted go with it, and what their peers have passed.
  void close_listener(UniqueFd listener);
  // Every operation under way, and every later one, reports the end of its connection.
  void shut_down_all() noexcept;

 private:
  boost::asio::io_context& io_;
  std::map<int, Charge> open_;
  std::map<std::uint64_t, Charge> closing_;  // elsewhere
  std::uint64_t last_closing_ = 0;
  std::optional<Closer> closer_;
};

}  // namespace cowmgr
