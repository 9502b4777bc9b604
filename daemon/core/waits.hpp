// Who waits for what. Knows keys and nothing else: whoever changes something says which waiters it serves.
#pragma once

#include <chrono>
#include <compare>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

namespace cowmgr {

namespace asio = boost::asio;

using Deadline = std::chrono::steady_clock::time_point;

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
  std::uint64_t id = 0;  // of a set; of a queue, its user
  std::string name{};
  friend auto operator<=>(const WaitKey&, const WaitKey&) = default;
};

// Under a key, those that wait stand in a row, in order of their ranks. A rank is a place in the queue, drawn
// once for all waits of a request, so that who waits longest is served first; or what the waiter counts up
// to.
class WaitList {
 public:
  using Rank = std::uint64_t;

  // Registers `timer` under `key` for as long as this object lives; a wake makes it expire.
  class Entry {
   public:
    Entry(WaitList& list, const WaitKey& key, Rank rank, asio::steady_timer& timer);
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    ~Entry();

   private:
    friend class WaitList;
    struct Waiter {
      asio::steady_timer* timer = nullptr;
      bool is_first = false;  // woken as one of the first
    };
    using Row = std::multimap<Rank, Waiter>;

    WaitList& list_;
    std::map<WaitKey, Row>::iterator row_;
    Row::iterator waiter_;
  };

  // A place behind all that were drawn before.
  [[nodiscard]] Rank draw() noexcept { return ++last_; }

  void wake(const WaitKey& key);
  // Those at the head of the row, up to `count`: for what only so many can have. When they have had their
  // turn, take_left() says so, since one may have gone without taking its part.
  void wake_first(const WaitKey& key, std::size_t count);
  // Those of a lower rank.
  void wake_below(const WaitKey& key, Rank rank);

  // The keys of those that wake_first() woke and that have had their turn, since the last call.
  [[nodiscard]] bool has_left() const noexcept { return !left_.empty(); }
  [[nodiscard]] std::set<WaitKey> take_left() { return std::exchange(left_, {}); }

 private:
  void note_left(const WaitKey& key) noexcept;

  std::map<WaitKey, Entry::Row> rows_;
  Rank last_ = 0;
  std::set<WaitKey> left_;
};

// Waits in the name of a peer, and ends when that goes.
class Waiter {
 public:
  // `socket`: the peer's. A peer sends nothing while its request is under way: one that can be read has
  // ended, or is misused.
  Waiter(WaitList& list, asio::posix::stream_descriptor& socket)
      : list_(&list), socket_(&socket), place_(list.draw()) {}

  enum class Woken : std::uint8_t { changed, deadline, peer_gone };
  // Waits until somebody wakes `key`, or the deadline. Keeps its place from one wait to the next.
  [[nodiscard]] asio::awaitable<Woken> change(const WaitKey& key, Deadline deadline) {
    return wait(key, place_, deadline);
  }
  // Waits until somebody counts beyond `count`.
  [[nodiscard]] asio::awaitable<Woken> count(const WaitKey& key, std::uint64_t count, Deadline deadline) {
    return wait(key, count, deadline);
  }

 private:
  [[nodiscard]] asio::awaitable<Woken> wait(const WaitKey& key, WaitList::Rank rank, Deadline deadline);

  WaitList* list_;
  asio::posix::stream_descriptor* socket_;
  WaitList::Rank place_;
};

}  // namespace cowmgr
