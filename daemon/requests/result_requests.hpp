// What a peer may ask of result sets; see requests.hpp.
#pragma once

#include "daemon/requests/requests.hpp"

namespace cowmgr {

[[nodiscard]] Answer create_results(Call& call, const wire::MakeResults& table);
[[nodiscard]] Answer open_results(Call& call, const wire::OpenResults& table);
[[nodiscard]] Answer lease_slots(Call& call, const wire::LeaseSlots& table);
[[nodiscard]] Answer allocate_slot(Call& call, const wire::AllocateSlot& table);
[[nodiscard]] Answer commit_slots(Call& call, const wire::CommitSlots& table);
[[nodiscard]] Answer fail_slot(Call& call, const wire::FailSlot& table);
[[nodiscard]] Answer give_back_slots(Call& call, const wire::GiveBackSlots& table);
[[nodiscard]] Answer unmapped(Call& call, const wire::Unmapped& table);
[[nodiscard]] Answer wait_results(Call& call, const wire::WaitResults& table);
[[nodiscard]] Answer cancel_results(Call& call, const wire::CancelResults& table);
[[nodiscard]] Answer list_results(Call& call, const wire::ListResults& table);

}  // namespace cowmgr
