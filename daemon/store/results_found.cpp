// Which result set somebody means, without looking at all of them.
#include <algorithm>

#include "daemon/store/results.hpp"
#include "daemon/store/results_words.hpp"

namespace cowmgr {
namespace {

// Who was told of a set asks for a slot at once; this is for one that was stopped, or died.
constexpr auto kInvitation = std::chrono::milliseconds(200);
constexpr std::uint64_t kMostWoken = 4096;  // for one queue at once; the rest when these have had their turn

}  // namespace

using results_words::no_such_set;
using results_words::not_yours;
using results_words::refuse;
using SetState = ResultSetRecord::State;

// ---- Who may, and which ----

bool ResultSets::may(SessionId session, const ResultSetRecord& set, Right right) const {
  return is_allowed(store_.peer(session), set.owner, right, admin_);
}

Result<const ResultSetRecord*> ResultSets::open(SessionId session, std::string_view name) const {
  const auto named = by_name_.find(name);
  if (named == by_name_.end()) return no_such_set(name);
  const ResultSetRecord* newest = &sets_.at(*named->second.begin());
  for (const ArrayId id : named->second) {
    const ResultSetRecord& set = sets_.at(id);
    if (set.state == SetState::running || newest->state != SetState::running) newest = &set;
  }
  if (may(session, *newest, Right::write) || may(session, *newest, Right::read)) return newest;
  return not_yours(*newest, "see it");
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

// ---- What there is of a name, a session, a queue ----

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
  forget_maker(set);
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

void ResultSets::forget_maker(ResultSetRecord& set) {
  const auto token = by_token_.find({set.session, set.terms.token});
  if (token != by_token_.end() && token->second == set.id) by_token_.erase(token);
  forget_role(std::exchange(set.session, 0), set);
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

}  // namespace cowmgr
