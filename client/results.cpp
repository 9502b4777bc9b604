#include "cowmgr/results.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace detail {
namespace {

constexpr std::size_t kMaxReasonBytes = 4096;  // of a failure's message: the daemon keeps no more

}  // namespace

// ---- ResultSetImpl ----

Result<ResultsInfo> ResultSetImpl::ask(std::uint64_t seen, std::uint32_t wait_ms) const {
  const auto reply = connection_->call<wire::Results>(
      [&](Builder& b) { return wire::CreateWaitResults(b, info_.id, seen, wait_ms); });
  if (!reply) return error_of(reply);
  if ((*reply)->sets() == nullptr || (*reply)->sets()->size() != 1)
    return cowmgr::fail(Errc::protocol_error, "the daemon's answer to a wait is malformed");
  return info_of(*(*reply)->sets()->Get(0));
}

Result<std::vector<std::unique_ptr<ArrayImpl>>> ResultSetImpl::attach() const {
  const std::vector<std::uint64_t> ids = {info_.id};
  const auto reply =
      connection_->call<wire::Arrays>([&](Builder& b) { return wire::CreateAttachDirect(b, nullptr, &ids); });
  if (!reply) return error_of(reply);
  return ArrayImpl::map_all(connection_, *reply, View::shared);
}

Result<std::unique_ptr<SlotImpl>> ResultSetImpl::lease(std::int64_t index, Milliseconds wait) {
  const Patience patience(wait);
  for (;;) {
    const std::uint32_t wait_ms = patience.next_ms();
    const auto reply = connection_->call<wire::Leased>(
        [&](Builder& b) { return wire::CreateLeaseSlot(b, info_.id, index, wait_ms, false); });
    if (!reply) return error_of(reply);
    if ((*reply)->slot() >= 0) return take_slot(*reply, nullptr);
    if ((*reply)->complete()) return std::unique_ptr<SlotImpl>();
    if (patience.is_over()) {
      return cowmgr::fail(
          Errc::timed_out,
          fmt::format("no slot of result set {} became free in time; others hold all that are left",
                      printable(info_.name)));
    }
  }
}

// A lease that cannot be used must be told back, or nobody else would get the slot.
Result<std::unique_ptr<SlotImpl>> ResultSetImpl::take_slot(const LeaseReply& reply,
                                                           std::shared_ptr<Mapping> mapping) {
  if (!mapping) {
    auto mapped = mapping_for(reply);
    if (!mapped) {
      const auto slot = static_cast<std::uint64_t>(reply->slot());
      (void)connection_->call<wire::Done>(
          [&](Builder& b) { return wire::CreateGiveBackSlot(b, info_.id, slot, false); });
      return error_of(std::move(mapped));
    }
    mapping = *std::move(mapped);
  }
  return std::make_unique<SlotImpl>(shared_from_this(), *reply, std::move(mapping));
}

Result<std::shared_ptr<Mapping>> ResultSetImpl::mapping_for(const LeaseReply& reply) {
  const std::lock_guard lock(mapping_mutex_);
  // The parent's mapping does not exist in a child (MADV_DONTFORK), though a copy of its slots does.
  if (std::exchange(generation_, fork_generation()) != fork_generation()) mapping_.reset();
  if (auto mapping = mapping_.lock()) return mapping;
  if (reply.fds().size() != 1)
    return cowmgr::fail(Errc::protocol_error, "the daemon leased a slot without its memory");
  auto mapped = Mapping::map(reply.fds().front().get(), reply->segment_bytes(), Access::read_write);
  if (!mapped) return error_of(std::move(mapped));
  auto mapping = std::make_shared<Mapping>(*std::move(mapped));
  mapping_ = mapping;
  return mapping;
}

// ---- SlotImpl ----

SlotImpl::SlotImpl(std::shared_ptr<ResultSetImpl> set, const wire::Leased& lease,
                   std::shared_ptr<Mapping> mapping)
    : set_(std::move(set)),
      index_(static_cast<std::uint64_t>(lease.slot())),
      attempt_(lease.attempt()),
      rows_{lease.begin(), lease.end()},
      mapping_(std::move(mapping)) {}

SlotImpl::~SlotImpl() {
  if (!mapping_) return;
  if (generation_ != fork_generation()) {
    // The writable mapping does not exist in a child (MADV_DONTFORK); something else may lie there by now.
    (void)new std::shared_ptr<Mapping>(std::move(mapping_));
    return;
  }
  give_back();
}

std::span<std::byte> SlotImpl::bytes() const noexcept {
  const auto& info = set_->info();
  const std::uint64_t rows = info.spec.shape.front();
  const std::uint64_t row_bytes = rows == 0 ? 0 : info.data_bytes / rows;
  return data_of(*mapping_, info.data_bytes).subspan(rows_.begin * row_bytes, rows_.count() * row_bytes);
}

// Drops this slot's hold on the mapping. Returns whether other slots of this process still have it.
bool SlotImpl::let_go() noexcept {
  mapping_.reset();
  const std::lock_guard lock(set_->mapping_mutex_);
  return !set_->mapping_.expired();
}

Result<void> SlotImpl::commit() {
  if (auto ok = check_process(generation_); !ok) return ok;
  if (!mapping_) return cowmgr::fail(Errc::already_committed, "this slot is spent");
  const std::lock_guard lock(set_->ending_);
  const bool is_mapped = let_go();
  const auto reply = set_->connection_->call<wire::Leased>(
      [&](Builder& b) { return wire::CreateCommitSlot(b, set_->info().id, index_, false, is_mapped); });
  if (!reply) return error_of(reply);
  return {};
}

Result<std::unique_ptr<SlotImpl>> SlotImpl::commit_and_take() {
  if (auto ok = check_process(generation_); !ok) return error_of(std::move(ok));
  if (!mapping_) return cowmgr::fail(Errc::already_committed, "this slot is spent");
  const std::lock_guard lock(set_->ending_);
  const auto reply = set_->connection_->call<wire::Leased>(
      [&](Builder& b) { return wire::CreateCommitSlot(b, set_->info().id, index_, true, true); });
  if (reply && (*reply)->slot() >= 0) return set_->take_slot(*reply, std::move(mapping_));
  if (!let_go())
    set_->connection_->notify([&](Builder& b) { return wire::CreateUnmapped(b, set_->info().id); });
  if (!reply) return error_of(reply);
  return std::unique_ptr<SlotImpl>();
}

Result<void> SlotImpl::fail(std::string_view message) {
  if (auto ok = check_process(generation_); !ok) return ok;
  if (!mapping_) return cowmgr::fail(Errc::already_committed, "this slot is spent");
  const std::lock_guard lock(set_->ending_);
  const bool is_mapped = let_go();
  const auto reply = set_->connection_->call<wire::Done>([&](Builder& b) {
    return wire::CreateFailSlot(b, set_->info().id, index_,
                                b.CreateString(message.data(), std::min(message.size(), kMaxReasonBytes)),
                                is_mapped);
  });
  if (!reply) return error_of(reply);
  return {};
}

void SlotImpl::give_back() noexcept {
  const std::lock_guard lock(set_->ending_);
  const bool is_mapped = let_go();
  (void)set_->connection_->call<wire::Done>(
      [&](Builder& b) { return wire::CreateGiveBackSlot(b, set_->info().id, index_, is_mapped); });
}

}  // namespace detail

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
Result<void> Slot::commit() {
  return impl_->commit();
}
Result<void> Slot::fail(std::string_view message) {
  return impl_->fail(message);
}

Result<std::optional<Slot>> Slot::commit_and_lease(Milliseconds wait) {
  auto next = impl_->commit_and_take();
  if (next && !*next) next = impl_->set()->lease(-1, wait);
  if (!next) return error_of(std::move(next));
  if (!*next) return std::optional<Slot>();
  return Slot(*std::move(next));
}

// ---- ResultSet ----

const std::string& ResultSet::name() const noexcept {
  return impl_->info().name;
}
const ArraySpec& ResultSet::spec() const noexcept {
  return impl_->info().spec;
}
std::uint64_t ResultSet::slots() const noexcept {
  return impl_->info().slots;
}
Result<ResultsInfo> ResultSet::info() const {
  return impl_->ask(0, 0);
}

Result<std::optional<Slot>> ResultSet::lease(Milliseconds wait) {
  auto slot = impl_->lease(-1, wait);
  if (!slot) return error_of(std::move(slot));
  if (!*slot) return std::optional<Slot>();
  return Slot(*std::move(slot));
}

Result<Slot> ResultSet::lease_slot(std::uint64_t index) {
  if (index >= slots()) {
    return fail(Errc::not_found,
                fmt::format("there is no slot {}; result set {} has {}", index, printable(name()), slots()));
  }
  auto slot = impl_->lease(static_cast<std::int64_t>(index), Milliseconds{0});
  if (!slot) return error_of(std::move(slot));
  COWMGR_ASSERT(*slot != nullptr);  // a slot that was asked for by its index is leased or refused
  return Slot(*std::move(slot));
}

namespace {

Error unfinished(const ResultsInfo& info) {
  std::string who;
  for (const pid_t pid : info.holders) who += fmt::format("{}{}", who.empty() ? "process " : ", ", pid);
  if (info.state == ResultsState::sealing && !info.message.empty())
    return {Errc::still_writable, info.message};
  return {Errc::timed_out,
          fmt::format("result set {} is not finished: {} of {} slots committed, {} leased, {} free{}",
                      printable(info.name), info.committed, info.slots, info.leased, info.free,
                      who.empty() ? "" : "; mapped for writing by " + who)};
}

}  // namespace

Result<Array> ResultSet::wait(Milliseconds wait, const std::function<void(const ResultsInfo&)>& progress) {
  const detail::Patience patience(wait);
  std::uint64_t seen = 0;
  for (;;) {
    const auto info = impl_->ask(seen, patience.next_ms());
    if (!info) return error_of(info);
    if (progress && info->revision != seen) progress(*info);
    seen = info->revision;
    if (info->state == ResultsState::failed) return fail(Errc::slot_failed, info->message);
    if (info->state == ResultsState::done) break;
    if (patience.is_over()) return tl::unexpected(unfinished(*info));
  }
  auto arrays = impl_->attach();
  if (!arrays) return error_of(std::move(arrays));
  if (arrays->size() != 1) return fail(Errc::protocol_error, "the daemon's answer to an attach is malformed");
  return Array(std::move(arrays->front()));
}

}  // namespace cowmgr
