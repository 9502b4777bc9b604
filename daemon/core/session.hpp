// A session: one process's connections, and all that it holds.
//
// A process opens further connections when several of its threads ask at once; each is strict request ->
// reply. The session ends with its last connection, or when the kernel says that the process is gone
// (pidfd_open(2)): a forked child may keep the socket open, but not what its parent held.
#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>

#include "daemon/core/core.hpp"

namespace cowmgr {

class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(Core& core, SessionId id, Peer peer, std::string command);

  // Ends all connections and gives back all that the session held, but for a daemon that stops and keeps it
  // for the next one. May be called twice.
  void close();
  // The socket of a connection, until it is removed; with the last one the session ends.
  void add(int socket) { sockets_.insert(socket); }
  void remove(int socket);
  // Ends the session when its process does; to be spawned once.
  [[nodiscard]] asio::awaitable<void> watch_process(UniqueFd pidfd);

  [[nodiscard]] SessionId id() const noexcept { return id_; }
  [[nodiscard]] const Peer& peer() const noexcept { return peer_; }
  [[nodiscard]] const std::string& command() const noexcept { return command_; }
  [[nodiscard]] Time connected() const noexcept { return connected_; }
  [[nodiscard]] std::size_t connections() const noexcept { return sockets_.size(); }
  // What the process says that it has, until it has said all of it.
  struct Held {
    Store::Views views;
    std::set<ArrayId> writing;
    ResultSets::Slots slots;
  };
  [[nodiscard]] Held& held() noexcept { return held_; }
  // It has said all of it: that is what it has now.
  void end_telling();
  [[nodiscard]] std::uint64_t times_told() const noexcept { return times_told_; }
  // Set when the session ended. To be looked at after every await: what it held is gone then.
  [[nodiscard]] const std::atomic<bool>& gone() const noexcept { return gone_; }

 private:
  Core& core_;
  SessionId id_;
  Peer peer_;
  std::string command_;
  Time connected_;
  std::set<int> sockets_;
  Held held_;
  std::uint64_t times_told_ = 0;
  asio::posix::stream_descriptor pidfd_;
  std::atomic<bool> gone_{false};
};

}  // namespace cowmgr
