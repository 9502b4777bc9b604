// What all requests share. One thread runs the loop and owns everything here.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>

#include "daemon/config.hpp"
#include "daemon/core/background.hpp"
#include "daemon/core/peer_log.hpp"
#include "daemon/core/reclaimer.hpp"
#include "daemon/core/waits.hpp"
#include "daemon/shm/fd_store.hpp"
#include "daemon/shm/shm_env.hpp"
#include "daemon/store/results.hpp"
#include "daemon/store/store.hpp"

namespace cowmgr {

class Session;

struct Core {
  Core(asio::io_context& io, const Config& config, const ShmEnv& env);
  ~Core() = default;
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  [[nodiscard]] static Time now();
  [[nodiscard]] static Moment moment() { return {now(), std::chrono::steady_clock::now()}; }

  // The processes that can still write to a segment, in words: "process 12 (worker), process 13 (worker)".
  [[nodiscard]] asio::awaitable<std::string> writers_in_words(ArrayId id);
  // Through a descriptor of its own, or in words why there is none: the segment may go while /proc is read.
  [[nodiscard]] asio::awaitable<std::string> writers_in_words(uid_t owner, Result<Segment> copy);

  // What depends on arrays that are gone goes, too: result sets, what the service manager keeps.
  void forget_dropped();
  // What sessions hold stays for the next daemon, as after a crash.
  [[nodiscard]] bool keeps_sessions() const noexcept { return is_stopping && !purges; }

  asio::io_context& io;
  PeerLog log;  // of what peers do
  const Config& config;
  const ShmEnv& env;
  Background background;
  Store store;
  ResultSets results;
  FdStore fd_store;
  WaitList waits;
  Reclaimer reclaimer;
  std::map<SessionId, std::shared_ptr<Session>> sessions;
  std::set<SessionId> awaited{};  // of an earlier daemon, which may come back
  Time started;
  std::function<void()> stop;  // ends the daemon; set by the server
  bool purges;                 // when it ends: all arrays go
  bool is_stopping = false;
};

}  // namespace cowmgr
