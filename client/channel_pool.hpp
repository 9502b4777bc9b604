// The channels of a session: which there are, and what each is doing.
//
// 1. A channel is idle (ready for a request), busy (a request is at it), late (owed a reply that nobody waits
//    for any more), or being opened; there are at most kMaxChannels.
// 2. All of them belong to one session with one daemon. The epoch is its number: a channel of an earlier
//    epoch that is put back is closed.
// 3. A session that is lost gives no channel out until another begins, by begin_session(). It is lost when
//    its daemon is seen to have gone, or when its last channel broke.
// 4. What is to go back on a late channel stays with it until its reply has been taken.
// 5. Whatever is put back finds room: that never fails.
//
// Guarded by pool_mutex(): every call is made with it held. One that takes the lock gives it up meanwhile.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <poll.h>
#include <vector>

#include "client/channel.hpp"
#include "client/grants.hpp"
#include "client/greeter.hpp"
#include "client/limit.hpp"
#include "client/own_thread.hpp"
#include "client/turns.hpp"
#include "client/watched_socket.hpp"
#include "proto/errors.hpp"

namespace cowmgr::detail {

// The daemon allows 256 to a session. Calls that are answered at once have those that no waiting call takes.
inline constexpr std::size_t kMaxChannels = kMaxWaits + 16;

class ChannelPool {
 public:
  // A channel that is owed a reply which nobody waits for, and what is to go back on it.
  struct Late {
    std::unique_ptr<Channel> channel;
    Unkept unkept;
  };
  // For poll(2), which is called without the mutex: the daemon's end, and late replies.
  struct PollSet {
    std::array<pollfd, kMaxChannels + 1> fds{};
    std::size_t count = 0;
    std::uint64_t epoch = 0;
  };

  // New channels are opened by `greeter`, which outlives the pool.
  explicit ChannelPool(Greeter& greeter);
  ~ChannelPool();
  ChannelPool(const ChannelPool&) = delete;
  ChannelPool& operator=(const ChannelPool&) = delete;

  // ---- For a request ----

  // A channel, which is busy until it is put back. Waits while all are, and opens another while there may be
  // more. Null when the session is lost, or the pool closed. Errors: timed_out; as Greeter::open().
  [[nodiscard]] Result<std::unique_ptr<Channel>> take(std::unique_lock<std::mutex>& lock, const Limit& limit);
  // Takes a channel back that take() or take_late() gave. Whether it is late now, with `unkept`: somebody
  // must look for its reply.
  bool put_back(std::unique_ptr<Channel> channel, Unkept unkept) noexcept;

  // ---- Late replies ----

  [[nodiscard]] bool has_late() const noexcept { return !late_.empty(); }
  // All late channels, which are busy until they are put back. Throws bad_alloc, and then they stay.
  [[nodiscard]] std::vector<Late> take_late();
  // What is given back after a late reply, since nothing else can be asked there before. False when there is
  // none. Throws bad_alloc.
  [[nodiscard]] bool give_back_late(Grants& grants);

  // ---- The session ----

  [[nodiscard]] bool is_lost() const noexcept { return is_lost_; }
  [[nodiscard]] std::uint64_t session() const noexcept { return session_; }  // 0: none yet
  [[nodiscard]] std::uint64_t epoch() const noexcept { return epoch_; }
  // Ends the session's channels, and waits until no request is at one of them. Returns those that were idle
  // or late, to be closed without the mutex. The next epoch begins. Throws bad_alloc, and then nothing
  // happened.
  [[nodiscard]] std::vector<std::unique_ptr<Channel>> end_session(std::unique_lock<std::mutex>& lock);
  // `first` is a channel of this epoch.
  void begin_session(std::unique_ptr<Channel> first, std::uint64_t session);

  // ---- Watching ----

  [[nodiscard]] PollSet poll_set() const noexcept;
  // Takes note of what poll(2) said. Whether late replies have come.
  [[nodiscard]] bool note(const PollSet& polled) noexcept;
  // Waits for a change, but not longer than `pause`.
  void pause(std::unique_lock<std::mutex>& lock, std::chrono::milliseconds pause) {
    change_.pause(lock, pause);
  }
  // Whether the program ever took a descriptor from here.
  [[nodiscard]] bool was_robbed() const noexcept;

  // ---- The end ----

  // Ends what is under way: nobody is given a channel any more.
  void close() noexcept;
  [[nodiscard]] bool is_closed() const noexcept { return is_closed_; }
  void start_over_in_child();

 private:
  void make_room();
  [[nodiscard]] bool may_open() const noexcept;
  [[nodiscard]] Result<Greeter::Opened> open_another(std::unique_lock<std::mutex>& lock, const Limit& limit);
  [[nodiscard]] std::unique_ptr<Channel> take_idle() noexcept;
  void lose() noexcept;

  Greeter& greeter_;
  // These three have room for all channels.
  std::vector<std::unique_ptr<Channel>> idle_;
  std::vector<Late> late_;
  std::vector<Channel*> busy_;     // of this epoch, or, until all of them are back, of the last
  std::size_t open_channels_ = 0;  // of this epoch, in whatever state
  std::uint64_t session_ = 0;
  std::uint64_t epoch_ = 1;
  bool is_lost_ = false;
  bool is_closed_ = false;
  bool was_robbed_ = false;
  WatchedSocket watched_;  // of a channel of this epoch
  Condition change_;
};

}  // namespace cowmgr::detail
