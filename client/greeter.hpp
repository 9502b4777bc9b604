// How a channel begins: connect, look who serves, say Hello.
//
// 1. A channel that open() returns was greeted by a daemon that this process trusts.
// 2. close() ends the open() calls of all threads, now and later.
//
// Its own members are guarded by pool_mutex(), which open() takes itself, for moments.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>

#include "client/channel.hpp"
#include "client/limit.hpp"
#include "proto/errors.hpp"

namespace cowmgr::detail {

[[nodiscard]] Error error_of_failure(const wire::Failure& failure);

class Greeter {
 public:
  struct Options {
    std::string socket;
    std::string command;
    std::string daemon_user;  // whose daemon is trusted besides; see check_server()
  };
  struct Hello {
    std::uint64_t session = 0;  // to join; 0: a new one
    bool resumes = false;       // `session` is one that this process had with an earlier daemon
    std::uint64_t epoch = 0;    // of the channel
  };
  struct Opened {
    std::unique_ptr<Channel> channel;
    std::uint64_t session = 0;
  };
  // What came of trying to reach a daemon.
  struct Tries {
    int deaths = 0;             // of daemons that had read what was said
    bool was_kept_out = false;  // by the socket's mode
  };

  explicit Greeter(Options options) : options_(std::move(options)) {}

  // Blocks. Call it without the mutex. Errors: no_daemon, disconnected, timed_out, permission_denied,
  // protocol_mismatch, protocol_error, out_of_memory.
  [[nodiscard]] Result<Opened> open(const Hello& hello, const Limit& limit, Tries& tries);

  [[nodiscard]] const std::string& socket() const noexcept { return options_.socket; }
  [[nodiscard]] const std::string& daemon_user() const noexcept { return options_.daemon_user; }

  // Both with the mutex held.
  void close() noexcept;
  void start_over_in_child() noexcept { opening_.clear(); }

 private:
  class Opening;
  [[nodiscard]] Result<Opened> greet(const Hello& hello, const Limit& limit, Tries& tries);

  const Options options_;
  std::set<const Channel*> opening_;  // those that say Hello just now
  bool is_closed_ = false;
};

}  // namespace cowmgr::detail
