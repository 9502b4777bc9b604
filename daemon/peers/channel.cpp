#include "daemon/peers/channel.hpp"

#include <array>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <fmt/format.h>

#include "daemon/shm/descriptors.hpp"
#include "proto/fd_socket.hpp"

namespace cowmgr {
namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);

// Every frame is received here and copied out: one buffer for all connections of the one loop, since nothing
// else runs between recv(2) and the copy.
alignas(16) thread_local std::array<std::byte, kMaxFrameBytes> scratch;

}  // namespace

Channel::Channel(asio::io_context& io, PeerLog& log, UniqueFd socket, uid_t uid, bool may_bring_descriptors)
    : log_(log), uid_(uid), may_bring_descriptors_(may_bring_descriptors), socket_(io, socket.release()) {}

bool Channel::close_for(std::string_view why) {
  log_.debug(uid_, [&] { return fmt::format("a connection of user {} is closed: {}", uid_, why); });
  return false;
}

asio::awaitable<bool> Channel::receive(std::vector<std::byte>& frame) {
  for (;;) {
    // Waiting first is one system call less than trying first: a peer asks, and then waits for the answer. It
    // also gives the others their turn, however fast this one sends.
    const auto [error] = co_await socket_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return false;
    if (may_bring_descriptors_) {
      const NextRecord next = next_record(socket_.native_handle());
      if (next == NextRecord::none) continue;
      if (next == NextRecord::with_descriptors) co_return close_for("it passes descriptors");
    }
    const auto received = receive_bytes(socket_.native_handle(), scratch);
    if (!received) {
      if (received.error().code == Errc::disconnected) co_return false;
      co_return close_for(received.error().message);
    }
    if (*received) {
      if (leaves_descriptors_unread())
        co_return close_for("it asks again before it has taken what it was sent");
      frame.assign((*received)->begin(), (*received)->end());
      co_return true;
    }
  }
}

// Descriptors in sockets count against this user (unix(7)): a peer that asks and never reads would use up
// what all others need.
bool Channel::leaves_descriptors_unread() {
  int unread_bytes = 0;
  return has_sent_descriptors_ && ::ioctl(socket_.native_handle(), SIOCOUTQ, &unread_bytes) == 0 &&
         unread_bytes > 0;
}

Channel::Sent Channel::try_send(std::span<const std::byte> bytes, std::span<const int> fds) {
  has_sent_descriptors_ = !fds.empty();
  const auto sent = send_frame(socket_.native_handle(), bytes, fds);
  if (sent) return *sent ? Sent::yes : Sent::no_room;
  if (sent.error().code == Errc::disconnected) return Sent::connection_ended;
  log_.warn(uid_, [&] {
    return fmt::format("a reply to user {} could not be sent: {}", uid_, sent.error().message);
  });
  return fds.empty() ? Sent::connection_ended : Sent::too_many_descriptors;
}

// What `fds` name may be closed while we wait, and the numbers be
// given to other files, so the wait needs descriptors of its own.
asio::awaitable<Channel::Sent> Channel::send_late(std::span<const std::byte> bytes,
                                                  std::span<const int> fds) {
  if (!check_descriptors(fds.size())) co_return Sent::too_many_descriptors;
  std::vector<SegmentFd> owned;
  std::vector<int> numbers;
  for (const int fd : fds) {
    owned.emplace_back(UniqueFd(::dup(fd)));
    numbers.push_back(owned.back().get());
    if (!owned.back()) co_return Sent::too_many_descriptors;
  }
  for (;;) {
    const auto [error] = co_await socket_.async_wait(asio::posix::stream_descriptor::wait_write, kAwait);
    if (error) co_return Sent::connection_ended;
    const auto sent = send_frame(socket_.native_handle(), bytes, numbers);
    if (sent && *sent) co_return Sent::yes;
    if (!sent) co_return Sent::connection_ended;
  }
}

}  // namespace cowmgr
