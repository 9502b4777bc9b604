#include "proto/fd_socket.hpp"

#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <fmt/format.h>

#include "proto/text.hpp"

#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83  // Linux 6.16
#endif

namespace cowmgr {
namespace {

constexpr int kBacklog = 4096;  // the kernel cuts it to net.core.somaxconn

using ControlBuffer = std::array<char, CMSG_SPACE(kMaxFrameFds * sizeof(int))>;

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path || path.find('\0') != std::string::npos) {
    return fail(Errc::invalid_argument,
                fmt::format("the socket path {} must have 1 to {} bytes; choose another one", printable(path),
                            sizeof address.sun_path - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

Result<UniqueFd> new_socket(int flags) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0));
  if (!fd) return tl::unexpected(os_error("socket", "AF_UNIX", errno));
  return fd;
}

const sockaddr* generic(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

constexpr std::string_view kLeftUnread =
    "the other side closed the connection, and left unread what was sent";

Error disconnected() {
  return {Errc::disconnected, "the other side closed the connection"};
}

// Why the receive call `name` failed.
Error not_received(std::string_view name) {
  if (errno == ECONNRESET) return {Errc::disconnected, std::string(kLeftUnread)};
  return os_error(name, "a frame", errno);
}

// Makes room for `count` more; without memory for that, closes the descriptors, which nobody owns yet.
bool has_room(std::vector<UniqueFd>& fds, const cmsghdr* part, std::size_t count) noexcept {
  try {
    fds.reserve(fds.size() + count);
    return true;
  } catch (const std::bad_alloc&) {
  }
  for (std::size_t i = 0; i < count; ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
    const UniqueFd closed(fd);
  }
  return false;
}

// Takes the descriptors out of a received message, before anything else can fail.
std::vector<UniqueFd> take_fds(msghdr& message) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    if (!has_room(fds, part, count)) {
      message.msg_flags |= MSG_CTRUNC;
      continue;
    }
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      fds.emplace_back(fd);
    }
  }
  return fds;
}

// A file for a socket is made with the mode that the socket has, but for the umask (unix(7)), which is of the
// whole process. Default access lists of the directory may take more away: chmod gives that back.
Result<void> bind_with_mode(int socket, const sockaddr_un& address, const std::string& path, mode_t mode) {
  (void)::fchmod(socket, mode);
  const mode_t before = ::umask(0);
  const int rc = ::bind(socket, generic(address), sizeof address);
  const int number = errno;
  ::umask(before);
  if (rc != 0) return tl::unexpected(os_error("bind", path, number));
  struct stat made {};
  if (::stat(path.c_str(), &made) == 0 && (made.st_mode & 07777U) == mode) return {};
  if (::chmod(path.c_str(), mode) != 0) return tl::unexpected(os_error("chmod", path, errno));
  return {};
}

void put_fds(msghdr& message, ControlBuffer& control, std::span<const int> fds) {
  message.msg_control = control.data();
  message.msg_controllen = CMSG_SPACE(fds.size_bytes());
  cmsghdr* part = CMSG_FIRSTHDR(&message);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(fds.size_bytes());
  std::memcpy(CMSG_DATA(part), fds.data(), fds.size_bytes());
}

}  // namespace

Result<UniqueFd> connect_to(const std::string& path, std::chrono::milliseconds patience) {
  const auto address = address_of(path);
  if (!address) return error_of(address);
  auto fd = new_socket(0);
  if (!fd) return fd;
  // connect(2) waits too, while the listener's queue is full.
  const timeval wait{patience.count() / 1000, patience.count() % 1000 * 1000};
  if (patience.count() > 0 && ::setsockopt(fd->get(), SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) != 0)
    return tl::unexpected(os_error("setsockopt", "SO_SNDTIMEO", errno));
  int rc = 0;
  do rc = ::connect(fd->get(), generic(*address), sizeof *address);
  while (rc != 0 && errno == EINTR);
  if (rc == 0) return fd;
  if (errno == ENOENT || errno == ECONNREFUSED || errno == ENOTDIR) {
    return fail(
        Errc::no_daemon,
        fmt::format("no cowmgr daemon listens at {}; start one with `cowmgr --socket {}`", path, path));
  }
  if (errno == EAGAIN)
    return fail(Errc::timed_out, fmt::format("the daemon at {} takes no connections; is it stopped?", path));
  return tl::unexpected(os_error("connect", path, errno));
}

Result<UniqueFd> listen_at(const std::string& path, int mode) {
  const auto address = address_of(path);
  if (!address) return error_of(address);
  auto fd = new_socket(SOCK_NONBLOCK);
  if (!fd) return fd;
  if (auto ok = bind_with_mode(fd->get(), *address, path, static_cast<mode_t>(mode)); !ok)
    return error_of(ok);
  // Connections are as their listener when they begin: after accept(2) it is too late, what was passed before
  // lies in the queue. An older kernel does not know the option; takes_descriptors() tells.
  const int none = 0;
  (void)::setsockopt(fd->get(), SOL_SOCKET, SO_PASSRIGHTS, &none, sizeof none);
  if (::listen(fd->get(), kBacklog) != 0) return tl::unexpected(os_error("listen", path, errno));
  return fd;
}

bool takes_descriptors(int socket) noexcept {
  int value = 1;
  socklen_t bytes = sizeof value;
  return ::getsockopt(socket, SOL_SOCKET, SO_PASSRIGHTS, &value, &bytes) != 0 || value != 0;
}

namespace {

// Looks at the next record with room for so much control data. The kernel says MSG_CTRUNC where there is more
// (recvmsg(2)), and MSG_PEEK keeps it from closing the descriptors that it leaves out.
ssize_t peek(int socket, msghdr& message, std::span<char> control) noexcept {
  std::byte first{};
  iovec part{&first, 1};
  message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t count = -1;
  do count = ::recvmsg(socket, &message, MSG_PEEK | MSG_DONTWAIT);
  while (count < 0 && (errno == EINTR || errno == ECONNRESET));  // an error is told once
  message.msg_iov = nullptr;
  return count;
}

}  // namespace

NextRecord next_record(int socket) noexcept {
  msghdr message{};
  const ssize_t count = peek(socket, message, {});
  if (count < 0 && errno == EAGAIN) return NextRecord::none;
  return count >= 0 && (message.msg_flags & MSG_CTRUNC) != 0 ? NextRecord::with_descriptors
                                                             : NextRecord::plain;
}

// With SO_PASSCRED each record comes with its sender's credentials: so one of no bytes is told from the end.
bool shut_and_drain(int socket) noexcept {
  const int yes = 1;
  ::shutdown(socket, SHUT_RDWR);  // nothing more comes
  if (::setsockopt(socket, SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) != 0) return false;
  for (;;) {
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(ucred))> credentials{};
    msghdr message{};
    std::byte first{};
    if (peek(socket, message, credentials) < 0 || message.msg_controllen == 0) return true;
    if ((message.msg_flags & MSG_CTRUNC) != 0) return false;
    (void)::recv(socket, &first, 1, MSG_DONTWAIT);  // the record goes, however long it is
  }
}

Result<bool> send_frame(int socket, std::span<const std::byte> bytes, std::span<const int> fds) {
  COWMGR_ASSERT(!bytes.empty());  // see receive_frame()
  if (bytes.size() > kMaxFrameBytes || fds.size() > kMaxFrameFds) {
    return fail(
        Errc::invalid_argument,
        fmt::format(
            "the request takes {} bytes and {} descriptors, a frame holds {} and {}; ask for less at once",
            bytes.size(), fds.size(), kMaxFrameBytes, kMaxFrameFds));
  }
  const auto send_once = [&] {
    if (fds.empty()) return ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);  // the cheaper call
    iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};  // sendmsg(2) does not write to it
    alignas(cmsghdr) ControlBuffer control;
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    put_fds(message, control, fds);
    return ::sendmsg(socket, &message, MSG_NOSIGNAL);
  };
  for (;;) {
    if (send_once() >= 0) return true;
    if (errno == EAGAIN) return false;
    if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN) return tl::unexpected(disconnected());
    if (errno != EINTR) return tl::unexpected(os_error(fds.empty() ? "send" : "sendmsg", "a frame", errno));
  }
}

Result<std::optional<Frame>> receive_frame(int socket, std::span<std::byte> buffer) {
  COWMGR_ASSERT(buffer.size() >= kMaxFrameBytes);
  iovec part{buffer.data(), kMaxFrameBytes};
  alignas(cmsghdr) ControlBuffer control;
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t count = -1;
  do count = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  while (count < 0 && errno == EINTR);
  if (count < 0 && errno == EAGAIN) return std::optional<Frame>();
  if (count < 0) return tl::unexpected(not_received("recvmsg"));
  Frame frame{buffer.first(static_cast<std::size_t>(count)), take_fds(message), false};
  // A record of no bytes, which may bring descriptors, reads like the end of the connection; no frame is
  // empty, so both end it.
  if (count == 0) return tl::unexpected(disconnected());
  const bool is_cut = (message.msg_flags & MSG_TRUNC) != 0;
  // The kernel drops those beyond our room for them, and those that this process has no number left for.
  frame.lacks_fds = (message.msg_flags & MSG_CTRUNC) != 0;
  if (is_cut || (frame.lacks_fds && frame.fds.size() >= kMaxFrameFds)) {
    return fail(Errc::protocol_error,
                "a frame is longer, or carries more descriptors, than the protocol allows");
  }
  return std::optional<Frame>(std::move(frame));
}

bool left_unread(const Error& error) noexcept {
  return error.code == Errc::disconnected && error.message == kLeftUnread;
}

Result<std::optional<std::span<const std::byte>>> receive_bytes(int socket, std::span<std::byte> buffer) {
  COWMGR_ASSERT(buffer.size() >= kMaxFrameBytes);
  ssize_t count = -1;
  do count = ::recv(socket, buffer.data(), kMaxFrameBytes, MSG_TRUNC);  // tells how long the record was
  while (count < 0 && errno == EINTR);
  if (count < 0 && errno == EAGAIN) return std::optional<std::span<const std::byte>>();
  if (count < 0) return tl::unexpected(not_received("recv"));
  if (count == 0) return tl::unexpected(disconnected());
  const auto size_bytes = static_cast<std::size_t>(count);
  if (size_bytes > kMaxFrameBytes)
    return fail(Errc::protocol_error, "a frame is longer than the protocol allows");
  return std::optional<std::span<const std::byte>>(buffer.first(size_bytes));
}

}  // namespace cowmgr
