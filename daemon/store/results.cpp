#include "daemon/store/results.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using SetState = ResultSetRecord::State;

// A worker that asks for its share gets one in so many of what is left for each: small shares at the end.
constexpr std::uint64_t kShares = 2;
// Who was told of a set asks for a slot at once; this is for one that was stopped, or died.
constexpr auto kInvitation = std::chrono::milliseconds(200);
constexpr std::uint64_t kMostWoken = 4096;  // for one queue at once; the rest when these have had their turn

tl::unexpected<Error> refuse(Errc code, std::string message) {
  return cowmgr::fail(code, std::move(message));
}

tl::unexpected<Error> no_such_set(std::string_view name) {
  return refuse(Errc::not_found, fmt::format("there is no result set {}; it goes with the process that made "
                                             "it, unless it is detached or done",
                                             printable(name)));
}

tl::unexpected<Error> not_yours(const ResultSetRecord& set, std::string_view what) {
  return refuse(Errc::permission_denied,
                fmt::format("result set {} belongs to user {} with mode {:04o}, which does not let you {}",
                            printable(set.name), set.owner.uid, set.owner.mode, what));
}

}  // namespace

// ---- Making and finding ----

Result<void> ResultSets::check(const CreateRequest& request, const ResultTerms& terms) {
  if (terms.slots == 0 || terms.slots > kMaxSlots) {
    return refuse(Errc::invalid_argument,
                  fmt::format("a result set has 1 to {} slots, not {}", kMaxSlots, terms.slots));
  }
  if (terms.job.size() > kMaxJobBytes) {
    return refuse(Errc::invalid_argument,
                  fmt::format("a job has at most {} bytes, not {}; put an array for more", kMaxJobBytes,
                              terms.job.size()));
  }
  if (!terms.queue.empty()) {
    if (auto ok = check_name(terms.queue); !ok) return ok;
  }
  if (terms.is_ragged) return check_name(fmt::format("{}/{}", request.name, terms.slots - 1));
  if (request.spec.shape.empty()) {
    return refuse(Errc::invalid_shape, "a result set needs a first axis, whose rows are split into slots");
  }
  if (request.spec.order != Order::c) {
    return refuse(Errc::invalid_argument,
                  "a result set has C order, so that the rows of a slot lie together");
  }
  return {};
}

Result<void> ResultSets::check_name_is_free(SessionId session, const std::string& name, bool replace) const {
  const auto named = by_name_.find(name);
  if (named == by_name_.end()) return {};
  for (const ArrayId id : named->second) {
    const ResultSetRecord& set = sets_.at(id);
    // The name of a dense set is its array's, which the store looks after.
    if (!set.terms.is_ragged && !set.is_open()) continue;
    if (!replace)
      return refuse(Errc::already_exists,
                    fmt::format("result set {} exists; cancel it, or ask to replace it", printable(name)));
    if (!may(session, set, Right::write)) return not_yours(set, "replace it");
  }
  return {};
}

namespace {

// What is the same for both kinds.
ResultRecord record_of_terms(SessionId session, const ResultTerms& terms, const Ownership& owner,
                             Time created) {
  return {.slots = terms.slots,
          .job_bytes = terms.job.size(),
          .queue = terms.queue,
          .maker = session,
          .token = terms.token,
          .created_us = microseconds(created),
          .owner_uid = owner.uid,
          .owner_gid = owner.gid,
          .mode = owner.mode,
          .is_ragged = terms.is_ragged,
          .is_detached = terms.is_detached,
          .attempts = terms.limits.attempts,
          .lease_ms = static_cast<std::uint32_t>(terms.limits.lease.count())};
}

ResultTerms terms_of(const ResultRecord& record) {
  return {.slots = record.slots,
          .is_ragged = record.is_ragged,
          .is_detached = record.is_detached,
          .limits = {.attempts = record.attempts, .lease = std::chrono::milliseconds(record.lease_ms)},
          .queue = record.queue,
          .token = record.token};
}

std::string failure_of(SlotIndex slot, std::string_view reason) {
  return fmt::format("slot {}: {}", slot, reason);
}

}  // namespace

ResultRecord ResultSets::record_of(SessionId session, const ResultTerms& terms, const ArrayRecord& array) {
  ResultRecord record = record_of_terms(session, terms, array.owner, array.created);
  record.set = array.id;
  record.name = array.name;
  record.replace = array.replace;
  record.evictable = array.evictable;
  record.npy_header = header_of(array).value_or("");
  return record;
}

ResultRecord ResultSets::record_of(SessionId session, const ResultTerms& terms, ArrayId id,
                                   const CreateRequest& request, Time now) const {
  const Peer& peer = store_.peer(session);
  ResultRecord record = record_of_terms(session, terms, {peer.uid, peer.gid, request.mode & 0777U}, now);
  record.set = id;
  record.name = request.name;
  return record;
}

ResultSetRecord ResultSets::set_of(const ResultRecord& record, const SlotMemory& memory) {
  const ResultTerms terms = terms_of(record);
  return {.id = record.set,
          .name = record.name,
          .terms = terms,
          .owner = {record.owner_uid, record.owner_gid, record.mode},
          .session = record.maker,
          .owner_pid = pid_of(record.maker),
          .created = time_at(record.created_us),
          .table = SlotTable(memory.mapping.data(), terms.slots, memory.segment.size_bytes, terms.limits)};
}

ResultSetRecord& ResultSets::insert(ResultSetRecord set, SlotMemory memory) {
  if (set.terms.is_ragged) remove_ragged(set.name);
  set.memory = std::move(memory);
  const ArrayId id = set.id;
  const auto [at, is_new] = sets_.try_emplace(id, std::move(set));
  COWMGR_ASSERT(is_new);
  index(at->second);
  changed_[id] = {.is_new = true, .has_free = true};
  return at->second;
}

Result<const ResultSetRecord*> ResultSets::add(const ResultRecord& record, SlotMemory& memory) {
  ResultSetRecord set = set_of(record, memory);
  if (!record.is_ragged) {
    const ArrayRecord* output = store_.hand_to_daemon(record.set);
    if (output == nullptr)
      return refuse(Errc::not_found, "the array of the set was given up while the set was being made");
    set.spec = output->spec;
    set.data_bytes = output->data_bytes;
    set.data_offset = output->header_bytes;
  }
  return &insert(std::move(set), std::move(memory));
}

void ResultSets::remove_ragged(const std::string& name) {
  const auto named = by_name_.find(name);
  if (named == by_name_.end()) return;
  for (const ArrayId id : std::set<ArrayId>(named->second)) {
    if (ResultSetRecord& set = sets_.at(id); set.terms.is_ragged) remove(set);
  }
}

const ResultSetRecord* ResultSets::find_made(SessionId session, std::uint64_t token) const {
  const auto at = by_token_.find({session, token});
  return at == by_token_.end() ? nullptr : &sets_.at(at->second);
}

// ---- Finding sets without looking at all of them ----

void ResultSets::index(ResultSetRecord& set) {
  by_name_[set.name].insert(set.id);
  if (set.session != 0) of_session_[set.session].insert(set.id);
  if (set.session != 0 && set.terms.token != 0) by_token_[{set.session, set.terms.token}] = set.id;
  for (const SessionId worker : set.workers) of_session_[worker].insert(set.id);
  keep_queue(set);
  keep_deadline(set);
}

void ResultSets::forget(ResultSetRecord& set) {
  if (const auto named = by_name_.find(set.name); named->second.erase(set.id) > 0 && named->second.empty())
    by_name_.erase(named);
  for (const SessionId worker : std::exchange(set.workers, {})) forget_role(worker, set);
  if (const auto token = by_token_.find({set.session, set.terms.token});
      token != by_token_.end() && token->second == set.id)
    by_token_.erase(token);
  forget_role(std::exchange(set.session, 0), set);
  if (set.deadline) deadlines_.erase({*set.deadline, set.id});
  settled_.erase(set.id);
  unsealed_.erase(set.id);
}

void ResultSets::add_worker(ResultSetRecord& set, SessionId session) {
  if (set.workers.insert(session).second) of_session_[session].insert(set.id);
}

bool ResultSets::drop_worker(ResultSetRecord& set, SessionId session) {
  if (set.workers.erase(session) == 0) return false;
  forget_role(session, set);
  return true;
}

// The session has one role less in the set: if it has none, the set is none of its own any more.
void ResultSets::forget_role(SessionId session, const ResultSetRecord& set) {
  const auto at = of_session_.find(session);
  if (at == of_session_.end() || set.session == session || set.workers.contains(session)) return;
  at->second.erase(set.id);
  if (at->second.empty()) of_session_.erase(at);
}

std::vector<ArrayId> ResultSets::sets_of(SessionId session) const {
  const auto at = of_session_.find(session);
  return at == of_session_.end() ? std::vector<ArrayId>()
                                 : std::vector<ArrayId>(at->second.begin(), at->second.end());
}

// Whether workers of its queue may find it.
void ResultSets::keep_queue(const ResultSetRecord& set) {
  if (set.terms.queue.empty()) return;
  const QueueKey key{set.owner.uid, set.terms.queue};
  if (set.state == SetState::running && set.table.free() > 0) {
    queues_[key].insert(set.id);
  } else if (const auto at = queues_.find(key); at != queues_.end()) {
    at->second.erase(set.id);
    if (at->second.empty()) queues_.erase(at);
  }
}

void ResultSets::keep_deadline(ResultSetRecord& set) {
  const auto next = set.is_open() ? set.table.next_deadline() : std::nullopt;
  if (next == set.deadline) return;
  if (set.deadline) deadlines_.erase({*set.deadline, set.id});
  if (next) deadlines_.emplace(*next, set.id);
  set.deadline = next;
}

// ---- What an earlier daemon left ----

Result<void> ResultSets::adopt(const ResultRecord& record, const ArraySpec& spec, SlotMemory& memory,
                               const Moment& now) {
  ResultSetRecord set = set_of(record, memory);
  if (auto ok = set.table.adopt(now.tick); !ok) return ok;
  // More than any that was told before, so that whoever waits for a change looks again.
  set.revision = static_cast<std::uint64_t>(microseconds(now.time));
  if (const auto failed = set.table.first_failed()) set.message = failure_of(failed->first, failed->second);
  if (!record.is_ragged) {
    set.spec = spec;
    set.data_bytes = data_bytes(spec).value_or(0);
    set.data_offset = record.npy_header.size();
    const CreateRequest request{.name = record.name,
                                .spec = spec,
                                .replace = record.replace,
                                .evictable = record.evictable,
                                .owner = set.owner};
    const ArrayRecord* output = store_.find(record.set);
    if (output != nullptr)
      set.state = SetState::done;
    else if (set.table.is_settled() && set.table.failed() > 0)
      set.state = SetState::failed;
    else if (auto claimed = store_.claim(kDaemonSession, record.set, request, now.time); !claimed)
      return error_of(std::move(claimed));
    if (output != nullptr && set.table.committed() < set.table.size())
      return refuse(Errc::corrupted, "its array is sealed, but not all of its slots are committed");
  } else if (set.table.is_settled()) {
    set.state = set.table.failed() > 0 ? SetState::failed : SetState::done;
  }
  for (const SessionId holder : set.table.holders()) set.workers.insert(holder);
  memory.room = store_.take_over_room(set.owner.uid, memory.segment.size_bytes);
  auto& added = insert(std::move(set), std::move(memory));
  adopt_allocated(added, now.time);
  touch(added);
  return {};
}

// Of a ragged set: the arrays that holders of slots were writing. One that is sealed was being committed when
// the daemon died: that goes on.
void ResultSets::adopt_allocated(ResultSetRecord& set, Time now) {
  for (const SessionId holder : set.table.holders()) {
    for (const SlotIndex slot : set.table.held_by(holder)) {
      const ArrayId noted = set.table.noted_array(slot);
      if (noted == 0) continue;
      const std::string name = fmt::format("{}/{}", set.name, slot);
      if (const ArrayRecord* sealed = store_.find(noted); sealed != nullptr && sealed->name == name) {
        const auto ok = set.table.commit_array(holder, slot, sealed->id, sealed->data_bytes, now);
        COWMGR_ASSERT(ok.has_value());
        continue;
      }
      set.table.note_array(slot, 0);
      const ArraySpec* spec = store_.unclaimed_spec(noted);
      if (spec == nullptr) continue;
      const CreateRequest request{.name = name, .spec = *spec, .owner = set.owner};
      if (store_.claim(kDaemonSession, noted, request, now)) (void)allocated(set, slot, noted);
    }
  }
}

std::set<SessionId> ResultSets::sessions() const {
  std::set<SessionId> sessions;
  for (const auto& [id, set] : sets_) {
    if (set.session != 0) sessions.insert(set.session);
    for (const SessionId holder : set.table.holders()) sessions.insert(holder);
  }
  return sessions;
}

bool ResultSets::holds(SessionId session, ArrayId set, SlotIndex slot, std::uint32_t attempt) const {
  const auto at = sets_.find(set);
  return at != sets_.end() && at->second.is_open() && at->second.table.is_held(session, slot, attempt);
}

void ResultSets::keep_only(SessionId session, const Slots& known, Time now) {
  for (const ArrayId id : sets_of(session)) {
    ResultSetRecord& set = sets_.at(id);
    if (!set.is_open()) continue;
    for (const SlotIndex slot : set.table.held_by(session)) {
      if (!known.contains({id, slot})) (void)give_back(session, set, slot, now);
    }
    // It has no slot, so for all that we know it has not mapped the set either; if it has, the seal waits.
    if (set.table.leases_of(session) == 0 && drop_worker(set, session)) touch(set);
  }
}

// ---- Who may, and which ----

bool ResultSets::may(SessionId session, const ResultSetRecord& set, Right right) const {
  return is_allowed(store_.peer(session), set.owner, right, admin_);
}

Result<const ResultSetRecord*> ResultSets::open(SessionId session, std::string_view name) const {
  const auto named = by_name_.find(name);
  if (named == by_name_.end()) return no_such_set(name);
  const ResultSetRecord* newest = nullptr;
  for (const ArrayId id : named->second) {
    const ResultSetRecord& set = sets_.at(id);
    const bool is_better =
        newest == nullptr || set.state == SetState::running || newest->state != SetState::running;
    if (is_better) newest = &set;
  }
  if (may(session, *newest, Right::write) || may(session, *newest, Right::read)) return newest;
  return not_yours(*newest, "see it");
}

// ---- Queues ----

const ResultSetRecord* ResultSets::open_queued(SessionId session, std::string_view queue, const Moment& now) {
  end_invitation(session);
  const auto at = queues_.find({store_.peer(session).uid, std::string(queue)});
  if (at == queues_.end()) return nullptr;
  const auto is_uninvited = [&](ArrayId id) {
    const ResultSetRecord& set = sets_.at(id);
    return set.table.free() > set.invited;
  };
  // As many sets at most as have workers on their way.
  const auto found = std::ranges::find_if(at->second, is_uninvited);
  ResultSetRecord& set = sets_.at(found == at->second.end() ? *at->second.begin() : *found);
  invite(session, set, now.tick);
  return &set;
}

std::uint64_t ResultSets::free_in_queue(uid_t user, std::string_view queue) const {
  const auto at = queues_.find({user, std::string(queue)});
  if (at == queues_.end()) return 0;
  std::uint64_t free = 0;
  for (const ArrayId id : at->second) {
    const ResultSetRecord& set = sets_.at(id);
    free += set.table.free() - std::min(set.table.free(), set.invited);
    if (free >= kMostWoken) return kMostWoken;
  }
  return free;
}

void ResultSets::invite(SessionId session, ResultSetRecord& set, Tick now) {
  const Tick end = now + kInvitation;
  ++set.invited;
  invitations_.emplace(session, Invitation{set.id, end});
  invitation_ends_.emplace(end, session);
}

// What it was meant for is there for others, if it did not take it.
void ResultSets::end_invitation(SessionId session) {
  const auto at = invitations_.find(session);
  if (at == invitations_.end()) return;
  const Invitation ended = at->second;
  invitation_ends_.erase({ended.end, session});
  invitations_.erase(at);
  const auto set = sets_.find(ended.set);
  if (set == sets_.end()) return;
  --set->second.invited;
  if (set->second.table.free() > 0) changed_[ended.set].has_free = true;
}

Result<ResultSetRecord*> ResultSets::find(SessionId session, ArrayId set) {
  const auto at = sets_.find(set);
  if (at == sets_.end()) return no_such_set(fmt::format("#{}", set));
  if (may(session, at->second, Right::write) || may(session, at->second, Right::read)) return &at->second;
  return not_yours(at->second, "see it");
}

ResultSetRecord* ResultSets::get(ArrayId set) {
  const auto at = sets_.find(set);
  return at == sets_.end() ? nullptr : &at->second;
}

Result<ResultSetRecord*> ResultSets::find_to_work(SessionId session, ArrayId set) {
  auto found = find(session, set);
  if (!found) return found;
  if ((*found)->state == SetState::cancelled)
    return refuse(Errc::cancelled,
                  fmt::format("result set {} was cancelled by its owner", printable((*found)->name)));
  if (!may(session, **found, Right::write)) return not_yours(**found, "write");
  return found;
}

Listing<ResultSetRecord> ResultSets::list(SessionId session, const NameFilter& filter, ArrayId after,
                                          std::size_t limit) const {
  const auto may_read = [&](const ResultSetRecord& set) { return may(session, set, Right::read); };
  return listing_of<ResultSetRecord>(sets_, after, limit, filter, may_read);
}

bool ResultSets::abort_allocated(SessionId session, ArrayId array) {
  const auto at = places_.find(array);
  if (at == places_.end()) return false;
  const Place place = at->second;
  if (!sets_.at(place.set).table.check_holder(session, place.slot, 0)) return false;
  drop_allocated(place.set, place.slot, array);
  return true;
}

bool ResultSets::contains(ArrayId array) const {
  return sets_.contains(array) || places_.contains(array);
}

std::uint32_t ResultSets::leases_of(SessionId session) const {
  std::uint32_t leases = 0;
  for (const ArrayId id : sets_of(session)) leases += sets_.at(id).table.leases_of(session);
  return leases;
}

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
    if (const auto token = by_token_.find({session, set.terms.token});
        token != by_token_.end() && token->second == id)
      by_token_.erase(token);
    set.session = 0;
    forget_role(session, set);
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
