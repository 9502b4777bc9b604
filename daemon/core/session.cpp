#include "daemon/core/session.hpp"

#include <sys/socket.h>
#include <utility>

#include <boost/asio/as_tuple.hpp>
#include <fmt/format.h>

namespace cowmgr {

Session::Session(Core& core, SessionId id, Peer peer, std::string command)
    : core_(core),
      id_(id),
      peer_(std::move(peer)),
      command_(std::move(command)),
      connected_(Core::now()),
      pidfd_(core.io) {
  core_.store.open_session(id_, peer_);
}

void Session::close() {
  if (gone_.exchange(true)) return;
  core_.log.debug(peer_.uid, [&] {
    return fmt::format("session {} of process {} ({}) ended", id_, peer_.pid, command_);
  });
  for (const int socket : sockets_) ::shutdown(socket, SHUT_RDWR);
  const std::string end = end_of(peer_.pid, pidfd_.is_open() ? pidfd_.native_handle() : -1);
  boost::system::error_code ignored;
  pidfd_.close(ignored);
  if (!core_.keeps_sessions()) {
    core_.results.close_session(id_, end, Core::now());
    core_.store.close_session(id_);
  }
  core_.sessions.erase(id_);  // may be the last reference to this object
}

void Session::end_telling() {
  const Held said = std::exchange(held_, {});
  core_.results.keep_only(id_, said.slots, Core::now());
  core_.store.keep_only(id_, said.views, said.writing, Core::now());
  ++times_told_;
}

void Session::remove(int socket) {
  sockets_.erase(socket);
  if (sockets_.empty()) close();
}

asio::awaitable<void> Session::watch_process(UniqueFd pidfd) {
  const auto self = shared_from_this();
  pidfd_.assign(pidfd.release());
  for (;;) {
    const auto [error] = co_await pidfd_.async_wait(asio::posix::stream_descriptor::wait_read,
                                                    asio::as_tuple(asio::use_awaitable));
    if (error) co_return;
    if (is_readable(pidfd_.native_handle())) break;
  }
  close();
}

}  // namespace cowmgr
