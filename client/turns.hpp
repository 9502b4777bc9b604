// Turns to wait in the daemon. A call that waits there keeps a channel to itself until it is answered: if too
// many did, none would be left for calls that are answered at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "client/own_thread.hpp"
#include "cowmgr/info.hpp"

namespace cowmgr::detail {

inline constexpr std::size_t kMaxWaits = 64;

// At most kMaxWaits turns are taken. A child takes turns of its own, whatever its parent's threads had. Takes
// pool_mutex() itself.
class Turns {
 public:
  // Waits for a turn, but not longer than `pause`. Whether one was had.
  [[nodiscard]] bool begin(Milliseconds pause);
  // Gives one back that this process took.
  void end() noexcept;

 private:
  Condition is_free_;
  std::size_t taken_ = 0;
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
