#include "daemon/core.hpp"

#include <algorithm>
#include <span>
#include <sys/resource.h>
#include <unistd.h>

#include <boost/asio/detached.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kNamedWriters = 8;  // in a message
constexpr std::size_t kPoolThreads = 2;   // one may zero gigabytes while the other gives some back
constexpr int kPoolNice = 10;             // the loop answers first

// A dying process gives its mappings back a moment after its socket ended: the first refusals mean nothing.
constexpr auto kFirstRetry = std::chrono::milliseconds(1);
constexpr auto kExplainAfter = std::chrono::milliseconds(100);
constexpr auto kLongestRetry = std::chrono::milliseconds(500);

}  // namespace

void WaitList::wake(const WaitKey& key) {
  const auto [begin, end] = timers_.equal_range(key);
  for (auto at = begin; at != end; ++at) at->second->cancel();
}

Core::Core(asio::io_context& io_context, const Config& options, const ShmEnv& shm)
    : io(io_context),
      config(options),
      env(shm),
      store(shm, {.capacity_bytes = options.capacity_bytes,
                  .quota = options.quota,
                  .admin = ::geteuid(),
                  .first_id = random_id() + 1}),
      results(store, ::geteuid()),
      started(now()),
      pool_(kPoolThreads),
      lease_end_(io_context) {}

Core::~Core() {
  pool_.join();
}

Time Core::now() {
  return std::chrono::time_point_cast<std::chrono::microseconds>(std::chrono::system_clock::now());
}

void Core::yield_to_the_loop() {
  // nice is an attribute of the thread in Linux, whatever POSIX says (setpriority(2)).
  thread_local const int lowered = ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), kPoolNice);
  (void)lowered;  // a daemon that may not lower itself is only less polite
}

void Core::wake_waiters() {
  for (const ArrayId array : store.take_dropped()) results.forget_array(array);
  if (!results.finish_settled(now()).empty() && !is_retrying_) {
    is_retrying_ = true;
    asio::co_spawn(io, retry_seals(), asio::detached);
  }
  using Topic = WaitKey::Topic;
  for (auto& name : store.take_changed_names()) waits.wake({Topic::array_name, 0, std::move(name)});
  for (const auto& [set, change] : results.take_changed()) {
    waits.wake({Topic::set_changed, set});
    if (change.has_ended) waits.wake({Topic::set_ended, set});
    // Who waits for a slot is told, too, when none will become free any more.
    const ResultSetRecord* record = results.get(set);
    const bool is_over = record == nullptr || record->table.is_settled();
    if (change.has_free || change.has_ended || is_over) waits.wake({Topic::slot_free, set});
    if (change.is_settled || change.has_ended) waits.wake({Topic::slot_settled, set});
  }
  watch_lease_ends();
}

void Core::watch_lease_ends() {
  const auto next = results.next_deadline();
  if (next == lease_end_at_) return;
  lease_end_at_ = next;
  lease_end_.cancel();
  if (!next) return;
  lease_end_.expires_at(*next);
  lease_end_.async_wait([this](const boost::system::error_code& error) {
    if (error) return;
    lease_end_at_.reset();
    results.expire(moment());
    settle();
  });
}

void Core::settle() {
  wake_waiters();
  auto garbage = store.take_garbage();
  if (!garbage.empty()) asio::co_spawn(io, reclaim(std::move(garbage)), asio::detached);
}

asio::awaitable<void> Core::settle_and_reclaim() {
  wake_waiters();
  auto garbage = store.take_garbage();
  if (!garbage.empty()) co_await reclaim(std::move(garbage));
}

asio::awaitable<void> Core::reclaim(std::vector<Segment> garbage) {
  std::uint64_t size_bytes = 0;
  for (const auto& segment : garbage) size_bytes += segment.size_bytes;
  auto work = [this, segments = std::move(garbage)]() mutable {
    for (auto& segment : segments) env.remove(std::move(segment));
    return true;
  };
  co_await offload(std::move(work));
  store.reclaimed(size_bytes);
  waits.wake({WaitKey::Topic::reclaimed});
}

asio::awaitable<void> Core::retry_seals() {
  asio::steady_timer timer(io);
  auto pause = kFirstRetry;
  for (;;) {
    timer.expires_after(pause);
    co_await timer.async_wait(asio::use_awaitable);
    const auto refused = results.finish_settled(now());
    settle();
    if (refused.empty()) break;
    for (const ArrayId set : refused) {
      if (pause < kExplainAfter) break;
      const std::string who = co_await writers_in_words(set);
      results.explain(set,
                      fmt::format("all slots are committed, but the set can still be written by {}", who));
    }
    settle();
    pause = std::min<std::chrono::milliseconds>(pause * 2, kLongestRetry);
  }
  is_retrying_ = false;
}

asio::awaitable<std::string> Core::writers_in_words(ArrayId id) {
  const ArrayRecord* record = store.find(id);
  if (record == nullptr) co_return "nobody";
  // The segment may go while /proc is being read: the worker thread looks through a descriptor of its own.
  auto segment = std::make_shared<Segment>(
      Segment{.name = record->segment.name, .size_bytes = record->segment.size_bytes});
  segment->reader.reset(::dup(record->segment.reader.get()));
  auto work = [this, segment] { return env.writers_of(*segment); };
  const auto holders = co_await offload(std::move(work));
  std::string text;
  for (const auto& holder : std::span(holders).first(std::min(holders.size(), kNamedWriters))) {
    text += fmt::format("{}process {} ({})", text.empty() ? "" : ", ", holder.pid, printable(holder.command));
  }
  if (holders.size() > kNamedWriters) text += fmt::format(" and {} more", holders.size() - kNamedWriters);
  co_return text.empty() ? "a process of another user, or a descriptor on its way through a socket" : text;
}

asio::awaitable<void> Core::report_tampering(int lease_fd) {
  if (!ShmEnv::is_lease_broken(lease_fd)) co_return;
  const ArrayRecord* record = store.mark_tampered(lease_fd);
  if (record == nullptr) co_return;
  const ArrayId id = record->id;
  const std::string name = record->name;
  // Whoever opens waits in open(2) until the lease is given up; then /proc shows who it was.
  env.end_lease(record->segment);
  const std::string who = co_await writers_in_words(id);
  spdlog::warn("array {} (#{}) was opened for writing by {}; it is not served any more", printable(name), id,
               who);
  settle();
}

}  // namespace cowmgr
