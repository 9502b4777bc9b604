// How result sets come about: made for whoever asks, or left by an earlier daemon.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/store/results.hpp"
#include "daemon/store/results_words.hpp"

namespace cowmgr {

using results_words::failure_of;
using results_words::not_yours;
using results_words::refuse;
using SetState = ResultSetRecord::State;

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

}  // namespace cowmgr
