// What all sessions share: the state, the threads for long work, and those who wait for a change.
//
// One thread runs the io_context and owns everything here. Work that takes long runs in the pool and is
// awaited; it touches no state.
#pragma once

#include <atomic>
#include <chrono>
#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "daemon/closer.hpp"
#include "daemon/config.hpp"
#include "daemon/fd_store.hpp"
#include "daemon/peer_log.hpp"
#include "daemon/results.hpp"
#include "daemon/shm_env.hpp"
#include "daemon/store.hpp"

namespace cowmgr {

namespace asio = boost::asio;

class Channel;
class Session;

// Whether a descriptor can be read now, or has come to its end. To be asked where a wake-up alone would be
// taken for such an end: when a descriptor is closed while its readiness lies in the reactor's queue, Asio
// may wake whoever waits for the next one that gets its place there.
[[nodiscard]] bool is_readable(int fd) noexcept;

// What a coroutine may wait for.
struct WaitKey {
  enum class Topic : std::uint8_t {
    array_name,
    queue,
    set_changed,
    set_ended,
    slot_free,
    slot_settled,
    reclaimed
  };
  Topic topic{};
  ArrayId set = 0;
  std::string name{};
  friend auto operator<=>(const WaitKey&, const WaitKey&) = default;
};

// The coroutines that wait until something under a key changes, those that came first before the others.
class WaitList {
 public:
  // Registers `timer` under `key` for as long as this object lives; wake() makes it expire.
  class Entry {
   public:
    Entry(WaitList& list, const WaitKey& key, asio::steady_timer& timer)
        : list_(list), at_(list.timers_.emplace(key, &timer)) {}
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    ~Entry() { list_.timers_.erase(at_); }

   private:
    WaitList& list_;
    std::multimap<WaitKey, asio::steady_timer*>::iterator at_;
  };

  void wake(const WaitKey& key);

 private:
  std::multimap<WaitKey, asio::steady_timer*> timers_;
};

class Core {
 public:
  Core(asio::io_context& io, const Config& config, const ShmEnv& env);
  ~Core();
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  [[nodiscard]] static Time now();
  [[nodiscard]] static Moment moment() { return {now(), std::chrono::steady_clock::now()}; }

  // Runs `work` in the pool; resumes in the loop with what it returned.
  template <class Work>
  [[nodiscard]] asio::awaitable<std::invoke_result_t<Work>> offload(Work work) {
    return asio::co_spawn(pool_, run_in_background(std::move(work)), asio::use_awaitable);
  }

  // To be called after every change of store or results, before its answer: finishes result sets, wakes
  // waiters, and gives memory back in the background.
  void settle();
  // The same, and waits until the memory that was garbage by now is given back. Returns how much of it is
  // not, since others have it open or mapped; that is tried again, see Outside.
  asio::awaitable<std::uint64_t> settle_and_reclaim();
  // Looks whether what outsiders hold is free by now, unless somebody has just looked: for who lacks room.
  [[nodiscard]] asio::awaitable<void> look_outside();

  // The processes that can still write to a segment, in words: "process 12 (worker), process 13 (worker)".
  [[nodiscard]] asio::awaitable<std::string> writers_in_words(ArrayId id);
  // Through a descriptor of its own, or in words why there is none: the segment may go while /proc is read.
  [[nodiscard]] asio::awaitable<std::string> writers_in_words(Result<Segment> copy);

  // Sessions of an earlier daemon that may come back: those that have not when the grace period is over end.
  void await_sessions(std::set<SessionId> sessions);
  // A session has come back. Whether it was awaited.
  bool has_come_back(SessionId session) { return awaited_.erase(session) > 0; }

  // Closes a connection's socket, elsewhere where that may take its time; then calls `closed`, in the loop.
  void close_socket(UniqueFd socket, std::function<void()> closed);

  // The daemon stops. Unless it purges, what sessions hold stays for the next one, as after a crash; nothing
  // keeps the loop running any more.
  void begin_to_stop() noexcept;
  [[nodiscard]] bool keeps_sessions() const noexcept { return is_stopping_ && !purges; }

  // Somebody opened a sealed segment for writing.
  [[nodiscard]] asio::awaitable<void> report_tampering(int lease_fd);
  // Files of segments have lost their names. Arrays that are served, and should have one, get a new one.
  void report_removals(const ShmEnv::Removals& removals);
  // Of what an earlier daemon left: has what lost its file written anew, and checksums checked, in the
  // background.
  void look_after_arrays();

  asio::io_context& io;
  PeerLog log;  // of what peers do
  const Config& config;
  const ShmEnv& env;
  Store store;
  ResultSets results;
  FdStore fd_store;
  WaitList waits;
  std::map<SessionId, std::shared_ptr<Session>> sessions;
  std::set<Channel*> connections;  // all, those without a session too
  std::optional<Closer> closer;    // where peers can pass descriptors; set by the server
  Time started;
  std::function<void()> stop;  // ends the daemon; set by the server
  bool purges;                 // when it ends: all arrays go

 private:
  template <class Work>
  static asio::awaitable<std::invoke_result_t<Work>> run_in_background(Work work) {
    yield_to_the_loop();
    co_return work();
  }
  static void yield_to_the_loop();
  void wake_waiters();
  void note_served_and_dropped();
  [[nodiscard]] asio::awaitable<void> tell_service_manager();
  void start_rewriting();
  [[nodiscard]] asio::awaitable<void> rewrite_unlinked();
  [[nodiscard]] asio::awaitable<void> rewrite(ArrayId id);
  [[nodiscard]] asio::awaitable<void> check_contents(std::vector<ArrayId> arrays);
  // Garbage that others have open or mapped: processes that use no library, a client that has not closed a
  // result set, or one that is just dying. A write lease tells when they have gone; until then it is tried
  // again, ever more seldom.
  struct Outside {
    Garbage garbage;
    Tick since{};
    bool is_told = false;  // Store::begin_outside(): nobody who is just dying holds it
    bool is_free = false;  // by now
  };
  using OutsideByTime = std::multimap<Tick, Outside>;  // by when it is to be tried next
  [[nodiscard]] asio::awaitable<std::uint64_t> reclaim(std::vector<Outside> garbage);
  void keep_outside(Outside one);
  [[nodiscard]] std::vector<Outside> take_outside(Tick until);
  [[nodiscard]] asio::awaitable<void> retry_outside();
  [[nodiscard]] std::vector<Outside> take_garbage();
  [[nodiscard]] asio::awaitable<void> retry_seals();
  void watch_lease_ends();
  void end_grace();

  asio::thread_pool pool_;
  bool is_retrying_ = false;
  bool is_rewriting_ = false;
  std::set<ArrayId> rewritten_in_vain_;  // since memory was given back last
  OutsideByTime outside_;
  Tick looked_outside_{};  // at all of it, last
  bool is_retrying_outside_ = false;
  asio::steady_timer outside_retry_;
  bool is_telling_ = false;
  bool is_stopping_ = false;
  std::atomic<bool> stops_work_{false};  // in the pool
  std::set<SessionId> awaited_;
  asio::steady_timer grace_end_;
  asio::steady_timer lease_end_;      // of the slot's lease that ends first
  std::optional<Tick> lease_end_at_;  // what it is set to
};

}  // namespace cowmgr
