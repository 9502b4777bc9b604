// The store's memory: what is charged, evicted for others, given back, and copied.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/store.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

using State = ArrayRecord::State;

constexpr std::size_t kNamedHolders = 3;  // in the message of out_of_memory

}  // namespace

// ---- Room for what is new ----

Result<void> Store::make_room(std::uint64_t size_bytes) {
  if (size_bytes > options_.capacity_bytes) return tl::unexpected(no_room(size_bytes));
  const auto is_short = [&] {
    return used_bytes_ - reclaiming_bytes_ > options_.capacity_bytes - size_bytes;
  };
  if (is_short() &&
      memory_use().evictable_bytes + options_.capacity_bytes - size_bytes < used_bytes_ - reclaiming_bytes_) {
    return tl::unexpected(no_room(size_bytes));
  }
  if (is_short()) {
    for (auto* victim :
         least_recently_used([](const ArrayRecord& record) { return record.is_reclaimable(); })) {
      drain(*victim);
      if (!is_short()) break;
    }
  }
  // What was evicted is still being given back: the caller tries again when it is.
  if (used_bytes_ > options_.capacity_bytes - size_bytes) return tl::unexpected(no_room(size_bytes));
  return {};
}

// What one can do so that this fits.
std::string Store::advice(std::uint64_t size_bytes, const MemoryStates& states) const {
  if (size_bytes > options_.capacity_bytes) return "start the daemon with a larger --capacity";
  std::string text;
  if (states.kept_bytes > 0) text += "evict arrays that are kept, or put them as evictable; ";
  if (states.pinned_bytes > 0) text += "unpin arrays; ";
  if (states.viewed_bytes + states.draining_bytes > 0) text += "release views; ";
  if (states.results_bytes > 0) text += "end result sets; ";
  if (states.outside_bytes > 0) text += "end the processes that map segments without the library; ";
  return text + "or start the daemon with a larger --capacity";
}

Error Store::no_room(std::uint64_t size_bytes) const {
  const MemoryStates states = memory_states();
  std::string text =
      fmt::format("this needs {}; of the capacity of {}, {} is free, {} evictable, {} pinned, {} viewed",
                  format_size(size_bytes), format_size(options_.capacity_bytes),
                  format_size(states.free_bytes), format_size(states.evictable_bytes),
                  format_size(states.pinned_bytes), format_size(states.viewed_bytes));
  const auto add = [&](std::uint64_t bytes, std::string_view what) {
    if (bytes > 0) text += fmt::format(", {} {}", format_size(bytes), what);
  };
  add(states.kept_bytes, "kept");
  add(states.writing_bytes, "being written");
  add(states.draining_bytes, "draining");
  add(states.results_bytes, "in result sets");
  add(states.outside_bytes, "gone but held by processes that map it without a view");
  add(states.reclaiming_bytes, "being given back");
  return {Errc::out_of_memory, text + largest_holders() + "; " + advice(size_bytes, states)};
}

// " (held by process 12: 3 GiB, process 13: 1 GiB)", the largest first.
std::string Store::largest_holders() const {
  std::vector<std::pair<std::uint64_t, pid_t>> holders;
  for (const auto& [session, held] : sessions_) {
    std::uint64_t size_bytes = 0;
    for (const auto& [id, count] : held.views) size_bytes += records_.at(id).segment_bytes();
    for (const ArrayId id : held.writing) size_bytes += records_.at(id).segment_bytes();
    if (size_bytes > 0) holders.emplace_back(size_bytes, held.peer.pid);
  }
  std::sort(holders.rbegin(), holders.rend());
  std::string text;
  for (std::size_t i = 0; i < std::min(holders.size(), kNamedHolders); ++i) {
    text += fmt::format("{}process {}: {}", i == 0 ? " (held by " : ", ", holders[i].second,
                        format_size(holders[i].first));
  }
  return text.empty() ? text : text + ")";
}

Result<Store::Evicted> Store::evict_lru(SessionId session, std::uint64_t size_bytes) {
  Evicted out;
  const auto is_wanted = [&](const ArrayRecord& record) {
    return record.state == State::sealed && !record.pinned && record.views == 0 &&
           may(session, record, Right::write);
  };
  for (ArrayRecord* record : least_recently_used(is_wanted)) {
    if (out.freed_bytes >= size_bytes) break;
    out.names.push_back(record->name);
    out.freed_bytes += record->segment_bytes();
    drain(*record);
  }
  return out;
}

std::vector<ArrayRecord*> Store::least_recently_used(const std::function<bool(const ArrayRecord&)>& wanted) {
  std::vector<ArrayRecord*> found;
  for (auto& [id, record] : records_) {
    if (wanted(record)) found.push_back(&record);
  }
  std::sort(found.begin(), found.end(),
            [](const ArrayRecord* a, const ArrayRecord* b) { return a->last_used < b->last_used; });
  return found;
}

// ---- Memory that is no array ----

// The quota first: who may not have the memory must not evict others for it.
Result<void> Store::charge_array(uid_t owner, std::uint64_t size_bytes) {
  if (auto ok = quota_.charge_array(owner, size_bytes); !ok) return ok;
  if (auto ok = make_room(size_bytes); !ok) {
    quota_.release_array(owner, size_bytes);
    return ok;
  }
  used_bytes_ += size_bytes;
  return {};
}

Result<void> Store::charge_segment(uid_t owner, std::uint64_t size_bytes) {
  auto charged = charge_array(owner, size_bytes);
  if (charged) results_bytes_ += size_bytes;
  return charged;
}

Result<void> Store::charge_growth(uid_t owner, std::uint64_t size_bytes) {
  if (auto ok = quota_.charge_bytes(owner, size_bytes); !ok) return ok;
  if (auto ok = make_room(size_bytes); !ok) {
    quota_.release_bytes(owner, size_bytes);
    return ok;
  }
  used_bytes_ += size_bytes;
  results_bytes_ += size_bytes;
  return {};
}

void Store::take_over_segment(uid_t owner, std::uint64_t size_bytes) {
  quota_.take_over_array(owner, size_bytes);
  used_bytes_ += size_bytes;
  results_bytes_ += size_bytes;
}

void Store::release_segment(uid_t owner, std::uint64_t size_bytes) {
  quota_.release_array(owner, size_bytes);
  used_bytes_ -= size_bytes;
  results_bytes_ -= size_bytes;
}

void Store::release_growth(uid_t owner, std::uint64_t size_bytes) {
  quota_.release_bytes(owner, size_bytes);
  used_bytes_ -= size_bytes;
  results_bytes_ -= size_bytes;
}

void Store::discard(uid_t owner, Segment segment) {
  env_.unlink(segment);  // no mark says that it must not come back
  quota_.release_array(owner, segment.size_bytes);
  results_bytes_ -= segment.size_bytes;
  throw_away(std::move(segment), owner);
}

// ---- What is given back ----

void Store::throw_away(Segment segment, std::optional<uid_t> owner) {
  const std::uint64_t size_bytes = segment.size_bytes;
  reclaiming_bytes_ += size_bytes;
  garbage_.push_back({std::move(segment), size_bytes, owner});
}

void Store::reclaimed(std::uint64_t size_bytes) {
  COWMGR_ASSERT(reclaiming_bytes_ >= size_bytes && used_bytes_ >= size_bytes);
  reclaiming_bytes_ -= size_bytes;
  used_bytes_ -= size_bytes;
}

void Store::begin_outside(const Garbage& garbage) {
  COWMGR_ASSERT(reclaiming_bytes_ >= garbage.size_bytes);
  reclaiming_bytes_ -= garbage.size_bytes;
  outside_bytes_ += garbage.size_bytes;
  if (garbage.owner) quota_.take_over_array(*garbage.owner, garbage.size_bytes);
}

void Store::end_outside(const Garbage& garbage) {
  COWMGR_ASSERT(outside_bytes_ >= garbage.size_bytes && used_bytes_ >= garbage.size_bytes);
  outside_bytes_ -= garbage.size_bytes;
  used_bytes_ -= garbage.size_bytes;
  if (garbage.owner) quota_.release_array(*garbage.owner, garbage.size_bytes);
}

// ---- Copies of what lost its name ----

Result<const ArrayRecord*> Store::begin_rewrite(ArrayId id) {
  ArrayRecord& record = records_.at(id);
  if (!ShmEnv::has_lost_name(record.segment)) {
    record.is_unlinked = false;
    unlinked_.erase(id);
    return fail(Errc::already_exists, "its file is there again");
  }
  const std::uint64_t size_bytes = record.segment_bytes();
  if (size_bytes > options_.capacity_bytes || used_bytes_ > options_.capacity_bytes - size_bytes)
    return tl::unexpected(no_room(size_bytes));
  used_bytes_ += size_bytes;
  rewriting_.emplace(id, size_bytes);
  return &record;
}

bool Store::end_rewrite(ArrayId id, std::optional<Segment> copy) {
  const std::uint64_t size_bytes = rewriting_.extract(id).mapped();
  if (!copy) {
    used_bytes_ -= size_bytes;
    return false;
  }
  if (!is_wanted(id, *copy)) {
    if (!ShmEnv::has_lost_name(*copy)) env_.unlink(*copy);
    copy->name.clear();                          // by now it may be another's
    throw_away(*std::move(copy), std::nullopt);  // nobody ever had it
    return false;
  }
  ArrayRecord& record = records_.at(id);
  unlinked_.erase(id);
  record.is_unlinked = false;
  Segment& older = record.older.emplace_back(std::exchange(record.segment, *std::move(copy)));
  (void)env_.mark_draining(older);  // it must not come back where a descriptor of it is kept
  older.name.clear();               // that is the copy's
  served_.push_back(id);
  drop_views(record, 0);  // without any, the old memory goes now
  return true;
}

// The array may have been evicted, or its name taken, or somebody may have harmed the copy already. If all is
// well, this is where the next daemon will find the copy: the mark says so, and whether it is pinned by now.
bool Store::is_wanted(ArrayId id, const Segment& copy) const {
  if (!unlinked_.contains(id) || ShmEnv::has_lost_name(copy)) return false;
  if (env_.has_leases() && ShmEnv::is_lease_broken(copy.lease.get())) return false;
  return env_.mark_pinned(copy, records_.at(id).pinned).has_value();
}

// ---- Looking ----

MemoryStates Store::memory_states() const {
  MemoryStates states{.results_bytes = results_bytes_,
                      .reclaiming_bytes = reclaiming_bytes_,
                      .outside_bytes = outside_bytes_};
  const auto state_of = [&](const ArrayRecord& record) -> std::uint64_t& {
    if (record.state < State::sealed) return states.writing_bytes;
    if (record.state == State::draining) return states.draining_bytes;
    if (record.pinned) return states.pinned_bytes;
    if (record.views > 0) return states.viewed_bytes;
    return record.is_reclaimable() ? states.evictable_bytes : states.kept_bytes;
  };
  for (const auto& [id, record] : records_) {
    state_of(record) += record.segment_bytes();
    for (const Segment& older : record.older) states.draining_bytes += older.size_bytes;
  }
  for (const auto& [id, kept] : unclaimed_) states.writing_bytes += kept.segment.size_bytes;
  for (const auto& [id, size_bytes] : rewriting_) states.writing_bytes += size_bytes;
  COWMGR_ASSERT(states.used_bytes() == used_bytes_);
  states.free_bytes = options_.capacity_bytes - std::min(options_.capacity_bytes, used_bytes_);
  return states;
}

MemoryUse Store::memory_use() const {
  MemoryUse use{
      .capacity_bytes = options_.capacity_bytes, .used_bytes = used_bytes_, .states = memory_states()};
  for (const auto& [id, record] : records_) {
    const std::uint64_t size_bytes = record.segment_bytes();
    if (record.pinned) use.pinned_bytes += size_bytes;
    if (record.is_reclaimable()) use.evictable_bytes += size_bytes;
    if (record.views > 0) use.viewed_bytes += size_bytes;
  }
  return use;
}

}  // namespace cowmgr
