#include "client/holdings.hpp"

#include <cstddef>
#include <new>
#include <vector>

namespace cowmgr::detail {
namespace {

constexpr std::size_t kFrameBytes = 64U << 10U;  // then the next frame begins: a dtype may take 4 KiB more

}  // namespace

WireSpec pack_spec(Builder& builder, std::string_view name, const ArraySpec& spec) {
  return {builder.CreateString(name.data(), name.size()), builder.CreateString(spec.dtype.str()),
          builder.CreateVector(spec.shape)};
}

Offset<wire::MakeArray> pack(Builder& builder, const WritingRequest& request) {
  const auto spec = pack_spec(builder, request.name, request.spec);
  return wire::CreateMakeArray(builder, spec.name, spec.dtype, spec.shape, order_of(request.spec.order),
                               request.options.replace, request.options.evictable, request.options.mode);
}

void Holdings::keep(Grants& granted, const WritingRequest* writing) {
  // A copy, as long as something can fail.
  std::map<std::uint64_t, WritingRequest> added;
  if (writing != nullptr) added.emplace(granted.array, *writing);
  std::size_t counted = 0;
  try {
    for (; counted < granted.views.size(); ++counted) ++views_[granted.views[counted]];
    for (std::size_t i = 0; i < granted.slots.size(); ++i)
      slots_.insert_or_assign({granted.set, granted.slots[i]}, granted.attempts[i]);
  } catch (const std::bad_alloc&) {
    for (std::size_t i = 0; i < counted; ++i) forget_view(granted.views[i]);
    for (std::size_t i = 0; i < granted.slots.size(); ++i)
      drop_slot(granted.set, granted.slots[i], granted.attempts[i]);
    throw;
  }
  writing_.merge(added);
  granted = {};
}

void Holdings::forget_view(std::uint64_t id) noexcept {
  if (const auto at = views_.find(id); at != views_.end() && --at->second == 0) views_.erase(at);
}

void Holdings::forget_writing(std::uint64_t id) noexcept {
  writing_.erase(id);
  ++ends_;
}

void Holdings::forget_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept {
  drop_slot(set, slot, attempt);
  ++ends_;
}

// This process may have leased the slot once more since.
void Holdings::drop_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept {
  if (const auto at = slots_.find({set, slot}); at != slots_.end() && at->second == attempt) slots_.erase(at);
}

namespace {

constexpr std::size_t kSlotsAtOnce = 1024;

// The requests that say what is held, one after the other.
class Telling {
 public:
  using NewBuilder = std::function<Builder&()>;
  using Send = std::function<Result<void>(Offset<wire::Hold>)>;
  Telling(const NewBuilder& new_builder, const Send& send)
      : new_builder_(new_builder), send_(send), builder_(&new_builder()) {}

  Result<void> add_view(std::uint64_t id) {
    auto ok = make_room();
    if (ok) views_.push_back(id);
    return ok;
  }
  Result<void> add_writing(std::uint64_t id, const WritingRequest& request) {
    auto ok = make_room();
    if (ok) writing_.push_back(wire::CreateWriting(*builder_, id, pack(*builder_, request)));
    return ok;
  }
  Result<void> add_slots(std::uint64_t set, const std::vector<std::uint64_t>& slots,
                         const std::vector<std::uint32_t>& attempts) {
    auto ok = make_room();
    if (ok) slots_.push_back(wire::CreateHoldingDirect(*builder_, set, &slots, &attempts));
    return ok;
  }
  Result<void> finish() { return send(true); }

 private:
  Result<void> make_room() {
    if (builder_->GetSize() + views_.size() * sizeof(views_.front()) < kFrameBytes) return {};
    return send(false);
  }
  Result<void> send(bool is_last) {
    auto sent = send_(wire::CreateHoldDirect(*builder_, &views_, &writing_, &slots_, is_last));
    if (!sent || is_last) return sent;
    views_.clear();
    writing_.clear();
    slots_.clear();
    builder_ = &new_builder_();
    return {};
  }

  const NewBuilder& new_builder_;
  const Send& send_;
  Builder* builder_;
  std::vector<std::uint64_t> views_;
  std::vector<Offset<wire::Writing>> writing_;
  std::vector<Offset<wire::Holding>> slots_;
};

}  // namespace

Result<void> Holdings::tell(const std::function<Builder&()>& builder,
                            const std::function<Result<void>(Offset<wire::Hold>)>& send) const {
  Telling telling(builder, send);
  for (const auto& [id, count] : views_) {
    for (std::uint32_t i = 0; i < count; ++i) {
      if (auto ok = telling.add_view(id); !ok) return ok;
    }
  }
  for (const auto& [id, request] : writing_) {
    if (auto ok = telling.add_writing(id, request); !ok) return ok;
  }
  for (auto at = slots_.begin(); at != slots_.end();) {
    const std::uint64_t set = at->first.first;
    std::vector<std::uint64_t> slots;
    std::vector<std::uint32_t> attempts;
    for (; at != slots_.end() && at->first.first == set && slots.size() < kSlotsAtOnce; ++at) {
      slots.push_back(at->first.second);
      attempts.push_back(at->second);
    }
    if (auto ok = telling.add_slots(set, slots, attempts); !ok) return ok;
  }
  return telling.finish();
}

}  // namespace cowmgr::detail
