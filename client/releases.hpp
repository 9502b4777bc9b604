// Views that were given up, and that the daemon is told of later: a message for each would double the cost of
// looking at an array (`./dev bench`).
//
// 1. Whatever was added is told once: by the next request, which takes it along, or, when requests stop
//    coming, by a thread of the library within two milliseconds.
// 2. A request that took some and was not sent adds them again.
// 3. add() never waits for the daemon.
//
// Guarded by pool_mutex(): every call but join() is made with it held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "client/own_thread.hpp"

namespace cowmgr::detail {

class Releases {
 public:
  // `tell` makes a request, which takes releases along. The thread calls it, without the mutex. It returns
  // false when there is no daemon to tell: then the thread rests until wake().
  explicit Releases(std::function<bool()> tell) : tell_(std::move(tell)) {}

  // Ids of arrays, one for each view. Throws bad_alloc, and then nothing was added.
  void add(std::span<const std::uint64_t> ids);
  // As many as one request may tell of.
  [[nodiscard]] std::vector<std::uint64_t> take();
  // For a daemon that was not told of these views in the first place.
  void clear() noexcept { ids_.clear(); }
  // There is a daemon to tell again.
  void wake() noexcept;

  void close() noexcept;
  void join() noexcept { thread_.join(); }
  void start_over_in_child();

 private:
  void flush();

  const std::function<bool()> tell_;
  std::vector<std::uint64_t> ids_;
  std::uint64_t wakes_ = 0;
  bool is_resting_ = false;  // the thread
  bool is_closed_ = false;
  Condition change_;
  OwnThread thread_;  // from the first release on
};

}  // namespace cowmgr::detail
