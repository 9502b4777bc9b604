// What a session says that it has, or has no more.
#include <set>

#include <fmt/format.h>

#include "daemon/requests/handlers.hpp"

namespace cowmgr {
namespace {

void note_views(Call& call, const flatbuffers::Vector<std::uint64_t>& ids) {
  for (const ArrayId id : ids) {
    if (!call.core.store.may_hold(call.session->id(), id)) continue;
    if (std::uint32_t& count = call.session->held().views[id]; count < UINT32_MAX) ++count;
  }
}

// What is not there was sealed, and the client does not know yet; what cannot go on its seal will tell.
void claim_writing(Call& call, const flatbuffers::Vector<Offset<wire::Writing>>& entries) {
  Store& store = call.core.store;
  const SessionId session = call.session->id();
  std::set<ArrayId> tried;
  for (const auto* writing : entries) {
    const ArrayId id = writing->id();
    if (writing->make() != nullptr && store.may_claim(session, id) && tried.insert(id).second) {
      const auto request = create_request_of(*writing->make(), order_of(writing->make()->order()));
      if (!request) continue;
      if (const auto claimed = store.claim(session, id, *request, Core::now()); !claimed)
        call.core.log.debug(call.session->peer().uid, [&] {
          return fmt::format("array #{} is not written on: {}", id, claimed.error().message);
        });
    }
    if (store.is_writing(session, id)) call.session->held().writing.insert(id);
  }
}

void note_slots(Call& call, const flatbuffers::Vector<Offset<wire::Holding>>& entries) {
  for (const auto* holding : entries) {
    if (size_of(holding->attempts()) != size_of(holding->slots())) continue;
    for (flatbuffers::uoffset_t at = 0; at < size_of(holding->slots()); ++at) {
      const SlotIndex slot = holding->slots()->Get(at);
      if (call.core.results.holds(call.session->id(), holding->set(), slot, holding->attempts()->Get(at)))
        call.session->held().slots.insert({holding->set(), slot});
    }
  }
}

}  // namespace

// A client that lost its daemon says what it views, writes and has leased, in several frames if it is much.
// What the session has beyond that, the client never heard of. Only what the session may claim is kept until
// the last frame: no more than there is.
Answer hold(Call& call, const wire::Hold& table) {
  if (table.ids() != nullptr) note_views(call, *table.ids());
  if (table.writing() != nullptr) claim_writing(call, *table.writing());
  if (table.slots() != nullptr) note_slots(call, *table.slots());
  if (table.is_last()) call.session->end_telling();
  co_return done(call);
}

// The views are in the request itself.
Answer release(Call& /*call*/, const wire::Release& /*table*/) {
  co_return Reply{};
}

void release_views(Call& call, const flatbuffers::Vector<std::uint64_t>& ids) {
  const Time now = Core::now();
  for (const ArrayId id : ids) call.core.store.release(call.session->id(), id, now);
}

}  // namespace cowmgr
