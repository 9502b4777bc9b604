#include "client/turns.hpp"

#include <mutex>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {

bool Turns::begin(Milliseconds pause) {
  std::unique_lock lock(pool_mutex());
  if (generation_ != fork_generation()) {
    is_free_.start_over_in_child();
    taken_ = 0;
    generation_ = fork_generation();
  }
  if (!is_free_.wait_until(lock, Limit::after(pause), [&] { return taken_ < kMaxWaits; })) return false;
  ++taken_;
  return true;
}

void Turns::end() noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;
  --taken_;
  is_free_.notify_all();
}

}  // namespace cowmgr::detail
