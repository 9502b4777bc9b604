#include "daemon/store/results.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "daemon/store/results_words.hpp"

namespace cowmgr {

using results_words::failure_of;
using results_words::not_yours;
using results_words::refuse;
using SetState = ResultSetRecord::State;

namespace {

// A worker that asks for its share gets one in so many of what is left for each: small shares at the end.
constexpr std::uint64_t kShares = 2;

}  // namespace

// ---- Working ----

std::vector<ResultSets::Lease> ResultSets::lease(SessionId session, ResultSetRecord& set, std::uint64_t count,
                                                 bool is_shared, const Moment& now) {
  end_invitation(session);
  if (!set.is_open()) return {};
  if (is_shared) {
    const std::uint64_t workers = set.workers.size() + (set.workers.contains(session) ? 0 : 1);
    count = std::clamp<std::uint64_t>(set.table.free() / (workers * kShares), 1, count);
  }
  std::vector<Lease> leases;
  while (leases.size() < count) {
    // Where attempts are counted, who was lost before goes alone: if it is to blame, the others of its batch
    // must not pay again.
    const bool is_alone = set.table.is_next_to_go_alone();
    if (is_alone && !leases.empty()) break;
    const auto lease = set.table.lease_any(session, now);
    if (!lease) break;
    leases.push_back(*lease);
    if (is_alone) break;
  }
  if (leases.empty()) return leases;
  add_worker(set, session);
  touch(set);
  return leases;
}

Result<ResultSets::Lease> ResultSets::lease(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                            const Moment& now) {
  auto lease = set.table.lease(session, slot, now);
  if (!lease) return lease;
  end_invitation(session);
  add_worker(set, session);
  touch(set);
  return lease;
}

bool ResultSets::allocated(ResultSetRecord& set, SlotIndex slot, ArrayId array) {
  if (store_.hand_to_daemon(array) == nullptr) return false;
  drop_allocated(set, slot);
  set.allocated.emplace(slot, array);
  places_.insert_or_assign(array, Place{set.id, slot});
  set.table.note_array(slot, array);
  return true;
}

Result<void> ResultSets::commit_rows(SessionId session, ResultSetRecord& set, SlotIndex slot, Time now) {
  if (auto ok = set.table.commit_rows(session, slot, now); !ok) return ok;
  touch(set).is_settled = true;
  return {};
}

Result<void> ResultSets::commit_value(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                      std::span<const std::byte> value, Time now) {
  if (auto ok = set.table.commit_value(session, slot, value, now); !ok) return ok;
  drop_allocated(set, slot);
  touch(set).is_settled = true;
  return {};
}

Result<ResultSets::Sealing> ResultSets::begin_sealing(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                                      std::uint32_t attempt) {
  if (auto ok = set.table.check_holder(session, slot, attempt); !ok) return error_of(std::move(ok));
  const auto at = set.allocated.find(slot);
  if (at == set.allocated.end())
    return refuse(Errc::invalid_argument, fmt::format("no array was allocated for slot {}", slot));
  set.table.hold(slot);
  keep_deadline(set);
  return Sealing{set.id, slot, set.table.slot(slot).attempt, at->second};
}

// The set, if it is open and what was begun is still that slot's.
ResultSetRecord* ResultSets::still_sealing(SessionId session, const Sealing& sealing) {
  if (!holds(session, sealing.set, sealing.slot, sealing.attempt)) return nullptr;
  ResultSetRecord& set = sets_.find(sealing.set)->second;
  const auto at = set.allocated.find(sealing.slot);
  return at != set.allocated.end() && at->second == sealing.array ? &set : nullptr;
}

void ResultSets::give_up_sealing(SessionId session, const Sealing& sealing, Tick now) {
  ResultSetRecord* set = still_sealing(session, sealing);
  if (set == nullptr) return;
  set->table.resume(sealing.slot, now);
  keep_deadline(*set);
  // What cannot be sealed at all is gone: the slot is free of it, and may be allocated or given back.
  if (store_.find(sealing.array) == nullptr) drop_allocated(*set, sealing.slot);
}

Result<void> ResultSets::commit_array(SessionId session, const Sealing& sealing, Time now) {
  ResultSetRecord* set = still_sealing(session, sealing);
  const ArrayRecord* array = store_.find(sealing.array);
  if (set == nullptr || array == nullptr || array->state < ArrayRecord::State::sealed) {
    if (set == nullptr) store_.retire(sealing.array);
    if (auto found = find_to_work(session, sealing.set); !found) return error_of(std::move(found));
    return refuse(Errc::not_holder,
                  fmt::format("slot {} was lost while its array was being sealed", sealing.slot));
  }
  if (auto ok = set->table.commit_array(session, sealing.slot, array->id, array->data_bytes, now); !ok)
    return ok;
  forget_allocated(*set, sealing.slot);
  touch(*set).is_settled = true;
  return {};
}

Result<void> ResultSets::fail(SessionId session, ResultSetRecord& set, SlotIndex slot,
                              std::string_view reason, bool is_final, Time now) {
  const auto has_failed = set.table.fail(session, slot, reason, is_final, now);
  if (!has_failed) return error_of(has_failed);
  drop_allocated(set, slot);
  if (*has_failed && set.message.empty()) set.message = failure_of(slot, reason);
  Change& change = touch(set);
  (*has_failed ? change.is_settled : change.has_free) = true;
  return {};
}

Result<void> ResultSets::give_back(SessionId session, ResultSetRecord& set, SlotIndex slot, Time now) {
  if (auto ok = set.table.give_back(session, slot, now); !ok) return ok;
  drop_allocated(set, slot);
  touch(set).has_free = true;
  return {};
}

void ResultSets::lost(ResultSetRecord& set, const SlotTable::Lost& lost, std::string_view reason) {
  if (lost.slots.empty()) return;
  for (const SlotIndex slot : lost.slots) drop_allocated(set, slot);
  if (lost.first_failed && set.message.empty()) set.message = failure_of(*lost.first_failed, reason);
  Change& change = touch(set);
  change.has_free = true;
  change.is_settled = change.is_settled || lost.first_failed.has_value();
}

// An array that was being written for a slot that is not its writer's any more.
void ResultSets::drop_allocated(ResultSetRecord& set, SlotIndex slot) {
  const auto at = set.allocated.find(slot);
  if (at == set.allocated.end()) return;
  store_.retire(at->second);
  forget_allocated(set, slot);
}

void ResultSets::forget_allocated(ResultSetRecord& set, SlotIndex slot) {
  const auto at = set.allocated.find(slot);
  places_.erase(at->second);
  set.allocated.erase(at);
}

void ResultSets::drop_allocated(ArrayId set, SlotIndex slot, ArrayId array) {
  const auto at = sets_.find(set);
  if (at == sets_.end()) return;
  const auto allocated = at->second.allocated.find(slot);
  if (allocated == at->second.allocated.end() || allocated->second != array) return;
  if (at->second.is_open()) at->second.table.note_array(slot, 0);
  drop_allocated(at->second, slot);
}

void ResultSets::unmapped(SessionId session, ArrayId set) {
  const auto at = sets_.find(set);
  // A session that still holds a slot has it mapped, whatever it says.
  if (at == sets_.end() || at->second.table.leases_of(session) > 0) return;
  if (drop_worker(at->second, session)) touch(at->second);
}

// ---- Ending ----

Result<void> ResultSets::cancel(SessionId session, ResultSetRecord& set, bool forget) {
  if (!may(session, set, Right::write)) return not_yours(set, "cancel it");
  if (forget || !set.is_open()) {
    remove(set);
    return {};
  }
  free_memory(set);
  end(set, SetState::cancelled, "cancelled by its owner");
  for (const SessionId worker : std::exchange(set.workers, {})) forget_role(worker, set);
  set.table.abandon();
  keep_deadline(set);
  SlotMemory memory = std::exchange(set.memory, {});
  memory.mapping = Mapping();
  store_.discard(std::move(memory.room), std::move(memory.segment));
  return {};
}

// The output array of a dense set that is not done; of a ragged one all that its slots hold.
void ResultSets::free_memory(ResultSetRecord& set) {
  for (const auto& [slot, array] : std::exchange(set.allocated, {})) {
    places_.erase(array);
    store_.retire(array);
  }
  if (set.terms.is_ragged) {
    for (SlotIndex slot = 0; slot < set.table.size(); ++slot) {
      if (const auto held = set.table.slot(slot); held.content == SlotContent::array)
        store_.retire(held.place);
    }
  } else if (set.state != SetState::done) {
    store_.retire(set.id);
  }
}

void ResultSets::remove(ResultSetRecord& set) {
  if (set.state != SetState::cancelled) {
    free_memory(set);
    store_.discard(std::move(set.memory.room), std::move(set.memory.segment));
  }
  set.state = SetState::cancelled;
  keep_queue(set);
  forget(set);
  changed_[set.id].has_ended = true;
  sets_.erase(set.id);
}

void ResultSets::close_session(SessionId session, std::string_view reason, Time now) {
  end_invitation(session);
  for (const ArrayId id : sets_of(session)) {
    ResultSetRecord& set = sets_.at(id);
    if (set.is_open()) lost(set, set.table.lose_all(session, reason, now), reason);
    if (drop_worker(set, session)) touch(set);
    if (set.session != session) continue;
    if (!set.terms.is_detached) {
      remove(set);
      continue;
    }
    forget_maker(set);
  }
}

void ResultSets::expire(const Moment& now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now.tick) {
    ResultSetRecord& set = sets_.at(deadlines_.begin()->second);
    lost(set, set.table.expire(now), fmt::format("no result within {} ms", set.terms.limits.lease.count()));
    keep_deadline(set);
  }
  while (!invitation_ends_.empty() && invitation_ends_.begin()->first <= now.tick)
    end_invitation(invitation_ends_.begin()->second);
}

std::optional<Tick> ResultSets::next_deadline() const noexcept {
  std::optional<Tick> next;
  if (!deadlines_.empty()) next = deadlines_.begin()->first;
  if (!invitation_ends_.empty()) next = std::min(next.value_or(Tick::max()), invitation_ends_.begin()->first);
  return next;
}

void ResultSets::forget_array(ArrayId array) {
  const auto at = sets_.find(array);
  if (at != sets_.end() && at->second.state == SetState::done) remove(at->second);
}

ResultSets::Change& ResultSets::touch(ResultSetRecord& set) {
  ++set.revision;
  if (set.table.is_settled() && set.is_open()) settled_.insert(set.id);
  keep_queue(set);
  keep_deadline(set);
  return changed_[set.id];
}

void ResultSets::finish_settled(Time now) {
  // Whoever still has it mapped touches it again.
  for (const ArrayId id : std::exchange(settled_, {})) (void)seal_if_free(sets_.at(id), now);
  // What these have touched by ending is told, and is no reason to look again.
  settled_.clear();
}

std::optional<ResultSets::Refused> ResultSets::seal_again(ArrayId set, Time now) {
  const auto at = sets_.find(set);
  if (at == sets_.end() || !unsealed_.contains(set)) return std::nullopt;
  return seal_if_free(at->second, now);
}

std::optional<ResultSets::Refused> ResultSets::seal_if_free(ResultSetRecord& set, Time now) {
  const auto finished = finish(set, now);
  const bool is_stuck = !finished || (!*finished && set.workers.empty());
  if (!is_stuck) {
    unsealed_.erase(set.id);
    return std::nullopt;
  }
  unsealed_.insert(set.id);
  return Refused{set.id, finished ? "" : finished.error().message};
}

Result<bool> ResultSets::finish(ResultSetRecord& set, Time now) {
  if (set.terms.is_ragged) {
    end(set, set.table.failed() > 0 ? SetState::failed : SetState::done, set.message);
    return true;
  }
  if (set.table.failed() > 0) {
    // There will be no array: its memory goes now, its record tells the waiters why.
    end(set, SetState::failed, set.message);
    free_memory(set);
    return true;
  }
  if (set.state != SetState::sealing) {
    set.state = SetState::sealing;
    touch(set);
  }
  if (!set.workers.empty()) return false;
  const auto sealed = store_.seal(kDaemonSession, set.id, false, now);
  if (sealed && !*sealed) return false;
  if (sealed) {
    end(set, SetState::done, "");
    return true;
  }
  // What all workers have done is not given up because the kernel is short of something.
  if (const Errc code = sealed.error().code;
      code == Errc::out_of_memory || code == Errc::quota_exceeded || code == Errc::os_failure)
    return error_of(sealed);
  end(set, SetState::failed, sealed.error().message);
  free_memory(set);  // refused, it is still being written otherwise
  return true;
}

void ResultSets::end(ResultSetRecord& set, SetState state, std::string message) {
  set.state = state;
  set.message = std::move(message);
  settled_.erase(set.id);
  unsealed_.erase(set.id);
  touch(set).has_ended = true;
}

void ResultSets::explain(ArrayId set, std::string message) {
  const auto at = sets_.find(set);
  if (at == sets_.end() || at->second.state != SetState::sealing || at->second.message == message) return;
  at->second.message = std::move(message);
  touch(at->second).has_ended = true;
}

}  // namespace cowmgr
