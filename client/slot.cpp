// One leased slot: its memory, until it is spent.
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr {
namespace detail {

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
  set_->forget(index_, attempt_);
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

}  // namespace cowmgr
