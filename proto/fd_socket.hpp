// Frames over a Unix SOCK_SEQPACKET socket: bytes and descriptors as a unit.
//
// 1. One frame is one record is one sendmsg(2): its descriptors cannot part from it.
// 2. A received descriptor is owned from the first moment (UniqueFd) and close-on-exec.
// 3. A frame that is too long, or carries more descriptors than allowed, is a protocol_error; nothing leaks.
//    The next record is as good as if it had not come.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxFrameBytes = std::size_t{128} << 10;  // one frame, both directions
inline constexpr std::size_t kMaxFrameFds = 64;                        // SCM_MAX_FD is 253 (unix(7))

struct Frame {
  std::span<const std::byte> bytes;  // within the caller's buffer
  std::vector<UniqueFd> fds;
  // Some that came are closed, since this process has no number left for them (RLIMIT_NOFILE), or no memory.
  // The bytes are whole.
  bool lacks_fds = false;
};

// Connects to the daemon at `path`, blocking: where `patience` is not 0, for so long at most, and so does
// each send_frame() then. Errors: no_daemon when nobody listens there, permission_denied, timed_out,
// invalid_argument when the path does not fit in a socket address (107 bytes).
[[nodiscard]] Result<UniqueFd> connect_to(const std::string& path,
                                          std::chrono::milliseconds patience = std::chrono::milliseconds(0));

// A listening socket at `path`, non-blocking; the path must not exist. It has `mode` from its first moment:
// the process's umask is another one for that moment. Connections to it take no descriptors, where the kernel
// can refuse them (SO_PASSRIGHTS, Linux 6.16): sendmsg(2) fails with EPERM at the peer. Errors: as bind(2)
// and listen(2).
[[nodiscard]] Result<UniqueFd> listen_at(const std::string& path, int mode);

// Whether a peer can pass descriptors to this socket; a connection is as the socket is that it was accepted
// from.
[[nodiscard]] bool takes_descriptors(int socket) noexcept;

// What lies next in a socket; it stays there. Descriptors are not touched: whoever receives or closes them
// may have to wait (close(2) of a TCP socket with SO_LINGER).
enum class NextRecord { none, plain, with_descriptors };
// `plain` is also the end of the connection, and an error that receiving will tell.
[[nodiscard]] NextRecord next_record(int socket) noexcept;

// Ends the connection in both directions, and throws away what has come. False when a record with descriptors
// came up: that one, and what is behind it, is left.
[[nodiscard]] bool shut_and_drain(int socket) noexcept;

// Sends one frame. Returns false when a socket that does not block, or no longer than its patience, has no
// room (nothing was sent). The caller keeps `fds`. Errors: disconnected; invalid_argument when the frame is
// too large.
[[nodiscard]] Result<bool> send_frame(int socket, std::span<const std::byte> bytes,
                                      std::span<const int> fds = {});

// Receives one frame into `buffer`, which must hold kMaxFrameBytes. Empty when a non-blocking socket has
// none. Errors: disconnected at the end of the connection (see left_unread()); protocol_error.
[[nodiscard]] Result<std::optional<Frame>> receive_frame(int socket, std::span<std::byte> buffer);

// Of a receive call's `disconnected`: whether the other side went without having read all that was sent.
[[nodiscard]] bool left_unread(const Error& error) noexcept;

// The same for who expects no descriptors, at less cost: those that come are closed by the kernel (unix(7)).
[[nodiscard]] Result<std::optional<std::span<const std::byte>>> receive_bytes(int socket,
                                                                              std::span<std::byte> buffer);

}  // namespace cowmgr
