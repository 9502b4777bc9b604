#include "client/releases.hpp"

#include <algorithm>
#include <mutex>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {
namespace {

constexpr Milliseconds kFlushPause{1};
constexpr std::size_t kMaxReleases = 512;  // in one frame

}  // namespace

void Releases::add(std::span<const std::uint64_t> ids) {
  if (ids.empty()) return;
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  wake();
}

std::vector<std::uint64_t> Releases::take() {
  const std::size_t count = std::min(ids_.size(), kMaxReleases);
  std::vector<std::uint64_t> ids(ids_.end() - static_cast<std::ptrdiff_t>(count), ids_.end());
  ids_.resize(ids_.size() - count);
  return ids;
}

// Without a thread, what was released goes with the next request.
void Releases::wake() noexcept {
  if (ids_.empty()) return;
  ++wakes_;
  if (!thread_.is_there())
    thread_.start([this] { flush(); });
  else if (is_resting_)
    change_.notify_all();
}

// Looks once in kFlushPause while views come and go, and rests when none did: waking it for each release
// would cost as much as telling the daemon of each.
void Releases::flush() {
  std::unique_lock lock(pool_mutex());
  while (!is_closed_) {
    const std::uint64_t seen = wakes_;
    const bool was_empty = ids_.empty();
    const bool is_over = change_.wait_until(lock, Limit::after(kFlushPause), [&] { return is_closed_; });
    if (is_over || wakes_ != seen) continue;  // still busy: the next request takes them along
    if (!was_empty && !ids_.empty()) {
      lock.unlock();
      const bool is_told = tell_();
      lock.lock();
      if (is_told) continue;
    }
    is_resting_ = true;
    change_.wait(lock, [&] { return is_closed_ || wakes_ != seen; });
    is_resting_ = false;
  }
}

void Releases::close() noexcept {
  is_closed_ = true;
  change_.notify_all();
}

void Releases::start_over_in_child() {
  change_.start_over_in_child();
  ids_.clear();
  is_resting_ = false;
}

}  // namespace cowmgr::detail
