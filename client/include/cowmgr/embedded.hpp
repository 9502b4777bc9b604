// A private daemon that lives and dies with the program that starts it, as Python's Manager() does.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <sys/types.h>

#include "cowmgr/client.hpp"

namespace cowmgr {

struct EmbeddedOptions {
  std::uint64_t capacity_bytes = 0;   // 0: the daemon's default, 80 % of what /dev/shm can hold
  std::string program;                // path of cowmgr. Empty: $COWMGR_DAEMON, beside this program, in $PATH
  std::string log_level = "warning";  // as `cowmgr --log-level` takes it; the log goes to standard error
};

// Owns a running daemon with an instance of its own. The daemon ends, and its memory with it, when this
// object goes or the process ends, however it ends; views that other processes hold stay valid. Move-only.
class EmbeddedDaemon {
 public:
  // Starts the daemon and returns when it serves. Its socket lies in a directory that only this user can
  // enter, in $XDG_RUNTIME_DIR, or in /tmp where that is not there, another user's, or too long a name.
  // Errors: not_found when there is no cowmgr program, no_daemon when it ended at once (its log says why).
  [[nodiscard]] static Result<EmbeddedDaemon> start(const EmbeddedOptions& options = {});

  EmbeddedDaemon(EmbeddedDaemon&&) noexcept;
  EmbeddedDaemon& operator=(EmbeddedDaemon&&) noexcept;
  EmbeddedDaemon(const EmbeddedDaemon&) = delete;
  EmbeddedDaemon& operator=(const EmbeddedDaemon&) = delete;
  ~EmbeddedDaemon();

  [[nodiscard]] Result<Client> connect() const {
    return Client::connect({.socket = socket(), .command = {}, .reconnect = Milliseconds(0)});
  }
  // Where it listens: hand it to workers, as COWMGR_SOCKET.
  [[nodiscard]] const std::string& socket() const noexcept;
  [[nodiscard]] pid_t pid() const noexcept;

 private:
  struct Impl;
  explicit EmbeddedDaemon(std::unique_ptr<Impl> impl) noexcept;

  std::unique_ptr<Impl> impl_;
};

}  // namespace cowmgr
