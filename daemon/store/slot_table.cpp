#include "daemon/store/slot_table.hpp"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "daemon/shm/state_change.hpp"
#include "proto/segment.hpp"

namespace cowmgr {
namespace {

tl::unexpected<Error> refuse(Errc code, std::string message) {
  return cowmgr::fail(code, std::move(message));
}

std::uint32_t attempt_of(const SlotEntry& entry) noexcept {
  return static_cast<std::uint32_t>(entry.word.load(std::memory_order_relaxed) >> 32U);
}

SlotContent content_of(const SlotEntry& entry) noexcept {
  return content_in(entry.word.load(std::memory_order_relaxed));
}

}  // namespace

SlotTable::SlotTable(std::byte* memory, std::uint64_t slots, std::uint64_t backed_bytes,
                     const SlotLimits& limits)
    : memory_(memory),
      slots_(slots),
      limits_(limits),
      order_offset_(reinterpret_cast<const ResultHeader*>(memory)->order_offset),
      values_offset_(reinterpret_cast<const ResultHeader*>(memory)->values_offset),
      max_bytes_(reinterpret_cast<const ResultHeader*>(memory)->max_bytes),
      used_bytes_(values_offset_),
      backed_bytes_(backed_bytes) {}

SlotEntry& SlotTable::entry(SlotIndex slot) const noexcept {
  return reinterpret_cast<SlotEntry*>(memory_ + kSlotsOffset)[slot];
}

SlotState SlotTable::state(SlotIndex slot) const noexcept {
  return static_cast<SlotState>(entry(slot).word.load(std::memory_order_relaxed) & 0xFFU);
}

SlotSnapshot SlotTable::slot(SlotIndex slot) const noexcept {
  return snapshot_of(entry(slot));
}

// The word last: it makes the rest of the entry visible.
void SlotTable::write(SlotIndex slot, SlotState state, SlotContent content, std::uint32_t attempt,
                      Time now) noexcept {
  SlotEntry& to = entry(slot);
  to.since_us.store(microseconds(now), std::memory_order_relaxed);
  to.word.store(static_cast<std::uint64_t>(state) | static_cast<std::uint64_t>(content) << 8U |
                    static_cast<std::uint64_t>(attempt) << 32U,
                std::memory_order_release);
  note_state_change();
}

// ---- After a restart ----

// Whether what the slot says is what a daemon writes: nothing is read from a place that is not the segment's.
bool SlotTable::is_whole(SlotIndex slot) const noexcept {
  const SlotSnapshot now = snapshot_of(entry(slot));
  const SlotContent content = content_of(entry(slot));
  switch (now.state) {
    case SlotState::free:
      return content == SlotContent::none;
    case SlotState::leased:
      return now.holder != 0 && (content == SlotContent::none || content == SlotContent::array);
    case SlotState::committed:
      if (content == SlotContent::rows || content == SlotContent::array) return true;
      if (content != SlotContent::value) return false;
      break;
    case SlotState::failed:
      if (content != SlotContent::reason) return false;
      break;
    default:
      return false;
  }
  return now.place >= values_offset_ && now.place <= backed_bytes_ &&
         now.size_bytes <= backed_bytes_ - now.place;
}

Result<void> SlotTable::adopt(Tick now) {
  for (SlotIndex slot = 0; slot < slots_; ++slot) {
    if (!is_whole(slot)) return refuse(Errc::corrupted, fmt::format("slot {} is damaged", slot));
    const SlotEntry& at = entry(slot);
    switch (state(slot)) {
      case SlotState::free:
        if (attempt_of(at) == 0) continue;
        break;
      case SlotState::leased:
        held_[at.holder.load(std::memory_order_relaxed)].insert(slot);
        ++leased_;
        resume(slot, now);
        break;
      case SlotState::committed:
        ++committed_;
        break;
      case SlotState::failed:
        ++failed_;
        break;
    }
    const SlotContent content = content_of(at);
    if (content == SlotContent::value || content == SlotContent::reason)
      used_bytes_ = std::max(used_bytes_, at.place + at.size_bytes);
    // Up to the last that was ever leased.
    for (; next_ <= slot; ++next_) {
      if (state(next_) == SlotState::free) returned_.insert(next_);
    }
  }
  adopt_order();
  return {};
}

// A daemon that died while it settled a slot may have written the slot, but not yet the count.
void SlotTable::adopt_order() {
  auto* order = reinterpret_cast<std::uint32_t*>(memory_ + order_offset_);
  auto& header = *reinterpret_cast<ResultHeader*>(memory_);
  std::vector<bool> is_listed(slots_);
  std::uint64_t listed = 0;
  const auto list = [&](SlotIndex slot) {
    if (slot >= slots_ || is_listed[slot] || state(slot) < SlotState::committed) return;
    is_listed[slot] = true;
    order[listed++] = static_cast<std::uint32_t>(slot);
  };
  const std::uint64_t counted = std::min(header.settled.load(std::memory_order_relaxed), slots_);
  for (std::uint64_t rank = 0; rank < counted; ++rank) list(order[rank]);
  for (SlotIndex slot = 0; slot < slots_ && listed < settled(); ++slot) list(slot);
  header.settled.store(settled(), std::memory_order_release);
  note_state_change();
}

std::optional<std::pair<SlotIndex, std::string>> SlotTable::first_failed() const {
  if (failed_ == 0) return std::nullopt;
  const auto* order = reinterpret_cast<const std::uint32_t*>(memory_ + order_offset_);
  const auto* at =
      std::find_if(order, order + settled(), [&](SlotIndex one) { return state(one) == SlotState::failed; });
  const SlotEntry& found = entry(*at);
  return std::pair(SlotIndex{*at},
                   std::string(reinterpret_cast<const char*>(memory_ + found.place), found.size_bytes));
}

// ---- Leasing ----

std::optional<SlotTable::Lease> SlotTable::lease_any(SessionId session, const Moment& now) {
  if (!returned_.empty()) return take(session, *returned_.begin(), now);
  while (next_ < slots_ && state(next_) != SlotState::free) ++next_;
  if (next_ == slots_) return std::nullopt;
  return take(session, next_, now);
}

Result<SlotTable::Lease> SlotTable::lease(SessionId session, SlotIndex slot, const Moment& now) {
  if (slot >= slots_)
    return refuse(Errc::not_found, fmt::format("there is no slot {}; the set has {}", slot, slots_));
  switch (state(slot)) {
    case SlotState::leased:
      return refuse(Errc::busy, fmt::format("slot {} is leased", slot));
    case SlotState::committed:
      return refuse(Errc::already_committed, fmt::format("slot {} is committed", slot));
    case SlotState::failed:
      return refuse(Errc::slot_failed, fmt::format("slot {} failed", slot));
    default:
      return take(session, slot, now);
  }
}

SlotTable::Lease SlotTable::take(SessionId session, SlotIndex slot, const Moment& now) {
  returned_.erase(slot);
  if (slot == next_) ++next_;
  held_[session].insert(slot);
  ++leased_;
  resume(slot, now.tick);
  SlotEntry& taken = entry(slot);
  const std::uint32_t attempt = attempt_of(taken) + 1;
  taken.holder.store(session, std::memory_order_relaxed);
  note_state_change();
  write(slot, SlotState::leased, SlotContent::none, attempt, now.time);
  return {slot, attempt};
}

Result<void> SlotTable::check_holder(SessionId session, SlotIndex slot) const {
  if (slot >= slots_)
    return refuse(Errc::not_found, fmt::format("there is no slot {}; the set has {}", slot, slots_));
  const SlotState now = state(slot);
  if (now == SlotState::committed)
    return refuse(Errc::already_committed, fmt::format("slot {} is committed already", slot));
  if (now == SlotState::failed) return refuse(Errc::slot_failed, fmt::format("slot {} failed already", slot));
  if (is_held(session, slot, 0)) return {};
  return not_leased(slot);
}

Result<void> SlotTable::check_holder(SessionId session, SlotIndex slot, std::uint32_t attempt) const {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  if (is_held(session, slot, attempt)) return {};
  return not_leased(slot);
}

bool SlotTable::is_held(SessionId session, SlotIndex slot, std::uint32_t attempt) const noexcept {
  return slot < slots_ && state(slot) == SlotState::leased &&
         entry(slot).holder.load(std::memory_order_relaxed) == session &&
         (attempt == 0 || attempt == attempt_of(entry(slot)));
}

bool SlotTable::was_committed(SlotIndex slot, std::uint32_t attempt) const noexcept {
  return slot < slots_ && state(slot) == SlotState::committed && attempt_of(entry(slot)) == attempt;
}

// Never "array" with an id that is not that array's.
void SlotTable::note_array(SlotIndex slot, std::uint64_t id) {
  SlotEntry& to = entry(slot);
  const std::uint64_t word = to.word.load(std::memory_order_relaxed) & ~std::uint64_t{0xFF00};
  to.word.store(word, std::memory_order_release);
  note_state_change();
  if (id == 0) return;
  std::atomic_ref(to.place).store(id, std::memory_order_relaxed);
  to.word.store(word | static_cast<std::uint64_t>(SlotContent::array) << 8U, std::memory_order_release);
  note_state_change();
}

std::uint64_t SlotTable::noted_array(SlotIndex slot) const noexcept {
  const SlotEntry& at = entry(slot);
  return state(slot) == SlotState::leased && content_of(at) == SlotContent::array ? at.place : 0;
}

tl::unexpected<Error> SlotTable::not_leased(SlotIndex slot) const {
  if (limits_.lease.count() > 0) {
    return refuse(
        Errc::not_holder,
        fmt::format("slot {} is not leased to this session any more, if it ever was: a lease of this "
                    "set ends after {} ms; lease it again, or ask for more time",
                    slot, limits_.lease.count()));
  }
  return refuse(Errc::not_holder, fmt::format("slot {} is not leased to this session; lease it first", slot));
}

// ---- The end of a lease ----

void SlotTable::forget_deadline(SlotIndex slot) {
  const auto at = ends_.find(slot);
  if (at == ends_.end()) return;
  deadlines_.erase({at->second, slot});
  ends_.erase(at);
}

void SlotTable::resume(SlotIndex slot, Tick now) {
  if (limits_.lease.count() == 0) return;
  forget_deadline(slot);
  ends_[slot] = now + limits_.lease;
  deadlines_.emplace(now + limits_.lease, slot);
}

void SlotTable::abandon() {
  held_.clear();
  ends_.clear();
  deadlines_.clear();
  leased_ = 0;
  memory_ = nullptr;
}

void SlotTable::let_go(SessionId session, SlotIndex slot) {
  forget_deadline(slot);
  --leased_;
  const auto held = held_.find(session);
  if (held == held_.end()) return;  // lose_all() has taken it out already
  held->second.erase(slot);
  if (held->second.empty()) held_.erase(held);
}

// The order first, then the slot, then the count: who reads the count finds the other two.
void SlotTable::settle(SessionId session, SlotIndex slot, SlotState state, SlotContent content, Time now) {
  let_go(session, slot);
  reinterpret_cast<std::uint32_t*>(memory_ + order_offset_)[settled()] = static_cast<std::uint32_t>(slot);
  write(slot, state, content, attempt_of(entry(slot)), now);
  ++(state == SlotState::committed ? committed_ : failed_);
  reinterpret_cast<ResultHeader*>(memory_)->settled.store(settled(), std::memory_order_release);
  note_state_change();
}

void SlotTable::store(SlotIndex slot, std::span<const std::byte> bytes) {
  COWMGR_ASSERT(bytes.size() <= room_bytes());
  if (!bytes.empty()) std::memcpy(memory_ + used_bytes_, bytes.data(), bytes.size());
  entry(slot).place = used_bytes_;
  entry(slot).size_bytes = bytes.size();
  note_state_change();
  used_bytes_ += bytes.size();
}

Result<void> SlotTable::commit_rows(SessionId session, SlotIndex slot, Time now) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  settle(session, slot, SlotState::committed, SlotContent::rows, now);
  return {};
}

Result<void> SlotTable::commit_array(SessionId session, SlotIndex slot, std::uint64_t id,
                                     std::uint64_t size_bytes, Time now) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  entry(slot).place = id;
  entry(slot).size_bytes = size_bytes;
  settle(session, slot, SlotState::committed, SlotContent::array, now);
  return {};
}

Result<void> SlotTable::commit_value(SessionId session, SlotIndex slot, std::span<const std::byte> value,
                                     Time now) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  store(slot, value);
  settle(session, slot, SlotState::committed, SlotContent::value, now);
  return {};
}

// Where the segment has no room for it, the reason is left out: the set's message tells the first one.
void SlotTable::fail_for_good(SessionId session, SlotIndex slot, std::string_view reason, Time now) {
  const auto bytes = std::as_bytes(std::span(reason));
  store(slot, bytes.size() <= room_bytes() ? bytes : std::span<const std::byte>());
  settle(session, slot, SlotState::failed, SlotContent::reason, now);
}

// The holder last: "leased" is never without one.
void SlotTable::make_free(SlotIndex slot, Time now) {
  write(slot, SlotState::free, SlotContent::none, attempt_of(entry(slot)), now);
  entry(slot).holder.store(0, std::memory_order_relaxed);
  note_state_change();
  if (slot < next_) returned_.insert(slot);
}

Result<bool> SlotTable::fail(SessionId session, SlotIndex slot, std::string_view reason, bool is_final,
                             Time now) {
  if (auto ok = check_holder(session, slot); !ok) return error_of(std::move(ok));
  is_final = is_final || attempt_of(entry(slot)) >= limits_.attempts;  // so it is without a limit
  if (is_final) {
    fail_for_good(session, slot, reason, now);
  } else {
    let_go(session, slot);
    make_free(slot, now);
  }
  return is_final;
}

Result<void> SlotTable::give_back(SessionId session, SlotIndex slot, Time now) {
  if (auto ok = check_holder(session, slot); !ok) return ok;
  let_go(session, slot);
  make_free(slot, now);
  return {};
}

void SlotTable::lose(SessionId session, SlotIndex slot, std::string_view reason, Time now, Lost& lost) {
  lost.slots.push_back(slot);
  if (limits_.attempts == 0 || attempt_of(entry(slot)) < limits_.attempts) {
    let_go(session, slot);
    make_free(slot, now);
    return;
  }
  fail_for_good(session, slot, reason, now);
  if (!lost.first_failed) lost.first_failed = slot;
}

std::vector<SlotIndex> SlotTable::held_by(SessionId session) const {
  const auto at = held_.find(session);
  return at == held_.end() ? std::vector<SlotIndex>()
                           : std::vector<SlotIndex>(at->second.begin(), at->second.end());
}

std::vector<SessionId> SlotTable::holders() const {
  std::vector<SessionId> sessions;
  for (const auto& [session, slots] : held_) sessions.push_back(session);
  return sessions;
}

SlotTable::Lost SlotTable::lose_all(SessionId session, std::string_view reason, Time now) {
  Lost lost;
  const auto node = held_.extract(session);
  if (node.empty()) return lost;
  for (const SlotIndex slot : node.mapped()) lose(session, slot, reason, now, lost);
  return lost;
}

SlotTable::Lost SlotTable::expire(const Moment& now) {
  Lost lost;
  const std::string reason = fmt::format("no result within {} ms", limits_.lease.count());
  while (!deadlines_.empty() && deadlines_.begin()->first <= now.tick) {
    const SlotIndex slot = deadlines_.begin()->second;
    lose(entry(slot).holder.load(std::memory_order_relaxed), slot, reason, now.time, lost);
  }
  return lost;
}

std::optional<Tick> SlotTable::next_deadline() const {
  if (deadlines_.empty()) return std::nullopt;
  return deadlines_.begin()->first;
}

std::uint32_t SlotTable::leases_of(SessionId session) const {
  const auto at = held_.find(session);
  return at == held_.end() ? 0 : static_cast<std::uint32_t>(at->second.size());
}

}  // namespace cowmgr
