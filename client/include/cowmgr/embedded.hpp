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
  bool may_outlive = false;           // allows keep(). The log goes to log_file(), and if this process is
                                      // killed, the daemon stays
};

// Owns a running daemon with an instance of its own. The daemon ends, and its memory with it, when this
// object goes or the process ends, however it ends; views that other processes hold stay valid. Signals that
// this process blocks, and what a terminal sends (Ctrl-C), mean nothing to it. Move-only.
class EmbeddedDaemon {
 public:
  // Starts the daemon and returns when it serves. Its socket lies in a directory that only this user can
  // enter, in $XDG_RUNTIME_DIR, or in /tmp where that is not there, another user's, or too long a name.
  // Errors: not_found when there is no cowmgr program, no_daemon when it ended at once: how; its log says
  // why.
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

  // Ends the daemon now, as the destructor does, and waits until it has ended. Errors: no_daemon when it did
  // not end well, or not by this call: how, as in "cowmgr was killed by signal 9 (Killed)". Does nothing in a
  // forked child, which does not own it, or when it is stopped already.
  [[nodiscard]] Result<void> stop();

  // Lets the daemon run on when this object and this process go, until somebody stops it: `cowctl shutdown`
  // or SIGTERM. Its arrays go then. Only of one that may_outlive.
  void keep() noexcept;
  // Where one that may_outlive writes its log, in the directory of its socket. It goes, after a copy to
  // standard error, when this object ends the daemon. Empty for others.
  [[nodiscard]] const std::string& log_file() const noexcept;

 private:
  struct Impl;
  explicit EmbeddedDaemon(std::unique_ptr<Impl> impl) noexcept;

  std::unique_ptr<Impl> impl_;
};

}  // namespace cowmgr
