#include "daemon/core/background.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>

namespace cowmgr {
namespace {

constexpr std::uint64_t kSmallBytes = std::uint64_t{64} << 20;  // some 10 ms, where memory is slow 50
constexpr std::size_t kLargeThreads = 2;  // one may zero gigabytes while another gives some back
constexpr int kLongNice = 10;  // long work gives way to the loop, and to the workers whose machine it is

}  // namespace

LaneKind lane_for(std::uint64_t size_bytes) noexcept {
  return size_bytes <= kSmallBytes ? LaneKind::small : LaneKind::large;
}

void Lane::stand_back(int nice) noexcept {
  // nice is an attribute of the thread in Linux, whatever POSIX says (setpriority(2)).
  thread_local const int lowered =
      nice > 0 ? ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), nice) : 0;
  (void)lowered;  // a daemon that may not lower itself is only less polite
}

asio::awaitable<void> Lane::wait_for_turn(uid_t user) {
  asio::steady_timer turn(io_, asio::steady_timer::time_point::max());
  waiting_[user].push_back(&turn);
  (void)co_await turn.async_wait(asio::as_tuple(asio::use_awaitable));  // next() has made it this one's
}

// The first of the next user in order of uids, round and round.
void Lane::next() noexcept {
  auto at = waiting_.upper_bound(last_);
  if (at == waiting_.end()) at = waiting_.begin();
  // One that could not be put there, for want of memory, left its place.
  while (at != waiting_.end() && at->second.empty()) at = waiting_.erase(at);
  if (at == waiting_.end()) {
    ++free_;
    return;
  }
  last_ = at->first;
  at->second.front()->cancel();
  at->second.pop_front();
  if (at->second.empty()) waiting_.erase(at);
}

Background::Background(asio::io_context& io)
    : small_(io, 1, 0),
      large_(io, kLargeThreads, kLongNice),
      scan_(io, 1, kLongNice),
      check_(io, 1, kLongNice),
      notify_(io, 1, kLongNice) {}

Lane& Background::lane(LaneKind kind) noexcept {
  switch (kind) {
    case LaneKind::small:
      return small_;
    case LaneKind::large:
      return large_;
    case LaneKind::check:
      return check_;
    case LaneKind::notify:
      return notify_;
    case LaneKind::scan:
      break;
  }
  return scan_;
}

}  // namespace cowmgr
