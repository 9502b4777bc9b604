#include "daemon/channel.hpp"

#include <array>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <fmt/format.h>

#include "daemon/descriptors.hpp"
#include "proto/fd_socket.hpp"

namespace cowmgr {
namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);

// Every frame is received here and copied out: one buffer for all connections of the one loop, since nothing
// else runs between recv(2) and the copy.
alignas(16) thread_local std::array<std::byte, kMaxFrameBytes> scratch;

}  // namespace

Channel::Channel(Core& core, UniqueFd socket, uid_t uid)
    : core_(core), uid_(uid), socket_(core.io, socket.release()) {}

bool Channel::close_for(std::string_view why) {
  core_.log.debug(uid_, [&] { return fmt::format("a connection of user {} is closed: {}", uid_, why); });
  return false;
}

asio::awaitable<bool> Channel::receive(std::vector<std::byte>& frame) {
  for (;;) {
    // Waiting first is one system call less than trying first: a peer asks, and then waits for the answer. It
    // also gives the others their turn, however fast this one sends.
    const auto [error] = co_await socket_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return false;
    if (core_.closer) {
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
  core_.log.warn(uid_, [&] {
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

asio::awaitable<Channel::Woken> Channel::wait_change(const WaitKey& key, Deadline deadline) {
  using asio::experimental::awaitable_operators::operator||;
  asio::steady_timer timer(core_.io, deadline);
  const WaitList::Entry entry(core_.waits, key, timer);
  // A peer sends nothing while its request is under way: a socket that can be read has ended, or is misused.
  auto ended = co_await (timer.async_wait(kAwait) ||
                         socket_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait));
  // Woken for nothing, whoever waits looks again, and misses no change.
  if (ended.index() == 1) co_return is_readable(socket_.native_handle()) ? Woken::peer_gone : Woken::changed;
  const bool was_woken = std::get<0>(std::get<0>(ended)) == asio::error::operation_aborted;
  co_return was_woken ? Woken::changed : Woken::deadline;
}

void Channel::shutdown() noexcept {
  ::shutdown(socket_.native_handle(), SHUT_RDWR);
}

}  // namespace cowmgr
