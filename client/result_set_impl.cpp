// What a result set asks of the daemon: slots, their end, and how the set is.
#include <algorithm>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "proto/text.hpp"

namespace cowmgr::detail {
namespace {

// The segment of a set's slots, whose first page says how large it may become.
Result<Mapping> map_table(int fd, const ResultsInfo& info) {
  const auto head = Mapping::map(fd, kPageBytes, Access::read_only);
  if (!head) return error_of(head);
  if (const auto ok = ResultSegment::open(head->data(), info.id); !ok) return error_of(ok);
  const auto& header = *reinterpret_cast<const ResultHeader*>(head->data());
  if (header.slots != info.slots || header.max_bytes < kSlotsOffset)
    return cowmgr::fail(Errc::protocol_error,
                        "the segment of a result set is not what the daemon says of it");
  return Mapping::map(fd, header.max_bytes, Access::read_only);
}

Result<ResultsInfo> take_info(const Connection::Reply<wire::Results>& reply) {
  if (reply->sets() == nullptr || reply->sets()->size() != 1)
    return cowmgr::fail(Errc::protocol_error, "the daemon's answer to a wait is malformed");
  return info_of(*reply->sets()->Get(0));
}

}  // namespace

Result<std::shared_ptr<ResultSetImpl>> ResultSetImpl::take(std::shared_ptr<Connection> connection,
                                                           Connection::Reply<wire::Results>& reply) {
  if (reply->sets() == nullptr || reply->sets()->size() != 1 || reply.fds().size() != 1)
    return cowmgr::fail(Errc::protocol_error, "the daemon's description of a result set is malformed");
  auto info = info_of(*reply->sets()->Get(0));
  if (!info) return error_of(std::move(info));
  auto memory = map_table(reply.fds().front().get(), *info);
  if (!memory) return error_of(std::move(memory));
  const auto table = ResultSegment::open(memory->data(), info->id);
  if (!table) return error_of(table);
  auto set =
      std::make_shared<ResultSetImpl>(std::move(connection), *std::move(info), *std::move(memory), *table);
  reply.keep();
  return set;
}

Result<ResultsInfo> ResultSetImpl::ask() const {
  return connection_->call<wire::Results>([&](Builder& b) { return wire::CreateWaitResults(b, info_.id); },
                                          take_info);
}

Result<ResultsInfo> ResultSetImpl::ask(Patience& patience, const Wait& wait) const {
  patience.next();
  return connection_->call<wire::Results>(
      patience,
      [&](Builder& b) {
        return wire::CreateWaitResults(b, info_.id, wait.seen, wait.settled, patience.wait_ms(),
                                       std::min(wait.pace_ms, patience.wait_ms()));
      },
      take_info);
}

Result<void> ResultSetImpl::cancel(bool forget) const {
  return connection_->call_done([&](Builder& b) { return wire::CreateCancelResults(b, info_.id, forget); });
}

Result<Slots> ResultSetImpl::lease(std::int64_t index, const Batch& batch, Milliseconds wait) {
  auto patience = connection_->patience(wait);
  for (;;) {
    patience.next();
    bool is_complete = false;
    auto slots = connection_->call<wire::Leased>(
        patience,
        [&](Builder& b) {
          return wire::CreateLeaseSlots(b, info_.id, index, std::min(batch.count, kMaxBatch), batch.is_shared,
                                        patience.wait_ms(), false);
        },
        [&](LeaseReply& reply) {
          is_complete = reply->complete();
          return take_slots(reply, nullptr);
        });
    if (!slots) return slots;
    if (!slots->empty()) connection_->watch_daemon();
    if (!slots->empty() || is_complete || index >= 0) return slots;
    if (patience.is_over()) {
      return cowmgr::fail(
          Errc::timed_out,
          fmt::format("no slot of result set {} became free in time; others hold all that are left",
                      printable(info_.name)));
    }
  }
}

// Of a dense set, `mapping` is this process's, or null for the one that the reply brings.
Result<Slots> ResultSetImpl::take_slots(LeaseReply& reply, std::shared_ptr<Mapping> mapping) {
  Slots slots;
  if (reply->slots() == nullptr || reply->slots()->size() == 0) return slots;
  if (!mapping && !info_.is_ragged) {
    auto mapped = mapping_for(reply);
    if (!mapped) return error_of(std::move(mapped));
    mapping = *std::move(mapped);
  }
  for (const auto* lease : *reply->slots()) {
    if (lease->slot() >= info_.slots)
      return cowmgr::fail(Errc::protocol_error, "the daemon leased a slot that the set does not have");
    slots.push_back(std::make_unique<SlotImpl>(shared_from_this(), *lease, mapping));
  }
  reply.keep();
  for (const auto& slot : slots) slot->hold();
  return slots;
}

Result<std::shared_ptr<Mapping>> ResultSetImpl::mapping_for(LeaseReply& reply) {
  {
    const std::lock_guard lock(pool_mutex());
    // The parent's mapping does not exist in a child (MADV_DONTFORK), though a copy of its slots does.
    if (std::exchange(generation_, fork_generation()) != fork_generation()) mapping_.reset();
    if (auto mapping = mapping_.lock()) return mapping;
  }
  if (reply.fds().size() != 1)
    return cowmgr::fail(Errc::protocol_error, "the daemon leased a slot without its memory");
  auto mapped =
      map_segment(reply.fds().front().get(), reply->segment_bytes(), data_end(info_), Access::read_write);
  if (!mapped) return error_of(std::move(mapped));
  auto mapping = std::make_shared<Mapping>(*std::move(mapped));
  const std::lock_guard lock(pool_mutex());
  if (auto others = mapping_.lock()) return others;  // another thread was faster
  mapping_ = mapping;
  return mapping;
}

bool ResultSetImpl::is_mapped() {
  const std::lock_guard lock(pool_mutex());
  return !mapping_.expired();
}

// Once every slot has ended, the daemon seals the set as soon as nobody has it mapped. Of several threads
// that end their slots at once, each may say that another still has it, and the one who has not may be heard
// before them. So whoever has `kept_mapping`, or said so, looks again when the daemon has heard it: nobody is
// heard later than the last of them. While the process holds a slot, the daemon knows better.
void ResultSetImpl::tell_unmapped(bool kept_mapping) {
  if (kept_mapping && !is_mapped())
    connection_->notify([&](Builder& b) { return wire::CreateUnmapped(b, info_.id); });
}

namespace {

std::vector<ResultSetImpl::Committed::Refusal> refusals_of(const wire::Leased& reply) {
  std::vector<ResultSetImpl::Committed::Refusal> refused;
  if (reply.refused() == nullptr) return refused;
  for (const auto* table : *reply.refused())
    refused.push_back(
        {table->slot(), {static_cast<Errc>(table->code()), std::string(view_of(table->message()))}});
  return refused;
}

// What a CommitSlots says of the slots.
struct CommitTable {
  std::vector<std::uint64_t> slots{};
  std::vector<std::uint32_t> attempts{};
  std::vector<std::uint32_t> sizes{};  // of a ragged set
  std::vector<std::uint8_t> values{};  // of a ragged set
};

CommitTable table_of(const Slots& done, bool is_ragged) {
  CommitTable table;
  for (const auto& slot : done) {
    table.slots.push_back(slot->index());
    table.attempts.push_back(slot->attempt());
    if (!is_ragged) continue;
    const auto& value = slot->value();
    table.sizes.push_back(slot->has_array() ? kArrayValue : static_cast<std::uint32_t>(value.size()));
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(value.data());
    table.values.insert(table.values.end(), bytes, bytes + value.size());
  }
  return table;
}

}  // namespace

Result<ResultSetImpl::Committed> ResultSetImpl::commit(Slots& done, const Batch& next, Milliseconds wait) {
  for (const auto& slot : done) {
    if (auto ok = slot->make_read_only(); !ok) return error_of(std::move(ok));
  }
  const CommitTable table = table_of(done, info_.is_ragged);
  std::shared_ptr<Mapping> mapping = done.empty() || next.count == 0 ? nullptr : done.front()->mapping_;
  for (const auto& slot : done) slot->mapping_.reset();
  const bool keeps_mapping = !info_.is_ragged && (next.count > 0 ? mapping != nullptr : is_mapped());
  bool is_under_way = false;
  const Limit limit = wait == kForever ? connection_->limit() : limit_of_wait(wait);
  auto committed = connection_->call<wire::Leased>(
      limit,
      [&](Builder& b) {
        is_under_way = true;
        return wire::CreateCommitSlotsDirect(
            b, info_.id, &table.slots, table.values.empty() ? nullptr : &table.values,
            table.sizes.empty() ? nullptr : &table.sizes, std::min(next.count, kMaxBatch), next.is_shared,
            keeps_mapping, &table.attempts);
      },
      [&](LeaseReply& reply) { return take_committed(reply, done, mapping); });
  if (!committed && committed.error().code == Errc::timed_out) {
    // It may be carried out yet: what it says of the slots must not be contradicted.
    if (is_under_way) std::ranges::for_each(done, [](const auto& slot) { slot->spend(); });
  } else if (committed && !committed->next.empty()) {
    connection_->watch_daemon();
  } else {
    mapping.reset();
    tell_unmapped(keeps_mapping);
  }
  return committed;
}

// What was not taken, and is still held, may be committed again; it is given back when its handle goes.
Result<ResultSetImpl::Committed> ResultSetImpl::take_committed(LeaseReply& reply, const Slots& done,
                                                               std::shared_ptr<Mapping>& mapping) {
  Committed committed;
  committed.refused = refusals_of(*reply);
  for (const auto& slot : done) {
    const auto refusal = std::find_if(committed.refused.begin(), committed.refused.end(),
                                      [&](const auto& one) { return one.slot == slot->index(); });
    if (refusal == committed.refused.end() || is_lost(refusal->error.code)) slot->spend();
  }
  auto taken = take_slots(reply, std::move(mapping));
  if (!taken) return error_of(std::move(taken));
  committed.next = *std::move(taken);
  return committed;
}

Result<void> ResultSetImpl::fail(SlotImpl& slot, std::string_view message, Retry retry) {
  if (auto ok = slot.check_usable(); !ok) return ok;
  slot.let_go();
  const bool keeps_mapping = is_mapped();
  auto failed = connection_->call_done([&](Builder& b) {
    return wire::CreateFailSlot(b, info_.id, slot.index(),
                                b.CreateString(message.data(), std::min(message.size(), kMaxReasonBytes)),
                                keeps_mapping, slot.attempt(), retry == Retry::never);
  });
  slot.spend();
  if (failed || failed.error().code != Errc::timed_out) tell_unmapped(keeps_mapping);
  return failed;
}

void ResultSetImpl::forget(std::uint64_t slot, std::uint32_t attempt) const noexcept {
  connection_->remove_slot(info_.id, slot, attempt);
}

void ResultSetImpl::give_back(SlotImpl& slot) noexcept {
  slot.spend();
  try {
    const bool keeps_mapping = is_mapped();
    Grants lease{.set = info_.id,
                 .slots = {slot.index()},
                 .attempts = {slot.attempt()},
                 .keeps_mapping = keeps_mapping};
    if (connection_->give_back(std::move(lease))) tell_unmapped(keeps_mapping);
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
}

Result<void> ResultSetImpl::allocate(SlotImpl& slot, const ArraySpec& spec) {
  if (auto ok = slot.check_usable(); !ok) return ok;
  if (!info_.is_ragged)
    return cowmgr::fail(Errc::invalid_argument,
                        "the slots of a dense set are rows of its array: write there");
  slot.allocation_.reset();
  return connection_->call<wire::Created>(
      [&](Builder& b) {
        return wire::CreateAllocateSlotDirect(b, info_.id, slot.index(), spec.dtype.str().c_str(),
                                              &spec.shape, order_of(spec.order), slot.attempt());
      },
      [&](auto& reply) { return slot.take_allocation(reply, spec); });
}

}  // namespace cowmgr::detail
