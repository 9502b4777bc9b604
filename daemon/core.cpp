#include "daemon/core.hpp"

#include <algorithm>
#include <poll.h>
#include <span>
#include <sys/resource.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/detached.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/fd_socket.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kNamedWriters = 8;  // in a message
constexpr std::size_t kPoolThreads = 2;   // one may zero gigabytes while the other gives some back
// Many more than anybody makes files, and few enough for 2^31 ids until they begin anew.
constexpr std::uint64_t kIdStep = std::uint64_t{1} << 22;
constexpr int kPoolNice = 10;  // the loop answers first

// A dying process gives its mappings back a moment after its socket ended: the first refusals mean nothing.
constexpr auto kFirstRetry = std::chrono::milliseconds(1);
constexpr auto kExplainAfter = std::chrono::milliseconds(100);
constexpr auto kLongestRetry = std::chrono::milliseconds(500);

// Of garbage that others hold: who is dying is gone by then, even on a busy machine.
constexpr auto kDyingPatience = std::chrono::seconds(1);
constexpr auto kLongestOutsideRetry = std::chrono::seconds(5);
constexpr auto kLookOutsideEvery = std::chrono::milliseconds(50);  // at most, whoever asks

}  // namespace

bool is_readable(int fd) noexcept {
  pollfd poll{fd, POLLIN, 0};
  return ::poll(&poll, 1, 0) > 0;
}

void WaitList::wake(const WaitKey& key) {
  const auto [begin, end] = timers_.equal_range(key);
  for (auto at = begin; at != end; ++at) at->second->cancel();
}

Core::Core(asio::io_context& io_context, const Config& options, const ShmEnv& shm)
    : io(io_context),
      log(io_context),
      config(options),
      env(shm),
      store(shm, {.capacity_bytes = options.capacity_bytes,
                  .quota = options.quota,
                  .admin = ::geteuid(),
                  .first_id = random_id() + 1,
                  .id_step = kIdStep}),
      results(store, ::geteuid()),
      fd_store(options.instance, options.fd_store && options.parent_fd < 0),
      started(now()),
      purges(options.purge),
      pool_(kPoolThreads),
      outside_retry_(io_context),
      grace_end_(io_context),
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
  note_served_and_dropped();
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
    if (change.has_free && record != nullptr && !record->terms.queue.empty())
      waits.wake({Topic::queue, 0, record->terms.queue});
    if (change.is_settled || change.has_ended) waits.wake({Topic::slot_settled, set});
  }
  watch_lease_ends();
}

void Core::note_served_and_dropped() {
  for (const ArrayId array : store.take_served()) {
    if (const ArrayRecord* record = store.find(array)) fd_store.keep(array, record->segment.reader.get());
    if (store.unlinked().contains(array)) start_rewriting();  // it lost its file before it was sealed
  }
  for (const ArrayId array : store.take_dropped()) {
    results.forget_array(array);
    fd_store.forget(array);
  }
  if (is_telling_ || !fd_store.has_changes()) return;
  is_telling_ = true;
  asio::co_spawn(io, tell_service_manager(), asio::detached);
}

// In one thread of the pool at most: a service manager that does not read holds up no other work.
asio::awaitable<void> Core::tell_service_manager() {
  while (fd_store.has_changes()) {
    auto work = [this, changes = fd_store.take_changes()] {
      fd_store.tell(changes);
      return true;
    };
    co_await offload(std::move(work));
  }
  is_telling_ = false;
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

void Core::await_sessions(std::set<SessionId> sessions_to_come) {
  awaited_ = std::move(sessions_to_come);
  if (awaited_.empty() && !store.has_awaited()) return;
  grace_end_.expires_after(config.grace);
  grace_end_.async_wait([this](const boost::system::error_code& error) {
    if (!error) end_grace();
  });
}

void Core::end_grace() {
  for (const SessionId session : std::exchange(awaited_, {})) {
    const auto why = fmt::format("process {} did not come back within {} s of the daemon's start",
                                 pid_of(session), config.grace.count());
    spdlog::info("{}", why);
    results.close_session(session, why, now());
    store.drop_unclaimed(session);
  }
  store.drop_unviewed();
  settle();
}

void Core::close_socket(UniqueFd socket, std::function<void()> closed) {
  if (closer && !shut_and_drain(socket.get())) {
    auto in_the_loop = [this, closed = std::move(closed)] { asio::post(io, closed); };
    return closer->close(std::move(socket), std::move(in_the_loop));
  }
  socket.reset();
  closed();
}

void Core::begin_to_stop() noexcept {
  is_stopping_ = true;
  log.stop();
  stops_work_ = true;
  lease_end_.cancel();
  grace_end_.cancel();
  outside_retry_.cancel();
}

void Core::settle() {
  wake_waiters();
  auto garbage = take_garbage();
  if (!garbage.empty()) asio::co_spawn(io, reclaim(std::move(garbage)), asio::detached);
}

asio::awaitable<std::uint64_t> Core::settle_and_reclaim() {
  wake_waiters();
  auto garbage = take_garbage();
  if (garbage.empty()) co_return 0;
  co_return co_await reclaim(std::move(garbage));
}

std::vector<Core::Outside> Core::take_garbage() {
  std::vector<Outside> all;
  const Tick now = std::chrono::steady_clock::now();
  for (Garbage& garbage : store.take_garbage()) all.push_back({std::move(garbage), now});
  return all;
}

asio::awaitable<std::uint64_t> Core::reclaim(std::vector<Outside> garbage) {
  auto work = [this, all = std::move(garbage)]() mutable {
    for (Outside& one : all) {
      if (env.try_remove(one.garbage.segment)) one.is_free = true;
    }
    return std::move(all);
  };
  auto tried = co_await offload(std::move(work));
  const auto refused = std::ranges::stable_partition(tried, [](const Outside& one) { return one.is_free; });
  for (const Outside& one : std::span(tried.begin(), refused.begin())) {
    if (one.is_told)
      store.end_outside(one.garbage);
    else
      store.reclaimed(one.garbage.size_bytes);
  }
  std::uint64_t refused_bytes = 0;
  for (Outside& one : refused) {
    refused_bytes += one.garbage.size_bytes;
    keep_outside(std::move(one));
  }
  waits.wake({WaitKey::Topic::reclaimed});
  if (refused.begin() == tried.begin()) co_return refused_bytes;
  rewritten_in_vain_.clear();  // there may be room now
  start_rewriting();
  co_return refused_bytes;
}

// ---- What others hold ----

// The pause grows with the time that it has been held: some twenty tries in the first second, later one in
// five.
void Core::keep_outside(Outside one) {
  const Tick now = std::chrono::steady_clock::now();
  if (!one.is_told && now - one.since >= kDyingPatience) {
    one.is_told = true;
    store.begin_outside(one.garbage);
    spdlog::info("{} of {} stay taken: some process has it mapped or open without a view",
                 format_size(one.garbage.size_bytes), one.garbage.segment.name);
  }
  const auto pause = std::clamp<Tick::duration>((now - one.since) / 2, kFirstRetry, kLongestOutsideRetry);
  outside_.emplace(now + pause, std::move(one));
  if (is_retrying_outside_ || is_stopping_) {
    outside_retry_.cancel();  // this one may come first
    return;
  }
  is_retrying_outside_ = true;
  asio::co_spawn(io, retry_outside(), asio::detached);
}

std::vector<Core::Outside> Core::take_outside(Tick until) {
  std::vector<Outside> due;
  const auto end = outside_.upper_bound(until);
  for (auto at = outside_.begin(); at != end; ++at) due.push_back(std::move(at->second));
  outside_.erase(outside_.begin(), end);
  return due;
}

asio::awaitable<void> Core::retry_outside() {
  while (!outside_.empty() && !is_stopping_) {
    outside_retry_.expires_at(outside_.begin()->first);
    (void)co_await outside_retry_.async_wait(asio::as_tuple(asio::use_awaitable));
    auto due = take_outside(std::chrono::steady_clock::now());
    if (!due.empty() && !is_stopping_) (void)co_await reclaim(std::move(due));
  }
  is_retrying_outside_ = false;
}

asio::awaitable<void> Core::look_outside() {
  const Tick now = std::chrono::steady_clock::now();
  if (now - looked_outside_ < kLookOutsideEvery) co_return;
  looked_outside_ = now;
  auto all = take_outside(Tick::max());
  if (!all.empty()) (void)co_await reclaim(std::move(all));
}

asio::awaitable<void> Core::retry_seals() {
  asio::steady_timer timer(io);
  auto pause = kFirstRetry;
  for (;;) {
    timer.expires_after(pause);
    co_await timer.async_wait(asio::use_awaitable);
    const auto refused = results.finish_settled(now());
    settle();
    if (refused.empty() || is_stopping_) break;
    for (const auto& [set, why] : refused) {
      if (pause < kExplainAfter) break;
      std::string reason = "cannot be sealed yet: " + why;
      if (why.empty()) {
        const std::string who = co_await writers_in_words(set);
        reason = "can still be written by " + who;
      }
      results.explain(set, "all slots are committed, but the set " + reason);
    }
    settle();
    pause = std::min<std::chrono::milliseconds>(pause * 2, kLongestRetry);
  }
  is_retrying_ = false;
}

asio::awaitable<std::string> Core::writers_in_words(ArrayId id) {
  const ArrayRecord* record = store.find(id);
  if (record == nullptr) co_return "nobody";
  co_return co_await writers_in_words(reader_of(record->segment));
}

asio::awaitable<std::string> Core::writers_in_words(Result<Segment> copy) {
  if (!copy) co_return fmt::format("somebody ({})", copy.error().message);
  auto work = [this, from = *std::move(copy)] { return env.writers_of(from); };
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
  const uid_t owner = record->owner.uid;
  const std::string name = record->name;
  const auto older =
      std::ranges::find(record->older, lease_fd, [](const Segment& one) { return one.lease.get(); });
  const Segment& opened = older == record->older.end() ? record->segment : *older;
  auto copy = reader_of(opened);
  // Whoever opens waits in open(2) until the lease is given up; then /proc shows who it was.
  ShmEnv::end_lease(lease_fd);
  const std::string who = co_await writers_in_words(std::move(copy));
  log.warn(owner, [&] {
    return fmt::format("array {} (#{}) was opened for writing by {}; it is not served any more",
                       printable(name), id, who);
  });
  settle();
}

// ---- Files that lose their names ----

void Core::report_removals(const ShmEnv::Removals& removals) {
  std::vector<ArrayId> ids = removals.ids;
  if (removals.all) {
    for (const auto& [id, record] : store.records()) ids.push_back(id);
  }
  for (const ArrayId id : ids) {
    if (!store.note_unlinked(id)) continue;
    const ArrayRecord& record = *store.find(id);
    const bool is_served = store.unlinked().contains(id);
    log.warn(record.owner.uid, [&] {
      return fmt::format("somebody removed {} from /dev/shm, the file of array {}; {}", record.segment.name,
                         printable(record.name),
                         is_served ? "it is served on, and is written to a new one if there is room"
                                   : "who has it keeps it");
    });
    rewritten_in_vain_.erase(id);
    if (is_served) start_rewriting();
  }
}

void Core::start_rewriting() {
  if (is_rewriting_ || is_stopping_) return;
  is_rewriting_ = true;
  asio::co_spawn(io, rewrite_unlinked(), asio::detached);
}

// What cannot be rewritten is tried again when memory was given back.
asio::awaitable<void> Core::rewrite_unlinked() {
  while (!is_stopping_) {
    const auto& left = store.unlinked();
    const auto next =
        std::ranges::find_if(left, [&](ArrayId id) { return !rewritten_in_vain_.contains(id); });
    if (next == left.end()) break;
    const ArrayId id = *next;
    rewritten_in_vain_.insert(id);
    co_await rewrite(id);
  }
  is_rewriting_ = false;
}

asio::awaitable<void> Core::rewrite(ArrayId id) {
  const auto begun = store.begin_rewrite(id);
  if (!begun) {
    spdlog::debug("array #{} is not rewritten: {}", id, begun.error().message);
    co_return;
  }
  const ArrayRecord& record = **begun;
  const std::string name = record.name;
  const uid_t owner = record.owner.uid;
  Result<Segment> copy = reader_of(record.segment);
  if (copy) {
    auto work = [this, id, from = *std::move(copy), header = record.header, trailer = trailer_page(record)] {
      return env.rewrite(from, id, header, trailer, stops_work_);
    };
    copy = co_await offload(std::move(work));
  }
  if (!copy) spdlog::debug("array #{} is not rewritten: {}", id, copy.error().message);
  if (store.end_rewrite(id, copy ? std::optional(*std::move(copy)) : std::nullopt))
    log.info(owner, [&] { return fmt::format("array {} (#{}) has a file again", printable(name), id); });
  waits.wake({WaitKey::Topic::reclaimed});
  settle();
}

// ---- Contents ----

void Core::look_after_arrays() {
  start_rewriting();
  std::vector<ArrayId> checked;
  for (const auto& [id, record] : store.records()) {
    if (record.checksum != 0 && record.state == ArrayRecord::State::sealed) checked.push_back(id);
  }
  if (!checked.empty()) asio::co_spawn(io, check_contents(std::move(checked)), asio::detached);
}

asio::awaitable<void> Core::check_contents(std::vector<ArrayId> arrays) {
  std::size_t good = 0;
  for (const ArrayId id : arrays) {
    const ArrayRecord* record = store.find(id);
    if (record == nullptr) continue;
    const std::uint64_t wanted = record->checksum;
    auto segment = reader_of(record->segment);
    Result<std::uint64_t> found = 0;
    if (segment) {
      auto work = [this, from = *std::move(segment),
                   data = DataRange{record->header.size(), record->data_bytes}] {
        return env.checksum(from, data, stops_work_);
      };
      found = co_await offload(std::move(work));
    } else {
      found = error_of(segment);
    }
    if (is_stopping_) co_return;
    if (found && *found == wanted) {
      ++good;
    } else if (!found && found.error().code != Errc::corrupted) {
      spdlog::warn("array #{} is not checked: {}", id, found.error().message);
    } else if (const ArrayRecord* bad = store.mark_corrupted(id)) {
      spdlog::error("array {} (#{}) does not match its checksum; it is not served any more",
                    printable(bad->name), id);
      settle();
    }
  }
  spdlog::info("{} of {} array(s) with a checksum match it", good, arrays.size());
}

}  // namespace cowmgr
