#include "daemon/peers/sockets.hpp"

#include <sys/socket.h>
#include <utility>

#include <boost/asio/post.hpp>

#include "proto/fd_socket.hpp"

namespace cowmgr {

void Sockets::look_at(int listener) {
  if (takes_descriptors(listener)) closer_.emplace();
}

void Sockets::close(UniqueFd socket) {
  auto charged = open_.extract(socket.get());
  if (!closer_ || shut_and_drain(socket.get())) {
    socket.reset();
    return;
  }
  const std::uint64_t number = ++last_closing_;
  if (charged) closing_.emplace(number, std::move(charged.mapped()));
  closer_->close(std::move(socket),
                 [this, number] { boost::asio::post(io_, [this, number] { closing_.erase(number); }); });
}

void Sockets::close_listener(UniqueFd listener) {
  ::shutdown(listener.get(), SHUT_RDWR);  // connect(2) is refused from now on
  if (closer_) closer_->close(std::move(listener), {});
}

void Sockets::shut_down_all() noexcept {
  for (const auto& [socket, charge] : open_) ::shutdown(socket, SHUT_RDWR);
}

}  // namespace cowmgr
