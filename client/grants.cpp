#include "client/grants.hpp"

#include <utility>

namespace cowmgr::detail {

Grants Grants::of(const wire::Request& request, const wire::Reply& reply) {
  using Asked = wire::RequestBody;
  const Asked asked = request.body_type();
  Grants grants;
  const auto* arrays = reply.body_as_Arrays();
  if (arrays != nullptr && arrays->arrays() != nullptr &&
      (asked == Asked::Attach || asked == Asked::SealArray)) {
    for (const auto* array : *arrays->arrays()) grants.views.push_back(array->id());
  }
  if (const auto* created = reply.body_as_Created(); created != nullptr && created->array() != nullptr)
    grants.array = created->array()->id();
  const auto* sets = reply.body_as_Results();
  if (sets != nullptr && sets->sets() != nullptr && sets->sets()->size() > 0 && asked == Asked::MakeResults)
    grants.made_set = sets->sets()->Get(0)->id();
  if (const auto* leased = reply.body_as_Leased(); leased != nullptr && leased->slots() != nullptr) {
    if (asked == Asked::LeaseSlots) grants.set = request.body_as_LeaseSlots()->set();
    if (asked == Asked::CommitSlots) grants.set = request.body_as_CommitSlots()->set();
    for (const auto* lease : *leased->slots()) {
      grants.slots.push_back(lease->slot());
      grants.attempts.push_back(lease->attempt());
    }
  }
  return grants;
}

Grants Grants::of_late(const wire::Request& request, const wire::Reply& reply) {
  Grants grants = of(request, reply);
  const auto note = [&](const auto* table) {
    if (table == nullptr || !table->mapped()) return;
    grants.set = table->set();
    grants.is_unmapped = true;
  };
  note(request.body_as_CommitSlots());
  note(request.body_as_FailSlot());
  note(request.body_as_GiveBackSlots());
  return grants;
}

bool Grants::finish_next(Channel& channel) {
  if (array == 0 && made_set == 0 && slots.empty() && !is_unmapped) return false;
  Builder& builder = channel.builder();
  if (array != 0) {
    channel.finish(wire::CreateAbortArray(builder, std::exchange(array, 0)));
  } else if (made_set != 0) {
    channel.finish(wire::CreateCancelResults(builder, std::exchange(made_set, 0), true));
  } else {
    // Another thread may have a later attempt by now.
    channel.finish(wire::CreateGiveBackSlotsDirect(builder, set, &slots, keeps_mapping, &attempts));
    slots.clear();
    attempts.clear();
    is_unmapped = false;
  }
  return true;
}

}  // namespace cowmgr::detail
