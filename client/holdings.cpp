#include "client/holdings.hpp"

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

Result<void> Holdings::tell(const std::function<Builder&()>& new_builder,
                            const std::function<Result<void>(Offset<wire::Hold>)>& send) const {
  Builder* builder = &new_builder();
  std::vector<std::uint64_t> ids;
  std::vector<Offset<wire::Writing>> writes;
  std::vector<Offset<wire::Holding>> holdings;
  const auto flush = [&](bool is_last) -> Result<void> {
    auto sent = send(wire::CreateHoldDirect(*builder, &ids, &writes, &holdings, is_last));
    if (!sent || is_last) return sent;
    ids.clear();
    writes.clear();
    holdings.clear();
    builder = &new_builder();
    return {};
  };
  const auto make_room = [&]() -> Result<void> {
    if (builder->GetSize() + ids.size() * sizeof(ids.front()) < kFrameBytes) return {};
    return flush(false);
  };
  for (const auto& [id, count] : views) {
    for (std::uint32_t i = 0; i < count; ++i) {
      if (auto ok = make_room(); !ok) return ok;
      ids.push_back(id);
    }
  }
  for (const auto& [id, request] : writing) {
    if (auto ok = make_room(); !ok) return ok;
    writes.push_back(wire::CreateWriting(*builder, id, pack(*builder, request)));
  }
  constexpr std::size_t kSlotsAtOnce = 1024;
  for (auto at = slots.begin(); at != slots.end();) {
    if (auto ok = make_room(); !ok) return ok;
    const std::uint64_t set = at->first.first;
    std::vector<std::uint64_t> indexes;
    std::vector<std::uint32_t> attempts;
    for (; at != slots.end() && at->first.first == set && indexes.size() < kSlotsAtOnce; ++at) {
      indexes.push_back(at->first.second);
      attempts.push_back(at->second);
    }
    holdings.push_back(wire::CreateHoldingDirect(*builder, set, &indexes, &attempts));
  }
  return flush(true);
}

}  // namespace cowmgr::detail
