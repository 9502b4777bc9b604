#include "proto/fd_socket.hpp"

#include <array>
#include <cerrno>
#include <cstring>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <fmt/format.h>

#include "proto/text.hpp"

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

Error disconnected() {
  return {Errc::disconnected, "the other side closed the connection"};
}

// Why the receive call `name` failed.
Error not_received(std::string_view name) {
  return errno == ECONNRESET ? disconnected() : os_error(name, "a frame", errno);
}

// Takes the descriptors out of a received message, before anything else can fail.
std::vector<UniqueFd> take_fds(msghdr& message) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      fds.emplace_back(fd);
    }
  }
  return fds;
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

Result<UniqueFd> connect_to(const std::string& path) {
  const auto address = address_of(path);
  if (!address) return error_of(address);
  auto fd = new_socket(0);
  if (!fd) return fd;
  int rc = 0;
  do rc = ::connect(fd->get(), generic(*address), sizeof *address);
  while (rc != 0 && errno == EINTR);
  if (rc == 0) return fd;
  if (errno == ENOENT || errno == ECONNREFUSED || errno == ENOTDIR) {
    return fail(
        Errc::no_daemon,
        fmt::format("no cowmgr daemon listens at {}; start one with `cowmgr --socket {}`", path, path));
  }
  return tl::unexpected(os_error("connect", path, errno));
}

Result<UniqueFd> listen_at(const std::string& path, int mode) {
  const auto address = address_of(path);
  if (!address) return error_of(address);
  auto fd = new_socket(SOCK_NONBLOCK);
  if (!fd) return fd;
  if (::bind(fd->get(), generic(*address), sizeof *address) != 0)
    return tl::unexpected(os_error("bind", path, errno));
  // Nobody can connect between bind and chmod: connect(2) is refused until listen.
  if (::chmod(path.c_str(), static_cast<mode_t>(mode)) != 0)
    return tl::unexpected(os_error("chmod", path, errno));
  if (::listen(fd->get(), kBacklog) != 0) return tl::unexpected(os_error("listen", path, errno));
  return fd;
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
  Frame frame{buffer.first(static_cast<std::size_t>(count)), take_fds(message)};
  // A record of no bytes, which may bring descriptors, reads like the end of the connection; no frame is
  // empty, so both end it.
  if (count == 0) return tl::unexpected(disconnected());
  const bool is_cut = (message.msg_flags & MSG_TRUNC) != 0;
  const bool lacks_fds = (message.msg_flags & MSG_CTRUNC) != 0;
  // The kernel also drops the descriptors that this process has no number left for.
  if (lacks_fds && !is_cut && frame.fds.size() < kMaxFrameFds) {
    return tl::unexpected(os_error("recvmsg", "a frame's descriptors", EMFILE));
  }
  if (is_cut || lacks_fds) {
    return fail(Errc::protocol_error,
                "a frame is longer, or carries more descriptors, than the protocol allows");
  }
  return std::optional<Frame>(std::move(frame));
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
