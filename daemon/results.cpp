#include "daemon/results.hpp"

#include <algorithm>
#include <fnmatch.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using SetState = ResultSetRecord::State;

tl::unexpected<Error> refuse(Errc code, std::string message) {
  return cowmgr::fail(code, std::move(message));
}

tl::unexpected<Error> no_such_set(std::string_view name) {
  return refuse(
      Errc::not_found,
      fmt::format("there is no result set {}; it goes with the process that made it, unless it is done",
                  printable(name)));
}

}  // namespace

// ---- The slots of one set ----

SlotTable::SlotTable(std::uint64_t rows, std::uint64_t slots) : rows_(rows), slots_(slots) {
  for (SlotIndex slot = 0; slot < slots; ++slot) free_.insert(free_.end(), slot);
}

std::optional<SlotTable::Lease> SlotTable::lease_any(SessionId session) {
  if (free_.empty()) return std::nullopt;
  return take(session, *free_.begin());
}

Result<SlotTable::Lease> SlotTable::lease(SessionId session, SlotIndex slot) {
  if (slot >= size())
    return refuse(Errc::not_found, fmt::format("there is no slot {}; the set has {}", slot, size()));
  switch (slots_[slot].state) {
    case State::leased:
      return refuse(Errc::busy, fmt::format("slot {} is leased", slot));
    case State::committed:
      return refuse(Errc::already_committed, fmt::format("slot {} is committed", slot));
    case State::failed:
      return refuse(Errc::slot_failed, fmt::format("slot {} failed", slot));
    default:
      return take(session, slot);
  }
}

// Rows are split as numpy.array_split does: the first rows % slots slots have one row more than the others.
SlotTable::Lease SlotTable::take(SessionId session, SlotIndex slot) {
  free_.erase(slot);
  holders_[session].insert(slot);
  Slot& taken = slots_[slot];
  taken.state = State::leased;
  taken.holder = session;
  ++taken.attempt;
  const std::uint64_t base = rows_ / size();
  const std::uint64_t longer = rows_ % size();
  const std::uint64_t begin = slot * base + std::min(slot, longer);
  return {slot, taken.attempt, begin, begin + base + (slot < longer ? 1 : 0)};
}

Result<void> SlotTable::check_holder(SessionId session, SlotIndex slot) const {
  if (slot >= size())
    return refuse(Errc::not_found, fmt::format("there is no slot {}; the set has {}", slot, size()));
  const Slot& held = slots_[slot];
  if (held.state == State::committed)
    return refuse(Errc::already_committed, fmt::format("slot {} is committed already", slot));
  if (held.state == State::failed)
    return refuse(Errc::slot_failed, fmt::format("slot {} failed already", slot));
  if (held.state == State::leased && held.holder == session) return {};
  return refuse(Errc::not_holder, fmt::format("slot {} is not leased to this session; lease it first", slot));
}

void SlotTable::settle(SlotIndex slot, State state) {
  Slot& held = slots_[slot];
  const auto holder = holders_.find(held.holder);
  holder->second.erase(slot);
  if (holder->second.empty()) holders_.erase(holder);
  held.state = state;
  held.holder = 0;
}

Result<void> SlotTable::commit(SessionId session, SlotIndex slot) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  settle(slot, State::committed);
  ++committed_;
  return {};
}

Result<void> SlotTable::fail(SessionId session, SlotIndex slot) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  settle(slot, State::failed);
  ++failed_;
  return {};
}

Result<void> SlotTable::give_back(SessionId session, SlotIndex slot) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  settle(slot, State::free);
  free_.insert(slot);
  return {};
}

std::size_t SlotTable::give_back_all(SessionId session) {
  const auto node = holders_.extract(session);
  if (node.empty()) return 0;
  for (const SlotIndex slot : node.mapped()) {
    slots_[slot].state = State::free;
    slots_[slot].holder = 0;
    free_.insert(slot);
  }
  return node.mapped().size();
}

std::uint32_t SlotTable::leases_of(SessionId session) const {
  const auto at = holders_.find(session);
  return at == holders_.end() ? 0 : static_cast<std::uint32_t>(at->second.size());
}

// ---- The sets ----

Result<void> ResultSets::check(const ArraySpec& spec, std::uint64_t slots) {
  if (spec.shape.empty()) {
    return refuse(Errc::invalid_shape, "a result set needs a first axis, whose rows are split into slots");
  }
  if (spec.order != Order::c) {
    return refuse(Errc::invalid_argument,
                  "a result set has C order, so that the rows of a slot lie together");
  }
  if (slots == 0 || slots > kMaxSlots) {
    return refuse(Errc::invalid_argument,
                  fmt::format("a result set has 1 to {} slots, not {}", kMaxSlots, slots));
  }
  return {};
}

const ResultSetRecord& ResultSets::add(SessionId session, const ArrayRecord& array, std::uint64_t slots) {
  const auto [at, is_new] =
      sets_.try_emplace(array.id, ResultSetRecord{.id = array.id,
                                                  .name = array.name,
                                                  .spec = array.spec,
                                                  .data_bytes = array.data_bytes,
                                                  .owner = array.owner,
                                                  .session = session,
                                                  .owner_pid = array.writer_pid,
                                                  .created = array.created,
                                                  .table = SlotTable(array.spec.shape.front(), slots)});
  COWMGR_ASSERT(is_new);
  return at->second;
}

bool ResultSets::may(SessionId session, const ResultSetRecord& set, Right right) const {
  return is_allowed(store_.peer(session), set.owner, right, admin_);
}

Result<const ResultSetRecord*> ResultSets::open(SessionId session, std::string_view name) const {
  const ResultSetRecord* newest = nullptr;
  for (const auto& [id, set] : sets_) {
    const bool is_better =
        newest == nullptr || set.state == SetState::running || newest->state != SetState::running;
    if (set.name == name && is_better) newest = &set;
  }
  if (newest == nullptr) return no_such_set(name);
  if (may(session, *newest, Right::write) || may(session, *newest, Right::read)) return newest;
  return refuse(Errc::permission_denied, fmt::format("result set {} belongs to user {} with mode {:04o}",
                                                     printable(name), newest->owner.uid, newest->owner.mode));
}

Result<ResultSetRecord*> ResultSets::find(SessionId session, ArrayId set) {
  const auto at = sets_.find(set);
  if (at == sets_.end()) return no_such_set(fmt::format("#{}", set));
  if (may(session, at->second, Right::write) || may(session, at->second, Right::read)) return &at->second;
  return refuse(Errc::permission_denied, fmt::format("result set {} belongs to user {}",
                                                     printable(at->second.name), at->second.owner.uid));
}

std::vector<const ResultSetRecord*> ResultSets::list(SessionId session, std::string_view pattern,
                                                     ArrayId after, std::size_t limit) const {
  const std::string glob(pattern);
  std::vector<const ResultSetRecord*> found;
  for (auto at = sets_.upper_bound(after); at != sets_.end() && found.size() < limit; ++at) {
    const bool is_match = ::fnmatch(glob.c_str(), at->second.name.c_str(), 0) == 0;
    if (is_match && may(session, at->second, Right::read)) found.push_back(&at->second);
  }
  return found;
}

std::uint32_t ResultSets::leases_of(SessionId session) const {
  std::uint32_t leases = 0;
  for (const auto& [id, set] : sets_) leases += set.table.leases_of(session);
  return leases;
}

Result<std::optional<SlotTable::Lease>> ResultSets::lease(SessionId session, ResultSetRecord& set,
                                                          std::optional<SlotIndex> slot) {
  if (!may(session, set, Right::write)) {
    return refuse(
        Errc::permission_denied,
        fmt::format("result set {} belongs to user {} with mode {:04o}, which does not let you write",
                    printable(set.name), set.owner.uid, set.owner.mode));
  }
  std::optional<SlotTable::Lease> lease;
  if (slot) {
    auto taken = set.table.lease(session, *slot);
    if (!taken) return error_of(std::move(taken));
    lease = *taken;
  } else {
    lease = set.table.lease_any(session);
  }
  if (!lease) return lease;
  set.mapped.insert(session);
  touch(set);
  return lease;
}

Result<void> ResultSets::commit(SessionId session, ResultSetRecord& set, SlotIndex slot) {
  if (auto ok = set.table.commit(session, slot); !ok) return ok;
  touch(set);
  return {};
}

Result<void> ResultSets::fail(SessionId session, ResultSetRecord& set, SlotIndex slot,
                              std::string_view reason) {
  if (auto ok = set.table.fail(session, slot); !ok) return ok;
  if (set.message.empty()) set.message = fmt::format("slot {}: {}", slot, reason);
  touch(set);
  return {};
}

Result<void> ResultSets::give_back(SessionId session, ResultSetRecord& set, SlotIndex slot) {
  if (auto ok = set.table.give_back(session, slot); !ok) return ok;
  touch(set);
  return {};
}

void ResultSets::unmapped(SessionId session, ArrayId set) {
  const auto at = sets_.find(set);
  // A session that still holds a slot has it mapped, whatever it says.
  if (at == sets_.end() || at->second.table.leases_of(session) > 0) return;
  if (at->second.mapped.erase(session) > 0) touch(at->second);
}

void ResultSets::close_session(SessionId session) {
  for (auto at = sets_.begin(); at != sets_.end();) {
    ResultSetRecord& set = at->second;
    if (set.table.give_back_all(session) + set.mapped.erase(session) > 0) touch(set);
    if (set.session != session) {
      ++at;
      continue;
    }
    if (set.state == SetState::running || set.state == SetState::sealing) store_.abort(set.id);
    changed_.push_back(set.id);
    settled_.erase(set.id);
    at = sets_.erase(at);
  }
}

void ResultSets::touch(ResultSetRecord& set) {
  ++set.revision;
  changed_.push_back(set.id);
  if (set.table.is_settled() && (set.state == SetState::running || set.state == SetState::sealing))
    settled_.insert(set.id);
}

std::vector<ArrayId> ResultSets::finish_settled(Time now) {
  std::vector<ArrayId> refused;
  for (const ArrayId id : std::vector<ArrayId>(settled_.begin(), settled_.end())) {
    ResultSetRecord& set = sets_.at(id);
    if (!finish(set, now) && set.mapped.empty()) refused.push_back(id);
  }
  return refused;
}

bool ResultSets::finish(ResultSetRecord& set, Time now) {
  if (set.table.failed() > 0) {
    // There will be no array: its memory goes now, its record tells the waiters why.
    store_.abort(set.id);
    end(set, SetState::failed, set.message);
    return true;
  }
  set.state = SetState::sealing;
  if (!set.mapped.empty()) return false;
  const auto sealed = store_.seal(set.session, set.id, false, now);
  if (sealed && !*sealed) return false;
  if (sealed) {
    end(set, SetState::done, "");
  } else {
    store_.abort(set.id);  // refused, it is still being written otherwise
    end(set, SetState::failed, sealed.error().message);
  }
  return true;
}

void ResultSets::end(ResultSetRecord& set, SetState state, std::string message) {
  set.state = state;
  set.message = std::move(message);
  settled_.erase(set.id);
  touch(set);
}

void ResultSets::explain(ArrayId set, std::string message) {
  const auto at = sets_.find(set);
  if (at == sets_.end() || at->second.state != SetState::sealing || at->second.message == message) return;
  at->second.message = std::move(message);
  touch(at->second);
}

}  // namespace cowmgr
