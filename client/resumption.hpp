// How a process comes from a daemon that went away to the next one: it finds that one, and says what it
// holds.
//
// 1. One thread at a time looks for the next daemon; the others wait for what comes of it, and have failed if
//    it has: none of them waits for longer than one search.
// 2. Nothing is said before every call to the old daemon has ended, and what its reply brought is held.
// 3. A session begins with all that is held at that moment: what was forgotten while it was being said is
// said
//    once more.
// 4. A daemon that dies of what it is told is not followed by a third: kMostDeaths.
//
// Guarded by pool_mutex(): every call but begin() is made with it held. One that takes the lock gives it up
// meanwhile.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "client/channel_pool.hpp"
#include "client/greeter.hpp"
#include "client/holdings.hpp"
#include "client/limit.hpp"
#include "client/own_thread.hpp"
#include "client/releases.hpp"
#include "proto/errors.hpp"

namespace cowmgr::detail {

inline constexpr int kMostDeaths = 2;  // of daemons that had read a request

class Resumption {
 public:
  struct Options {
    Milliseconds reconnect{0};  // for the next daemon; 0: nobody looks for it
    Milliseconds answer = kForever;
  };
  // All three outlive this.
  Resumption(const Options& options, Greeter& greeter, ChannelPool& pool, Releases& releases)
      : options_(options), greeter_(greeter), pool_(pool), releases_(releases) {}

  // What this process has to say. It says so in a session alone: keep a reply's grants before its channel is
  // put back.
  [[nodiscard]] Holdings& holdings() noexcept { return holdings_; }

  // Whether another daemon is looked for at all.
  [[nodiscard]] bool is_wanted() const noexcept { return options_.reconnect.count() > 0; }
  [[nodiscard]] bool is_under_way() const noexcept { return is_under_way_; }

  // The first session, with a daemon that comes within `wait`. Errors: as Client::connect().
  [[nodiscard]] Result<void> begin(Milliseconds wait);
  // The next session, after pool.is_lost(). Without an error, look at that again: another thread may have
  // failed, or the new daemon gone away. Throws bad_alloc. Errors: disconnected when no daemon came in time,
  // or two of them died; what the daemon answered.
  [[nodiscard]] Result<void> resume(std::unique_lock<std::mutex>& lock);

  // Ends a search.
  void close() noexcept;
  void start_over_in_child();

 private:
  class UnderWay;
  [[nodiscard]] Result<Greeter::Opened> find_daemon(const Greeter::Hello& hello, Milliseconds patience);
  [[nodiscard]] Result<Greeter::Opened> try_daemon(const Greeter::Hello& hello, const Limit& limit,
                                                   Greeter::Tries& tries);
  [[nodiscard]] bool pause(Limit::Clock::time_point until);
  [[nodiscard]] Result<void> say_what_is_held(Channel& channel, const Limit& limit);
  [[nodiscard]] Result<void> say_all(Channel& channel, const Limit& limit);

  const Options options_;
  Greeter& greeter_;
  ChannelPool& pool_;
  Releases& releases_;
  Holdings holdings_;
  std::uint64_t told_ends_ = 0;          // holdings_.ends() when a daemon was told last
  std::uint64_t searches_ = 0;           // that have ended
  std::optional<Error> last_failure_{};  // of the last one, if it found none
  bool is_under_way_ = false;
  bool is_closed_ = false;
  Condition change_;
};

}  // namespace cowmgr::detail
