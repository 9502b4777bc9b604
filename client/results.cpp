#include "cowmgr/results.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace detail {
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

// ---- ResultSetImpl ----

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
  Patience patience(*connection_, wait);
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

// Whether a refusal means that the slot is not this session's any more.
bool is_lost(Errc code) {
  return code == Errc::not_holder || code == Errc::already_committed || code == Errc::slot_failed ||
         code == Errc::not_found;
}

}  // namespace

Result<ResultSetImpl::Committed> ResultSetImpl::commit(Slots& done, const Batch& next, Milliseconds wait) {
  std::vector<std::uint64_t> slots;
  std::vector<std::uint32_t> attempts;
  std::vector<std::uint32_t> sizes;
  std::vector<std::uint8_t> values;
  for (const auto& slot : done) {
    if (auto ok = slot->make_read_only(); !ok) return error_of(std::move(ok));
    slots.push_back(slot->index());
    attempts.push_back(slot->attempt());
    if (!info_.is_ragged) continue;
    sizes.push_back(slot->allocation_ ? kArrayValue : static_cast<std::uint32_t>(slot->value_.size()));
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(slot->value_.data());
    values.insert(values.end(), bytes, bytes + slot->value_.size());
  }
  std::shared_ptr<Mapping> mapping = done.empty() ? nullptr : done.front()->mapping_;
  for (const auto& slot : done) slot->mapping_.reset();
  if (next.count == 0) mapping.reset();
  const bool keeps_mapping = !info_.is_ragged && (next.count > 0 ? mapping != nullptr : is_mapped());
  bool is_under_way = false;
  const Limit limit = wait == kForever ? connection_->limit() : limit_of_wait(wait);
  auto committed = connection_->call<wire::Leased>(
      limit,
      [&](Builder& b) {
        is_under_way = true;
        return wire::CreateCommitSlotsDirect(
            b, info_.id, &slots, values.empty() ? nullptr : &values, sizes.empty() ? nullptr : &sizes,
            std::min(next.count, kMaxBatch), next.is_shared, keeps_mapping, &attempts);
      },
      [&](LeaseReply& reply) { return take_committed(reply, done, mapping); });
  if (!committed && committed.error().code == Errc::timed_out) {
    // It may be carried out yet: what it says of the slots must not be contradicted.
    if (is_under_way) {
      for (const auto& slot : done) slot->spend();
    }
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

void ResultSetImpl::forget(std::uint64_t slot) const noexcept {
  connection_->remove_slot(info_.id, slot);
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

// ---- SlotImpl ----

SlotImpl::SlotImpl(std::shared_ptr<ResultSetImpl> set, const wire::SlotLease& lease,
                   std::shared_ptr<Mapping> mapping)
    : set_(std::move(set)), index_(lease.slot()), attempt_(lease.attempt()), mapping_(std::move(mapping)) {}

Result<void> SlotImpl::take_allocation(Connection::Reply<wire::Created>& reply, const ArraySpec& spec) {
  if (reply->array() == nullptr || reply.fds().size() != 2)
    return cowmgr::fail(Errc::protocol_error, "the daemon's answer to an allocation is malformed");
  auto info = info_of(*reply->array());
  if (!info) return error_of(std::move(info));
  if (info->data_bytes != data_bytes(spec).value_or(0))
    return cowmgr::fail(Errc::protocol_error, "the daemon made another array than was asked for");
  auto mapped = map_segment(reply.fds()[0].get(), info->segment_bytes, data_end(*info), Access::read_write);
  if (!mapped) return error_of(std::move(mapped));
  reply.keep();
  allocation_.emplace(Allocation{*std::move(info), *std::move(mapped), std::move(reply.fds()[1])});
  return {};
}

SlotImpl::~SlotImpl() {
  if (is_spent_) return;
  if (generation_ != fork_generation()) {
    // Writable mappings do not exist in a child (MADV_DONTFORK); something else may lie there by now.
    (void)new std::shared_ptr<Mapping>(std::move(mapping_));
    if (allocation_) (void)new Mapping(std::move(allocation_->mapping));
    return;
  }
  set_->give_back(*this);
}

Result<void> SlotImpl::check_usable() const {
  if (auto ok = check_process(generation_); !ok) return ok;
  if (is_spent_) return cowmgr::fail(Errc::already_committed, "this slot is spent");
  return {};
}

// The memory goes, the array included that was not committed; the handle stays, and the slot is still leased.
void SlotImpl::let_go() noexcept {
  mapping_.reset();
  allocation_.reset();
  value_.clear();
}

void SlotImpl::spend() noexcept {
  is_spent_ = true;
  let_go();
  set_->forget(index_);
}

Rows SlotImpl::rows() const noexcept {
  const auto& info = set_->info();
  if (info.is_ragged) return {};
  return rows_of_slot(info.spec.shape.front(), info.slots, index_);
}

const Dtype& SlotImpl::dtype() const noexcept {
  return allocation_ ? allocation_->info.spec.dtype : set_->info().spec.dtype;
}

std::span<std::byte> SlotImpl::bytes() const noexcept {
  if (allocation_) return data_of(allocation_->mapping, allocation_->info);
  if (!mapping_) return {};
  const auto& info = set_->info();
  const std::uint64_t rows_in_all = info.spec.shape.front();
  const std::uint64_t row_bytes = rows_in_all == 0 ? 0 : info.data_bytes / rows_in_all;
  const Rows mine = rows();
  return data_of(*mapping_, info).subspan(mine.begin * row_bytes, mine.count() * row_bytes);
}

Result<void> SlotImpl::set_value(std::span<const std::byte> value) {
  if (auto ok = check_usable(); !ok) return ok;
  if (!set_->info().is_ragged)
    return cowmgr::fail(Errc::invalid_argument,
                        "the slots of a dense set are rows of its array: write there");
  if (value.size() > kMaxValueBytes) {
    return cowmgr::fail(Errc::invalid_argument,
                        fmt::format("a slot's value has at most {} bytes, not {}; allocate an array for more",
                                    kMaxValueBytes, value.size()));
  }
  allocation_.reset();
  value_.assign(value.begin(), value.end());
  return {};
}

Result<void> SlotImpl::make_read_only() {
  if (!allocation_ || !allocation_->reader) return {};
  if (auto ok = allocation_->mapping.make_read_only(allocation_->reader.get()); !ok) return ok;
  allocation_->reader.reset();
  return {};
}

}  // namespace detail

namespace {

constexpr std::uint32_t kMostAtOnce = 64;                      // slots that work() takes at once
constexpr auto kBatchTime = std::chrono::milliseconds(1);      // that they may take together
constexpr std::size_t kMaxBatchBytes = std::size_t{48} << 10;  // of values, before they are committed early
constexpr std::size_t kMaxCommit = 512;    // slots at once: earlier daemons cannot tell of more refusals
constexpr std::uint32_t kMostLosses = 10;  // attempts of a slot that may lose their daemon
constexpr std::uint32_t kPaceMs = 50;      // between two calls of a progress function

}  // namespace

// ---- Slot ----

Slot::Slot(std::unique_ptr<detail::SlotImpl> impl) noexcept : impl_(std::move(impl)) {}
Slot::Slot(Slot&&) noexcept = default;
Slot& Slot::operator=(Slot&&) noexcept = default;
Slot::~Slot() = default;

std::uint64_t Slot::index() const noexcept {
  return impl_->index();
}
std::uint32_t Slot::attempt() const noexcept {
  return impl_->attempt();
}
Rows Slot::rows() const noexcept {
  return impl_->rows();
}
std::span<std::byte> Slot::bytes() const noexcept {
  return impl_->bytes();
}
const Dtype& Slot::dtype() const noexcept {
  return impl_->dtype();
}
Result<void> Slot::allocate(const ArraySpec& spec) {
  return impl_->set()->allocate(*impl_, spec);
}
Result<void> Slot::set_value(std::span<const std::byte> value) {
  return impl_->set_value(value);
}
Result<void> Slot::fail(NameRef message, Retry retry) {
  return impl_->set()->fail(*impl_, message, retry);
}

namespace {

// Commits one slot by itself, which stays behind its handle.
Result<detail::ResultSetImpl::Committed> commit_one(std::unique_ptr<detail::SlotImpl>& slot,
                                                    std::uint32_t next, Milliseconds wait = kForever) {
  if (auto ok = slot->check_usable(); !ok) return error_of(std::move(ok));
  const auto set = slot->set();
  detail::Slots done;
  done.push_back(std::move(slot));
  auto committed = set->commit(done, {.count = next}, wait);
  slot = std::move(done.front());
  if (committed && !committed->refused.empty()) return tl::unexpected(committed->refused.front().error);
  return committed;
}

}  // namespace

Result<void> Slot::commit() {
  const auto committed = commit_one(impl_, 0);
  if (!committed) return error_of(committed);
  return {};
}

Result<std::optional<Slot>> Slot::commit_and_lease(Milliseconds wait) {
  auto committed = commit_one(impl_, 1, wait);
  if (!committed) return error_of(std::move(committed));
  if (!committed->next.empty()) return Slot(std::move(committed->next.front()));
  auto next = impl_->set()->lease(-1, {}, wait);
  if (!next) return error_of(std::move(next));
  if (next->empty()) return std::optional<Slot>();
  return Slot(std::move(next->front()));
}

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

namespace {

Result<void> run(const ResultSet::Task& task, Slot& slot) {
  try {
    return task(slot);
  } catch (const std::exception& error) {
    return fail(Errc::slot_failed, error.what());
  } catch (...) {
    return fail(Errc::slot_failed, "the task threw something that is no std::exception");
  }
}

// Whether a task that ended with `error` has not failed: the daemon that it needed went away.
bool may_be_tried_again(const Error& error, const Slot& slot) {
  return error.code == Errc::disconnected && slot.attempt() < kMostLosses;
}

// Slots that were not taken although they are still held, as when their memory cannot be sealed.
void fail_refused(detail::Slots& done, const detail::ResultSetImpl::Committed& committed) {
  for (const auto& refusal : committed.refused) {
    const auto at = std::find_if(done.begin(), done.end(),
                                 [&](const auto& slot) { return slot->index() == refusal.slot; });
    if (at != done.end() && (*at)->check_usable())
      (void)(*at)->set()->fail(**at, refusal.error.message, Retry::allowed);
  }
}

// How many slots to take at once, from how long the last ones took.
class BatchSize {
 public:
  explicit BatchSize(const WorkOptions& options) : fixed_(options.batch) {}
  [[nodiscard]] detail::ResultSetImpl::Batch next() const {
    return {.count = fixed_ > 0 ? fixed_ : count_, .is_shared = fixed_ == 0};
  }
  void learn(std::size_t slots, std::chrono::nanoseconds took) {
    const auto each = std::max<std::int64_t>(took.count() / static_cast<std::int64_t>(slots), 1);
    const auto fitting =
        std::min<std::int64_t>(std::chrono::nanoseconds(kBatchTime).count() / each, kMostAtOnce);
    count_ = std::clamp<std::uint32_t>(static_cast<std::uint32_t>(fitting), 1, count_ * 2);
  }

 private:
  std::uint32_t fixed_;
  std::uint32_t count_ = 1;
};

}  // namespace

Result<std::uint64_t> ResultSet::work(const Task& task, const WorkOptions& options) {
  BatchSize size(options);
  std::uint64_t total = 0;
  const auto lease = [&]() -> Result<detail::Slots> {
    auto slots = impl_->lease(-1, size.next(), options.wait);
    if (!slots && slots.error().code == Errc::timed_out) return detail::Slots();
    return slots;
  };
  auto todo = lease();
  while (todo && !todo->empty()) {
    detail::Slots done;
    std::size_t done_bytes = 0;
    const auto commit = [&](const detail::ResultSetImpl::Batch& next) {
      auto committed = impl_->commit(done, next);
      if (committed) total += done.size() - committed->refused.size();
      if (committed) fail_refused(done, *committed);
      done.clear();
      done_bytes = 0;
      return committed;
    };
    const auto start = std::chrono::steady_clock::now();
    for (auto& impl : *todo) {
      Slot slot(std::move(impl));
      if (const auto ok = run(task, slot); !ok) {
        if (may_be_tried_again(ok.error(), slot)) continue;  // its end gives it back
        const auto failed = slot.fail(ok.error().message, options.retry);
        if (!failed && failed.error().code != Errc::not_holder) return error_of(failed);
        continue;
      }
      if (!slot.impl_->check_usable()) continue;  // the task has ended it itself
      const bool is_full =
          done.size() == kMaxCommit || done_bytes + slot.impl_->value().size() > kMaxBatchBytes;
      if (is_full && !done.empty()) {
        if (const auto committed = commit({.count = 0}); !committed) return error_of(committed);
      }
      done_bytes += slot.impl_->value().size();
      done.push_back(std::move(slot.impl_));
    }
    size.learn(todo->size(), std::chrono::steady_clock::now() - start);
    auto committed = commit(size.next());
    if (!committed) return error_of(std::move(committed));
    todo = std::move(committed->next);
    if (todo->empty()) todo = lease();
  }
  if (!todo) return error_of(std::move(todo));
  return total;
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
