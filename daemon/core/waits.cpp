#include "daemon/core/waits.hpp"

#include <new>
#include <poll.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/use_awaitable.hpp>

namespace cowmgr {
namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);

}  // namespace

bool is_readable(int fd) noexcept {
  pollfd poll{fd, POLLIN, 0};
  return ::poll(&poll, 1, 0) > 0;
}

// ---- WaitList ----

WaitList::Entry::Entry(WaitList& list, const WaitKey& key, Rank rank, asio::steady_timer& timer)
    : list_(list),
      row_(list.rows_.try_emplace(key).first),
      waiter_(row_->second.emplace(rank, Waiter{&timer})) {}

WaitList::Entry::~Entry() {
  if (waiter_->second.is_first) list_.note_left(row_->first);
  row_->second.erase(waiter_);
  if (row_->second.empty()) list_.rows_.erase(row_);
}

void WaitList::note_left(const WaitKey& key) noexcept {
  try {
    left_.insert(key);
  } catch (const std::bad_alloc&) {  // then the next change wakes who is next
  }
}

void WaitList::wake(const WaitKey& key) {
  wake_below(key, UINT64_MAX);
}

void WaitList::wake_first(const WaitKey& key, std::size_t count) {
  const auto row = rows_.find(key);
  if (row == rows_.end()) return;
  for (auto at = row->second.begin(); at != row->second.end() && count > 0; ++at, --count) {
    at->second.is_first = true;
    at->second.timer->cancel();
  }
}

void WaitList::wake_below(const WaitKey& key, Rank end) {
  const auto row = rows_.find(key);
  if (row == rows_.end()) return;
  for (auto at = row->second.begin(); at != row->second.end() && at->first < end; ++at)
    at->second.timer->cancel();
}

// ---- Waiter ----

asio::awaitable<Waiter::Woken> Waiter::wait(const WaitKey& key, WaitList::Rank rank, Deadline deadline) {
  using asio::experimental::awaitable_operators::operator||;
  asio::steady_timer timer(socket_->get_executor(), deadline);
  const WaitList::Entry entry(*list_, key, rank, timer);
  auto ended = co_await (timer.async_wait(kAwait) ||
                         socket_->async_wait(asio::posix::stream_descriptor::wait_read, kAwait));
  // Woken for nothing, whoever waits looks again, and misses no change.
  if (ended.index() == 1) co_return is_readable(socket_->native_handle()) ? Woken::peer_gone : Woken::changed;
  const bool was_woken = std::get<0>(std::get<0>(ended)) == asio::error::operation_aborted;
  co_return was_woken ? Woken::changed : Woken::deadline;
}

}  // namespace cowmgr
