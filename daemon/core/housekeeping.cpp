#include "daemon/core/housekeeping.hpp"

#include <algorithm>
#include <new>
#include <unistd.h>
#include <utility>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using Topic = WaitKey::Topic;

// A dying process gives its mappings back a moment after its socket ended: the first refusals mean nothing.
constexpr auto kFirstRetry = std::chrono::milliseconds(1);
constexpr auto kExplainAfter = std::chrono::milliseconds(100);
constexpr auto kLongestRetry = std::chrono::milliseconds(500);

}  // namespace

Housekeeping::Housekeeping(Core& core) : core_(core), grace_end_(core.io), lease_end_(core.io) {}

bool Housekeeping::tend() noexcept {
  try {
    return take_notes();
  } catch (const std::bad_alloc& error) {
    // What was noted waits for the next change of its kind.
    spdlog::error("what a request brought about is not seen to: {}", error.what());
    return true;
  }
}

bool Housekeeping::take_notes() {
  Store& store = core_.store;
  ResultSets& results = core_.results;
  const bool is_any = store.has_notes() || results.has_notes() || core_.waits.has_left() ||
                      reclaimed_ != core_.reclaimer.times() || (core_.fd_store.has_changes() && !is_telling_);
  if (!is_any) return false;
  results.finish_settled(Core::now());  // which serves arrays
  note_served_and_dropped();
  if (!results.unsealed().empty()) start_retrying_seals();
  for (auto& name : store.take_changed_names()) core_.waits.wake({Topic::array_name, 0, std::move(name)});
  for (const auto& [set, change] : results.take_changed()) wake_for(set, change);
  for (const WaitKey& key : core_.waits.take_left()) wake_next(key);
  watch_lease_ends();
  core_.reclaimer.take_garbage();
  if (std::exchange(reclaimed_, core_.reclaimer.times()) != core_.reclaimer.times()) {
    rewritten_in_vain_.clear();  // there may be room now
    start_rewriting();
  }
  return true;
}

// ---- Who waits ----

void Housekeeping::wake_for(ArrayId set, const ResultSets::Change& change) {
  WaitList& waits = core_.waits;
  const ResultSetRecord* record = core_.results.get(set);
  const WaitKey for_slot{Topic::slot_free, set};
  waits.wake({Topic::set_changed, set});
  if (change.is_new && record != nullptr) waits.wake({Topic::array_name, 0, record->name});
  if (change.has_ended) waits.wake({Topic::set_ended, set});
  if (record == nullptr || change.has_ended || record->table.is_settled()) {
    waits.wake(for_slot);  // none will become free any more
  } else if (change.has_free) {
    waits.wake_first(for_slot, record->table.free());
    if (!record->terms.queue.empty()) wake_next({Topic::queue, record->owner.uid, record->terms.queue});
  }
  if (change.has_ended)
    waits.wake({Topic::slot_settled, set});
  else if (change.is_settled && record != nullptr)
    waits.wake_below({Topic::slot_settled, set}, record->table.settled());
}

// As many as there is something for, of those that wait for a slot.
void Housekeeping::wake_next(const WaitKey& key) {
  std::uint64_t free = 0;
  if (key.topic == Topic::queue)
    free = core_.results.free_in_queue(static_cast<uid_t>(key.id), key.name);
  else if (const ResultSetRecord* record = core_.results.get(key.id))
    free = record->table.free();
  if (free > 0) core_.waits.wake_first(key, free);
}

// ---- The service manager ----

void Housekeeping::note_served_and_dropped() {
  Store& store = core_.store;
  for (const ArrayId array : store.take_served()) {
    if (const ArrayRecord* record = store.find(array))
      core_.fd_store.keep(array, record->segment.reader.get());
    if (store.unlinked().contains(array)) start_rewriting();  // it lost its file before it was sealed
  }
  core_.forget_dropped();
  if (is_telling_ || !core_.fd_store.has_changes()) return;
  is_telling_ = true;
  asio::co_spawn(core_.io, tell_service_manager(), asio::detached);
}

// One message at a time. A service manager that does not read holds up nothing else.
asio::awaitable<void> Housekeeping::tell_service_manager() {
  while (core_.fd_store.has_changes()) {
    auto work = [this, changes = core_.fd_store.take_changes()] {
      core_.fd_store.tell(changes);
      return true;
    };
    co_await core_.background.run(LaneKind::notify, ::geteuid(), std::move(work));
  }
  is_telling_ = false;
}

// ---- What ends by itself ----

void Housekeeping::watch_lease_ends() {
  const auto next = core_.results.take_next_deadline();
  if (next == lease_end_at_ || core_.is_stopping) return;
  lease_end_at_ = next;
  lease_end_.cancel();
  if (!next) return;
  lease_end_.expires_at(*next);
  lease_end_.async_wait([this](const boost::system::error_code& error) {
    if (error) return;
    lease_end_at_.reset();
    core_.results.expire(Core::moment());
  });
}

void Housekeeping::await_sessions(const std::set<SessionId>& sessions) {
  core_.awaited = sessions;
  if (sessions.empty() && !core_.store.has_awaited()) return;
  grace_end_.expires_after(core_.config.grace);
  grace_end_.async_wait([this](const boost::system::error_code& error) {
    if (!error) end_grace();
  });
}

void Housekeeping::end_grace() {
  for (const SessionId session : std::exchange(core_.awaited, {})) {
    const auto why = fmt::format("process {} did not come back within {} s of the daemon's start",
                                 pid_of(session), core_.config.grace.count());
    spdlog::info("{}", why);
    core_.results.close_session(session, why, Core::now());
    core_.store.drop_unclaimed(session);
  }
  core_.store.drop_unviewed();
}

void Housekeeping::stop() noexcept {
  core_.is_stopping = true;
  core_.log.stop();
  core_.reclaimer.stop();
  stops_work_ = true;
  lease_end_.cancel();
  grace_end_.cancel();
}

// ---- Sets whose memory somebody can still write to ----

void Housekeeping::start_retrying_seals() {
  if (std::exchange(is_retrying_seals_, true)) return;
  asio::co_spawn(core_.io, retry_seals(), asio::detached);
}

asio::awaitable<void> Housekeeping::retry_seals() {
  asio::steady_timer timer(core_.io);
  auto pause = kFirstRetry;
  for (;;) {
    timer.expires_after(pause);
    co_await timer.async_wait(asio::use_awaitable);
    for (const ArrayId set : std::set<ArrayId>(core_.results.unsealed())) {
      co_await asio::post(core_.io, asio::use_awaitable);  // it is the others' turn
      auto refused = core_.results.seal_again(set, Core::now());
      if (refused && pause >= kExplainAfter) co_await explain(*std::move(refused));
    }
    if (core_.results.unsealed().empty() || core_.is_stopping) break;
    pause = std::min<std::chrono::milliseconds>(pause * 2, kLongestRetry);
  }
  is_retrying_seals_ = false;
}

asio::awaitable<void> Housekeeping::explain(ResultSets::Refused refused) {
  std::string reason = "cannot be sealed yet: " + refused.why;
  if (refused.why.empty()) {
    const std::string who = co_await core_.writers_in_words(refused.set);
    reason = "can still be written by " + who;
  }
  core_.results.explain(refused.set, "all slots are committed, but the set " + reason);
}

// ---- Somebody opened a segment, or removed its file ----

asio::awaitable<void> Housekeeping::report_tampering(int lease_fd) {
  if (!ShmEnv::is_lease_broken(lease_fd)) co_return;
  const ArrayRecord* record = core_.store.mark_tampered(lease_fd);
  if (record == nullptr) co_return;
  const ArrayId id = record->id;
  const uid_t owner = record->owner.uid;
  const std::string name = record->name;
  const auto older =
      std::ranges::find(record->older, lease_fd, [](const auto& one) { return one.segment.lease.get(); });
  const Segment& opened = older == record->older.end() ? record->segment : older->segment;
  auto copy = reader_of(opened);
  // Whoever opens waits in open(2) until the lease is given up; then /proc shows who it was.
  ShmEnv::end_lease(lease_fd);
  const std::string who = co_await core_.writers_in_words(owner, std::move(copy));
  core_.log.warn(owner, [&] {
    return fmt::format("array {} (#{}) was opened for writing by {}; it is not served any more",
                       printable(name), id, who);
  });
}

void Housekeeping::report_removals(const ShmEnv::Removals& removals) {
  Store& store = core_.store;
  std::vector<ArrayId> ids = removals.ids;
  if (removals.all) {
    for (const auto& [id, record] : store.records()) ids.push_back(id);
  }
  for (const ArrayId id : ids) {
    if (!store.note_unlinked(id)) continue;
    const ArrayRecord& record = *store.find(id);
    const bool is_served = store.unlinked().contains(id);
    core_.log.warn(record.owner.uid, [&] {
      return fmt::format("somebody removed {} from /dev/shm, the file of array {}; {}", record.segment.name,
                         printable(record.name),
                         is_served ? "it is served on, and is written to a new one if there is room"
                                   : "who has it keeps it");
    });
    rewritten_in_vain_.erase(id);
    if (is_served) start_rewriting();
  }
}

// ---- Copies of what lost its file ----

void Housekeeping::start_rewriting() {
  if (is_rewriting_ || core_.is_stopping || core_.store.unlinked().empty()) return;
  is_rewriting_ = true;
  asio::co_spawn(core_.io, rewrite_unlinked(), asio::detached);
}

// What cannot be rewritten is tried again when memory was given back.
asio::awaitable<void> Housekeeping::rewrite_unlinked() {
  while (!core_.is_stopping) {
    const auto& left = core_.store.unlinked();
    const auto next =
        std::ranges::find_if(left, [&](ArrayId id) { return !rewritten_in_vain_.contains(id); });
    if (next == left.end()) break;
    const ArrayId id = *next;
    rewritten_in_vain_.insert(id);
    co_await rewrite(id);
  }
  is_rewriting_ = false;
}

asio::awaitable<void> Housekeeping::rewrite(ArrayId id) {
  const auto begun = core_.store.begin_rewrite(id);
  if (!begun) {
    spdlog::debug("array #{} is not rewritten: {}", id, begun.error().message);
    co_return;
  }
  const ArrayRecord& record = **begun;
  const std::string name = record.name;
  const uid_t owner = record.owner.uid;
  const std::uint64_t size_bytes = record.segment_bytes();
  const auto header = header_of(record);
  Result<Segment> copy = header ? reader_of(record.segment) : error_of(header);
  if (copy) {
    auto work = [this, id, from = *std::move(copy), header = *header, trailer = trailer_page(record)] {
      return core_.env.rewrite(from, id, header, trailer, stops_work_);
    };
    copy = co_await core_.background.run_sized(size_bytes, owner, std::move(work));
  }
  if (!copy) spdlog::debug("array #{} is not rewritten: {}", id, copy.error().message);
  if (core_.store.end_rewrite(id, copy ? std::optional(*std::move(copy)) : std::nullopt))
    core_.log.info(owner,
                   [&] { return fmt::format("array {} (#{}) has a file again", printable(name), id); });
  core_.waits.wake({Topic::reclaimed});
}

// ---- Contents ----

void Housekeeping::look_after_arrays() {
  start_rewriting();
  std::vector<ArrayId> checked;
  for (const auto& [id, record] : core_.store.records()) {
    if (record.checksum != 0 && record.state == ArrayRecord::State::sealed) checked.push_back(id);
  }
  if (!checked.empty()) asio::co_spawn(core_.io, check_contents(std::move(checked)), asio::detached);
}

asio::awaitable<void> Housekeeping::check_contents(std::vector<ArrayId> arrays) {
  std::size_t good = 0;
  for (const ArrayId id : arrays) {
    if (co_await is_as_sealed(id)) ++good;
    if (core_.is_stopping) co_return;
  }
  spdlog::info("{} of {} array(s) with a checksum match it", good, arrays.size());
}

// Whether the array's data is what its checksum says; one whose data is not is served no more.
asio::awaitable<bool> Housekeeping::is_as_sealed(ArrayId id) {
  const ArrayRecord* record = core_.store.find(id);
  if (record == nullptr) co_return false;
  const std::uint64_t wanted = record->checksum;
  auto segment = reader_of(record->segment);
  Result<std::uint64_t> found = 0;
  if (segment) {
    auto work = [this, from = *std::move(segment),
                 data = DataRange{record->header_bytes, record->data_bytes}] {
      return core_.env.checksum(from, data, stops_work_);
    };
    found = co_await core_.background.run(LaneKind::check, record->owner.uid, std::move(work));
  } else {
    found = error_of(segment);
  }
  if (core_.is_stopping) co_return false;
  if (found && *found == wanted) co_return true;
  if (!found && found.error().code != Errc::corrupted) {
    spdlog::warn("array #{} is not checked: {}", id, found.error().message);
  } else if (const ArrayRecord* bad = core_.store.mark_corrupted(id)) {
    spdlog::error("array {} (#{}) does not match its checksum; it is not served any more",
                  printable(bad->name), id);
  }
  co_return false;
}

}  // namespace cowmgr
