// What a peer may ask for: one function for each request of the schema. The table (table.cpp) says which,
// what each may cost, and what the next daemon makes of it.
#pragma once

#include "daemon/requests/call.hpp"

namespace cowmgr {

// ---- arrays.cpp ----
[[nodiscard]] Answer create_array(Call& call, const wire::MakeArray& table);
[[nodiscard]] Answer seal_array(Call& call, const wire::SealArray& table);
[[nodiscard]] Answer abort_array(Call& call, const wire::AbortArray& table);
[[nodiscard]] Answer attach(Call& call, const wire::Attach& table);
[[nodiscard]] Answer evict(Call& call, const wire::Evict& table);
[[nodiscard]] Answer pin(Call& call, const wire::Pin& table);

// ---- hold.cpp: what a session says that it has, or has no more ----
[[nodiscard]] Answer hold(Call& call, const wire::Hold& table);
[[nodiscard]] Answer release(Call& call, const wire::Release& table);
// Of any request: views that the session gives up with it.
void release_views(Call& call, const flatbuffers::Vector<std::uint64_t>& ids);

// ---- looking.cpp ----
[[nodiscard]] Answer stat_array(Call& call, const wire::StatArray& table);
[[nodiscard]] Answer list_arrays(Call& call, const wire::ListArrays& table);
[[nodiscard]] Answer list_clients(Call& call, const wire::ListClients& table);
[[nodiscard]] Answer ping(Call& call, const wire::Ping& table);
[[nodiscard]] Answer shutdown(Call& call, const wire::Shutdown& table);

// ---- results.cpp ----
[[nodiscard]] Answer create_results(Call& call, const wire::MakeResults& table);
[[nodiscard]] Answer open_results(Call& call, const wire::OpenResults& table);
[[nodiscard]] Answer wait_results(Call& call, const wire::WaitResults& table);
[[nodiscard]] Answer cancel_results(Call& call, const wire::CancelResults& table);
[[nodiscard]] Answer list_results(Call& call, const wire::ListResults& table);

// ---- slots.cpp ----
[[nodiscard]] Answer lease_slots(Call& call, const wire::LeaseSlots& table);
[[nodiscard]] Answer allocate_slot(Call& call, const wire::AllocateSlot& table);
[[nodiscard]] Answer commit_slots(Call& call, const wire::CommitSlots& table);
[[nodiscard]] Answer fail_slot(Call& call, const wire::FailSlot& table);
[[nodiscard]] Answer give_back_slots(Call& call, const wire::GiveBackSlots& table);
[[nodiscard]] Answer unmapped(Call& call, const wire::Unmapped& table);

}  // namespace cowmgr
