#include "daemon/core/reclaimer.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <span>
#include <utility>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <spdlog/spdlog.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

// A dying process gives its mappings back a moment after its socket ended: who is dying is gone after the
// second, even on a busy machine.
constexpr auto kDyingPatience = std::chrono::seconds(1);
constexpr auto kFirstRetry = std::chrono::milliseconds(1);
constexpr auto kLongestRetry = std::chrono::seconds(5);
constexpr auto kLookEvery = std::chrono::milliseconds(50);  // at most, whoever asks
constexpr std::size_t kPiecesAtOnce = 64;                   // that a lane takes without giving others a turn

}  // namespace

Reclaimer::Reclaimer(asio::io_context& io, const ShmEnv& env, Store& store, Background& background,
                     WaitList& waits)
    : io_(io), env_(env), store_(store), background_(background), waits_(waits), retry_(io) {}

void Reclaimer::take_garbage() {
  auto pieces = taken();
  if (!pieces.empty()) asio::co_spawn(io_, reclaim(std::move(pieces)), asio::detached);
}

asio::awaitable<std::uint64_t> Reclaimer::reclaim_now() {
  auto pieces = taken();
  if (pieces.empty()) co_return 0;
  co_return co_await reclaim(std::move(pieces));
}

Reclaimer::Pieces Reclaimer::taken() {
  Pieces all;
  const Tick now = std::chrono::steady_clock::now();
  for (Garbage& garbage : store_.take_garbage()) all.push_back({std::move(garbage), now});
  return all;
}

// In lots, with the others' turns in between.
asio::awaitable<std::uint64_t> Reclaimer::reclaim(Pieces pieces) {
  std::uint64_t refused_bytes = 0;
  auto next = pieces.begin();
  while (next != pieces.end()) {
    if (next != pieces.begin()) co_await asio::post(io_, asio::use_awaitable);
    Pieces lot;
    std::uint64_t size_bytes = 0;
    const uid_t user = next->garbage.owner.value_or(0);
    do {
      size_bytes += next->garbage.memory.size_bytes();
      lot.push_back(std::move(*next));
      ++next;
    } while (next != pieces.end() && lot.size() < kPiecesAtOnce && next->garbage.owner.value_or(0) == user &&
             lane_for(size_bytes + next->garbage.memory.size_bytes()) == LaneKind::small);
    auto work = [this, &lot] {
      for (Piece& piece : lot) piece.is_free = env_.try_remove(piece.garbage.segment);
      return true;
    };
    co_await background_.run_sized(size_bytes, user, std::move(work));
    refused_bytes += settle(std::move(lot));
  }
  co_return refused_bytes;
}

// The room of what is gone is free, the rest is tried again. How many bytes that is.
std::uint64_t Reclaimer::settle(Pieces tried) {
  const auto refused = std::ranges::stable_partition(tried, [](const Piece& piece) { return piece.is_free; });
  if (refused.begin() != tried.begin()) ++times_;
  std::uint64_t refused_bytes = 0;
  for (Piece& piece : refused) {
    refused_bytes += piece.garbage.memory.size_bytes();
    keep_outside(std::move(piece));
  }
  tried.clear();
  waits_.wake({WaitKey::Topic::reclaimed});
  return refused_bytes;
}

// The pause grows with the time that it has been held: some twenty tries in the first second, later one in
// five.
void Reclaimer::keep_outside(Piece piece) {
  const Tick now = std::chrono::steady_clock::now();
  if (!piece.is_told && now - piece.since >= kDyingPatience) {
    piece.is_told = true;
    store_.begin_outside(piece.garbage);
    spdlog::info("{} of {} stay taken: some process has it mapped or open without a view",
                 format_size(piece.garbage.memory.size_bytes()), piece.garbage.segment.name);
  }
  const auto pause = std::clamp<Tick::duration>((now - piece.since) / 2, kFirstRetry, kLongestRetry);
  outside_.emplace(now + pause, std::move(piece));
  if (is_retrying_ || is_stopping_) {
    retry_.cancel();  // this one may come first
    return;
  }
  is_retrying_ = true;
  asio::co_spawn(io_, retry_outside(), asio::detached);
}

Reclaimer::Pieces Reclaimer::take_outside(Tick until) {
  Pieces due;
  const auto end = outside_.upper_bound(until);
  for (auto at = outside_.begin(); at != end; ++at) due.push_back(std::move(at->second));
  outside_.erase(outside_.begin(), end);
  return due;
}

asio::awaitable<void> Reclaimer::retry_outside() {
  while (!outside_.empty() && !is_stopping_) {
    retry_.expires_at(outside_.begin()->first);
    (void)co_await retry_.async_wait(asio::as_tuple(asio::use_awaitable));
    auto due = take_outside(std::chrono::steady_clock::now());
    if (!due.empty() && !is_stopping_) (void)co_await reclaim(std::move(due));
  }
  is_retrying_ = false;
}

asio::awaitable<void> Reclaimer::look_outside() {
  const Tick now = std::chrono::steady_clock::now();
  if (now - looked_outside_ < kLookEvery) co_return;
  looked_outside_ = now;
  auto all = take_outside(Tick::max());
  if (!all.empty()) (void)co_await reclaim(std::move(all));
}

void Reclaimer::stop() noexcept {
  is_stopping_ = true;
  retry_.cancel();
}

}  // namespace cowmgr
