// Frames over a Unix SOCK_SEQPACKET socket: bytes and descriptors as a unit.
//
// 1. One frame is one record is one sendmsg(2): its descriptors cannot part from it.
// 2. A received descriptor is owned from the first moment (UniqueFd) and close-on-exec.
// 3. A frame that is too long, or carries more descriptors than allowed, is a protocol_error; nothing leaks.
#pragma once

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
};

// Connects to the daemon at `path`, blocking. Errors: no_daemon when nobody listens there,
// permission_denied, invalid_argument when the path does not fit in a socket address (107 bytes).
[[nodiscard]] Result<UniqueFd> connect_to(const std::string& path);

// A listening socket at `path`, non-blocking; the path must not exist. Errors: as bind(2) and listen(2).
[[nodiscard]] Result<UniqueFd> listen_at(const std::string& path, int mode);

// Sends one frame. Returns false when a non-blocking socket has no room (nothing was sent). The caller keeps
// `fds`. Errors: disconnected; invalid_argument when the frame is too large.
[[nodiscard]] Result<bool> send_frame(int socket, std::span<const std::byte> bytes,
                                      std::span<const int> fds = {});

// Receives one frame into `buffer`, which must hold kMaxFrameBytes. Empty when a non-blocking socket has
// none. Errors: disconnected at the end of the connection; protocol_error.
[[nodiscard]] Result<std::optional<Frame>> receive_frame(int socket, std::span<std::byte> buffer);

// The same for who expects no descriptors, at less cost: those that come are closed by the kernel (unix(7)).
[[nodiscard]] Result<std::optional<std::span<const std::byte>>> receive_bytes(int socket,
                                                                              std::span<std::byte> buffer);

}  // namespace cowmgr
