#include "cowmgr/results.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "proto/fd_socket.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::uint32_t kPaceMs = 50;  // between two calls of a progress function

}  // namespace

// ---- ResultSet: for workers ----

const std::string& ResultSet::name() const noexcept {
  return impl_->info().name;
}
bool ResultSet::is_ragged() const noexcept {
  return impl_->info().is_ragged;
}
const ArraySpec& ResultSet::spec() const noexcept {
  return impl_->info().spec;
}
std::uint64_t ResultSet::slots() const noexcept {
  return impl_->info().slots;
}

Milliseconds ResultSet::lease_limit() const noexcept {
  return impl_->info().lease;
}

std::span<const std::byte> ResultSet::job() const noexcept {
  return impl_->table().job();
}

Result<std::optional<Slot>> ResultSet::lease(Milliseconds wait) {
  auto slots = impl_->lease(-1, {}, wait);
  if (!slots) return error_of(std::move(slots));
  if (slots->empty()) return std::optional<Slot>();
  return Slot(std::move(slots->front()));
}

Result<std::vector<Slot>> ResultSet::lease_batch(std::uint32_t count, Milliseconds wait) {
  auto slots = impl_->lease(-1, {.count = count}, wait);
  if (!slots) return error_of(std::move(slots));
  std::vector<Slot> out;
  for (auto& slot : *slots) out.push_back(Slot(std::move(slot)));
  return out;
}

Result<Slot> ResultSet::lease_slot(std::uint64_t index) {
  if (auto ok = check_index(index); !ok) return error_of(std::move(ok));
  auto taken = impl_->lease(static_cast<std::int64_t>(index), {}, Milliseconds{0});
  if (!taken) return error_of(std::move(taken));
  if (taken->empty())
    return fail(Errc::protocol_error, "the daemon neither leases nor refuses a slot that was asked for");
  return Slot(std::move(taken->front()));
}

// ---- ResultSet: for who waits ----

namespace {

Error unfinished(const ResultsInfo& info) {
  std::string who;
  for (const pid_t pid : info.holders) who += fmt::format("{}{}", who.empty() ? "process " : ", ", pid);
  if (info.state == ResultsState::sealing && !info.message.empty())
    return {Errc::still_writable, info.message};
  return {Errc::timed_out,
          fmt::format("result set {} is not finished: {} of {} slots committed, {} leased, {} free{}",
                      printable(info.name), info.committed, info.slots, info.leased, info.free,
                      who.empty() ? "" : "; its workers are " + who)};
}

}  // namespace

Result<ResultsInfo> ResultSet::info() const {
  return impl_->ask();
}

Result<void> ResultSet::wait_settled(Milliseconds wait, const OnProgress& progress) {
  auto patience = impl_->patience(wait);
  std::uint64_t seen = 0;
  for (;;) {
    // Who is not told of the progress is answered at the end.
    const std::uint32_t pace_ms = !progress ? UINT32_MAX : seen > 0 ? kPaceMs : 0;
    const auto info = impl_->ask(patience, {.seen = seen, .pace_ms = pace_ms});
    if (!info) return error_of(info);
    if (progress && info->revision != seen) progress(*info);
    seen = info->revision;
    switch (info->state) {
      case ResultsState::done:
        return {};
      case ResultsState::failed:
        return fail(Errc::slot_failed, info->message);
      case ResultsState::cancelled:
        return fail(Errc::cancelled, fmt::format("result set {} was cancelled", printable(name())));
      default:
        if (patience.is_over()) return tl::unexpected(unfinished(*info));
    }
  }
}

Result<Array> ResultSet::wait(Milliseconds wait, const OnProgress& progress) {
  if (is_ragged())
    return fail(Errc::invalid_argument,
                "a ragged set is no array: wait_settled(), and read its slots one by one");
  if (auto ok = wait_settled(wait, progress); !ok) return error_of(std::move(ok));
  auto arrays = impl_->attach({impl_->info().id});
  if (!arrays) return error_of(std::move(arrays));
  return Array(std::move(arrays->front()));
}

Result<std::optional<std::uint64_t>> ResultSet::settled_at(std::uint64_t rank, Milliseconds wait) const {
  auto patience = impl_->patience(wait);
  while (impl_->table().settled() <= rank) {
    const bool is_last = patience.is_over();
    const auto info = impl_->ask(patience, {.settled = rank});
    if (!info) return error_of(info);
    if (impl_->table().settled() > rank) break;
    if (info->state != ResultsState::running && info->state != ResultsState::sealing)
      return std::optional<std::uint64_t>();
    if (is_last) return tl::unexpected(unfinished(*info));
  }
  return impl_->table().settled_at(rank);
}

namespace {

bool is_settled(const SlotInfo& slot) {
  return slot.state == SlotState::committed || slot.state == SlotState::failed;
}

}  // namespace

Result<SlotInfo> ResultSet::wait_slot(std::uint64_t index, Milliseconds wait) const {
  auto patience = impl_->patience(wait);
  for (;;) {
    const std::uint64_t settled = impl_->table().settled();
    auto now = slot(index);
    if (!now || is_settled(*now)) return now;
    const bool is_last = patience.is_over();
    const auto info = impl_->ask(patience, {.settled = settled});
    if (!info) return error_of(info);
    now = slot(index);
    if (!now || is_settled(*now)) return now;
    if (info->state == ResultsState::cancelled)
      return fail(Errc::cancelled, fmt::format("result set {} was cancelled", printable(name())));
    if (is_last) return tl::unexpected(unfinished(*info));
  }
}

// ---- ResultSet: reading ----

namespace {

SlotInfo slot_info(const ResultSegment& table, std::uint64_t index, const SlotSnapshot& held) {
  SlotInfo info{.index = index,
                .state = held.state,
                .content = held.content,
                .attempt = held.attempt,
                .session = held.state == SlotState::leased ? held.holder : 0,
                .since = SystemTime(std::chrono::microseconds(held.since_us)),
                .size_bytes = held.size_bytes};
  if (held.content == SlotContent::array) info.array_id = held.place;
  if (held.content == SlotContent::reason) {
    const auto text = table.value(held);
    info.reason.assign(reinterpret_cast<const char*>(text.data()), text.size());
  }
  return info;
}

Error holds_no(std::string_view what, const SlotInfo& slot) {
  if (slot.state == SlotState::failed)
    return {Errc::slot_failed, fmt::format("slot {} failed: {}", slot.index, slot.reason)};
  if (slot.state != SlotState::committed)
    return {Errc::not_found, fmt::format("slot {} is not committed yet", slot.index)};
  return {Errc::not_found, fmt::format("slot {} holds no {}", slot.index, what)};
}

}  // namespace

Result<void> ResultSet::check_index(std::uint64_t index) const {
  if (index < slots()) return {};
  return fail(Errc::not_found,
              fmt::format("there is no slot {}; result set {} has {}", index, printable(name()), slots()));
}

Result<SlotInfo> ResultSet::slot(std::uint64_t index) const {
  if (auto ok = check_index(index); !ok) return error_of(std::move(ok));
  return slot_info(impl_->table(), index, impl_->table().slot(index));
}

Result<std::span<const std::byte>> ResultSet::value(std::uint64_t index) const {
  if (auto ok = check_index(index); !ok) return error_of(std::move(ok));
  const auto& table = impl_->table();
  const SlotSnapshot held = table.slot(index);
  if (held.content != SlotContent::value)
    return tl::unexpected(holds_no("value", slot_info(table, index, held)));
  return table.value(held);
}

Result<Array> ResultSet::array(std::uint64_t index) const {
  auto arrays = this->arrays(std::span(&index, 1));
  if (!arrays) return error_of(std::move(arrays));
  return std::move(arrays->front());
}

Result<std::vector<Array>> ResultSet::arrays(std::span<const std::uint64_t> indexes) const {
  std::vector<Array> out;
  out.reserve(indexes.size());
  for (std::size_t first = 0; first < indexes.size(); first += kMaxFrameFds) {
    std::vector<std::uint64_t> ids;
    for (const std::uint64_t index : indexes.subspan(first, std::min(kMaxFrameFds, indexes.size() - first))) {
      const auto held = slot(index);
      if (!held) return error_of(held);
      if (held->content != SlotContent::array) return tl::unexpected(holds_no("array", *held));
      ids.push_back(held->array_id);
    }
    auto arrays = impl_->attach(ids);
    if (!arrays) return error_of(std::move(arrays));
    for (auto& array : *arrays) out.push_back(Array(std::move(array)));
  }
  return out;
}

Result<void> ResultSet::cancel() const {
  return impl_->cancel(false);
}

Result<void> ResultSet::forget() const {
  return impl_->cancel(true);
}

}  // namespace cowmgr
