#include "client/channel.hpp"

#include <cerrno>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <utility>

#include "client/fork_guard.hpp"
#include "proto/fd_socket.hpp"

namespace cowmgr::detail {
namespace {

// How long connect(2) and send(2) wait before we look whether they may wait longer. They seldom wait at all.
constexpr Milliseconds kLook{200};

Error unanswered() {
  return {Errc::timed_out, "the daemon does not answer; is it stopped?"};
}

Channel::State state_after(const Error& error) noexcept {
  switch (error.code) {
    case Errc::disconnected:
      return Channel::State::ended;
    case Errc::protocol_error:
      return Channel::State::ready;
    default:
      return Channel::State::broken;
  }
}

}  // namespace

Result<std::unique_ptr<Channel>> Channel::connect(const std::string& path, std::uint64_t epoch,
                                                  const Limit& limit) {
  for (;;) {
    auto socket = connect_to(path, kLook);
    if (socket) return std::unique_ptr<Channel>(new Channel(*std::move(socket), epoch));
    if (socket.error().code != Errc::timed_out || limit.is_over()) return error_of(std::move(socket));
  }
}

Channel::Channel(UniqueFd socket, std::uint64_t epoch)
    : socket_(std::move(socket)),
      mark_(socket_.get()),
      epoch_(epoch),
      buffer_(new std::byte[kMaxFrameBytes]),
      generation_(fork_generation()) {
  close_in_children(socket_.get());
}

Channel::~Channel() {
  // In a child the number was closed at the fork, and may be another file by now.
  if (generation_ != fork_generation()) {
    (void)socket_.release();
    return;
  }
  shutdown();  // it may be watched through a duplicate
  forget_fd(socket_.get());
  if (!is_intact()) (void)socket_.release();
}

Builder& Channel::builder() noexcept {
  builder_.Clear();
  was_sent_ = false;
  was_left_unread_ = false;
  return builder_;
}

void Channel::shutdown() const noexcept {
  if (is_intact()) ::shutdown(socket_.get(), SHUT_RDWR);
}

UniqueFd Channel::duplicate() const noexcept {
  return UniqueFd(::fcntl(socket_.get(), F_DUPFD_CLOEXEC, 0));
}

tl::unexpected<Error> Channel::robbed() {
  state_ = State::ended;
  return fail(Errc::disconnected, "the program closed the descriptor of the connection to the daemon");
}

Result<void> Channel::send(const Limit& limit) {
  for (;;) {
    if (!is_intact()) return robbed();
    const auto sent = send_frame(socket_.get(), bytes_of(builder_));
    was_sent_ = sent && *sent;
    if (was_sent_) return {};
    if (sent && limit.is_over()) return tl::unexpected(unanswered());
    if (sent) continue;
    // What does not fit a frame was not sent.
    if (sent.error().code != Errc::invalid_argument) state_ = state_after(sent.error());
    return error_of(sent);
  }
}

Result<const wire::Reply*> Channel::exchange(const Limit& limit) {
  // Whoever hung up may have said why before.
  if (auto sent = send(limit); !sent && (sent.error().code != Errc::disconnected || !is_intact()))
    return error_of(std::move(sent));
  state_ = State::owed;
  return take_reply(limit);
}

Result<const wire::Reply*> Channel::receive(const Limit& limit) {
  if (!is_intact()) return robbed();
  return take_reply(limit);
}

// Without a limit, recvmsg(2) alone waits: a system call less.
bool Channel::await(const Limit& limit) const {
  if (!limit.is_set()) return true;
  for (;;) {
    pollfd event{socket_.get(), POLLIN, 0};
    const int ready = ::poll(&event, 1, limit.poll_ms());
    if (ready > 0) return true;
    if (ready == 0 && limit.is_over()) return false;
    if (ready < 0 && errno != EINTR) return true;  // recvmsg(2) will say what is wrong
  }
}

// recvmsg(2) keeps the socket that it began with; poll(2) may have ended with another at its number.
Result<const wire::Reply*> Channel::take_reply(const Limit& limit) {
  if (!await(limit)) return tl::unexpected(unanswered());
  if (limit.is_set() && !is_intact()) return robbed();
  const auto receive = [&] { return receive_frame(socket_.get(), {buffer_.get(), kMaxFrameBytes}); };
  auto frame = receive();
  was_left_unread_ = !frame && left_unread(frame.error());
  // The kernel tells of the end first if the other side has left us unread.
  if (!frame && frame.error().code == Errc::disconnected) frame = receive();
  if (!frame) {
    state_ = state_after(frame.error());
    return error_of(std::move(frame));
  }
  if (!*frame) {
    state_ = State::broken;
    return fail(Errc::os_failure, "the connection to the daemon was made non-blocking");
  }
  state_ = State::ready;
  fds_ = std::move((*frame)->fds);
  lacks_fds_ = (*frame)->lacks_fds;
  const auto* reply = verified_root<wire::Reply>((*frame)->bytes);
  if (reply == nullptr || reply->body() == nullptr)
    return fail(Errc::protocol_error, "the daemon's reply is malformed");
  return reply;
}

}  // namespace cowmgr::detail
