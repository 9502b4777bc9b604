// The store's room: what is taken and evicted for others, what is given back, and copied.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/store/store.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

using State = ArrayRecord::State;

constexpr std::size_t kNamedHolders = 3;  // in the message of out_of_memory

}  // namespace

// ---- Room for what is new ----

Result<void> Store::make_room(std::uint64_t size_bytes) {
  if (!memory_.can_make_room(size_bytes)) return tl::unexpected(no_room(size_bytes));
  for (std::size_t evicted = 0; !memory_.expects_room(size_bytes) && evicted < kChangedAtOnce; ++evicted)
    drain(records_.at(*evictable_.oldest()));
  // What was evicted is still being given back: the caller tries again when it is, and evicts more if need
  // be.
  if (!memory_.has_room(size_bytes)) return tl::unexpected(no_room(size_bytes));
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
    const std::uint64_t size_bytes = held.use.view_bytes + held.use.writing_bytes;
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

// ---- Room for what is no array ----

// The quota first: who may not have the memory must not evict others for it.
Result<Room> Store::take_room(uid_t owner, std::uint64_t size_bytes) {
  auto charge = charges_.array(owner, size_bytes);
  if (!charge) return error_of(std::move(charge));
  if (auto ok = make_room(size_bytes); !ok) return error_of(std::move(ok));
  return Room{*std::move(charge), memory_.take(size_bytes, MemoryState::results)};
}

Result<void> Store::extend(Room& room, std::uint64_t more_bytes) {
  if (auto ok = room.charge.grow(more_bytes); !ok) return ok;
  if (auto ok = make_room(more_bytes); !ok) {
    room.charge.shrink(more_bytes);
    return ok;
  }
  room.memory.grow(more_bytes);
  return {};
}

Room Store::take_over_room(uid_t owner, std::uint64_t size_bytes) {
  return {charges_.array_there_is(owner, size_bytes), memory_.take(size_bytes, MemoryState::results)};
}

void Store::discard(Room room, Segment segment) {
  env_.unlink(segment);  // no mark says that it must not come back
  throw_away(std::move(segment), std::move(room.memory), room.owner());
}

// ---- What is given back ----

void Store::throw_away(Segment segment, Memory::Share memory, std::optional<uid_t> owner) {
  memory.move_to(MemoryState::reclaiming);
  garbage_.push_back({std::move(segment), std::move(memory), owner});
}

void Store::begin_outside(Garbage& garbage) {
  garbage.memory.move_to(MemoryState::outside);
  if (garbage.owner) garbage.charge = charges_.array_there_is(*garbage.owner, garbage.memory.size_bytes());
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
  if (!memory_.has_room(size_bytes)) return tl::unexpected(no_room(size_bytes));
  rewriting_.emplace(id, memory_.take(size_bytes, MemoryState::writing));
  return &record;
}

bool Store::end_rewrite(ArrayId id, std::optional<Segment> copy) {
  Memory::Share memory = std::move(rewriting_.extract(id).mapped());
  if (!copy) return false;
  if (!is_wanted(id, *copy)) {
    if (!ShmEnv::has_lost_name(*copy)) env_.unlink(*copy);
    copy->name.clear();                                             // by now it may be another's
    throw_away(*std::move(copy), std::move(memory), std::nullopt);  // nobody ever had it
    return false;
  }
  ArrayRecord& record = records_.at(id);
  unlinked_.erase(id);
  record.is_unlinked = false;
  auto& older = record.older.emplace_back(std::exchange(record.segment, *std::move(copy)),
                                          std::exchange(record.room.memory, std::move(memory)));
  older.memory.move_to(MemoryState::draining);
  (void)env_.mark_draining(older.segment);  // it must not come back where a descriptor of it is kept
  older.segment.name.clear();               // that is the copy's
  index_leases(record);
  account(record);
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
  using enum MemoryState;
  const std::uint64_t used_bytes = memory_.used_bytes();
  return {.free_bytes = options_.capacity_bytes - std::min(options_.capacity_bytes, used_bytes),
          .writing_bytes = bytes(writing),
          .draining_bytes = bytes(draining),
          .pinned_bytes = bytes(MemoryState::pinned),
          .viewed_bytes = bytes(viewed),
          .evictable_bytes = bytes(evictable),
          .kept_bytes = bytes(kept),
          .results_bytes = bytes(results),
          .reclaiming_bytes = bytes(reclaiming),
          .outside_bytes = bytes(outside)};
}

MemoryUse Store::memory_use() const {
  return {.capacity_bytes = options_.capacity_bytes,
          .used_bytes = memory_.used_bytes(),
          .pinned_bytes = pinned_bytes_,
          .evictable_bytes = bytes(MemoryState::evictable),
          .viewed_bytes = viewed_bytes_,
          .states = memory_states()};
}

// ---- Counting ----

namespace {

MemoryState state_of(const ArrayRecord& record) {
  if (record.state < State::sealed) return MemoryState::writing;
  if (record.state == State::draining) return MemoryState::draining;
  if (record.pinned) return MemoryState::pinned;
  if (record.views > 0) return MemoryState::viewed;
  return record.is_reclaimable() ? MemoryState::evictable : MemoryState::kept;
}

}  // namespace

// To be called after each change of what an array is, so that nobody has to look at all of them.
void Store::account(ArrayRecord& record) {
  discount(record);
  const std::uint64_t size_bytes = record.segment_bytes();
  const MemoryState state = state_of(record);
  record.room.memory.move_to(state);
  auto& counted = record.counted = {.use = record.used, .pinned = record.pinned, .viewed = record.views > 0};
  if (counted.pinned) pinned_bytes_ += size_bytes;
  if (counted.viewed) viewed_bytes_ += size_bytes;
  if (state == MemoryState::evictable) counted.order = &evictable_;
  if (state == MemoryState::kept) counted.order = &kept_;
  if (counted.order != nullptr) counted.order->insert(counted.use, record.id);
}

void Store::discount(ArrayRecord& record) {
  const auto counted = std::exchange(record.counted, {});
  if (counted.pinned) pinned_bytes_ -= record.segment_bytes();
  if (counted.viewed) viewed_bytes_ -= record.segment_bytes();
  if (counted.order != nullptr) counted.order->erase(counted.use, record.id);
}

}  // namespace cowmgr
