// Gives memory back: the segments that the store needs no more.
//
// Whoever uses no library may have one of them mapped or open, a client may not have closed a result set, or
// a process may just be dying. A write lease tells when they have gone; until then it is tried again, ever
// more seldom, and who waits for room waits for it no more.
#pragma once

#include <map>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include "daemon/core/background.hpp"
#include "daemon/core/waits.hpp"
#include "daemon/shm/shm_env.hpp"
#include "daemon/store/store.hpp"

namespace cowmgr {

class Reclaimer {
 public:
  Reclaimer(asio::io_context& io, const ShmEnv& env, Store& store, Background& background, WaitList& waits);
  ~Reclaimer() = default;
  Reclaimer(const Reclaimer&) = delete;
  Reclaimer& operator=(const Reclaimer&) = delete;

  // Takes what is garbage by now, and gives it back in the background.
  void take_garbage();
  // The same, and waits for it. Returns how many bytes of it are not given back, since others have them.
  [[nodiscard]] asio::awaitable<std::uint64_t> reclaim_now();
  // Looks whether what outsiders hold is free by now, unless somebody has just looked: for who lacks room.
  [[nodiscard]] asio::awaitable<void> look_outside();
  // How often something was given back.
  [[nodiscard]] std::uint64_t times() const noexcept { return times_; }
  // Nothing is tried again from here on: nothing keeps the loop running.
  void stop() noexcept;

 private:
  struct Piece {
    Garbage garbage;
    Tick since{};
    bool is_told = false;  // Store::begin_outside(): nobody who is just dying holds it
    bool is_free = false;  // by now
  };
  using Pieces = std::vector<Piece>;

  [[nodiscard]] Pieces taken();
  [[nodiscard]] asio::awaitable<std::uint64_t> reclaim(Pieces pieces);
  [[nodiscard]] std::uint64_t settle(Pieces tried);
  void keep_outside(Piece piece);
  [[nodiscard]] Pieces take_outside(Tick until);
  [[nodiscard]] asio::awaitable<void> retry_outside();

  asio::io_context& io_;
  const ShmEnv& env_;
  Store& store_;
  Background& background_;
  WaitList& waits_;
  std::multimap<Tick, Piece> outside_;  // by when it is to be tried next
  Tick looked_outside_{};               // at all of it, last
  asio::steady_timer retry_;
  std::uint64_t times_ = 0;
  bool is_retrying_ = false;
  bool is_stopping_ = false;
};

}  // namespace cowmgr
