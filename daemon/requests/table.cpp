#include "daemon/requests/table.hpp"

#include <array>

#include "daemon/requests/bounds.hpp"
#include "daemon/requests/handlers.hpp"

namespace cowmgr {
namespace {

using Body = wire::RequestBody;

struct Row {
  Result<void> (*check)(const wire::Request& request) = nullptr;  // null: it costs what its frame has
  Answer (*answer)(Call& call, const wire::Request& request) = nullptr;
};
using Table = std::array<Row, static_cast<std::size_t>(Body::MAX) + 1>;

template <class Request, Answer (*Handler)(Call&, const Request&)>
constexpr void add(Table& table) {
  Row& row = table[static_cast<std::size_t>(wire::RequestBodyTraits<Request>::enum_value)];
  row.answer = [](Call& call, const wire::Request& request) {
    return Handler(call, *request.body_as<Request>());
  };
}
template <class Request, Answer (*Handler)(Call&, const Request&), Result<void> (*Check)(const Request&)>
constexpr void add(Table& table) {
  add<Request, Handler>(table);
  Row& row = table[static_cast<std::size_t>(wire::RequestBodyTraits<Request>::enum_value)];
  row.check = [](const wire::Request& request) { return Check(*request.body_as<Request>()); };
}

constexpr Table kTable = [] {
  Table table{};
  add<wire::MakeArray, create_array>(table);
  add<wire::SealArray, seal_array>(table);
  add<wire::AbortArray, abort_array>(table);
  add<wire::Attach, attach, check_attach>(table);
  add<wire::Release, release>(table);
  add<wire::Evict, evict, check_evict>(table);
  add<wire::Pin, pin, check_pin>(table);
  add<wire::StatArray, stat_array>(table);
  add<wire::ListArrays, list_arrays>(table);
  add<wire::ListClients, list_clients>(table);
  add<wire::MakeResults, create_results>(table);
  add<wire::OpenResults, open_results>(table);
  add<wire::LeaseSlots, lease_slots>(table);
  add<wire::AllocateSlot, allocate_slot>(table);
  add<wire::CommitSlots, commit_slots, check_commit>(table);
  add<wire::FailSlot, fail_slot>(table);
  add<wire::GiveBackSlots, give_back_slots, check_give_back>(table);
  add<wire::Unmapped, unmapped>(table);
  add<wire::WaitResults, wait_results>(table);
  add<wire::CancelResults, cancel_results>(table);
  add<wire::ListResults, list_results>(table);
  add<wire::Ping, ping>(table);
  add<wire::Hold, hold, check_hold>(table);
  add<wire::Shutdown, shutdown>(table);
  return table;
}();

// The verifier lets unions of later schemas pass.
Row row_of(const wire::Request& request) {
  const auto at = static_cast<std::size_t>(request.body_type());
  return at < kTable.size() ? kTable[at] : Row();
}

Answer refusal(Error error) {
  co_return tl::unexpected(std::move(error));
}

}  // namespace

Result<void> check_bounds(const wire::Request& request) {
  const Row row = row_of(request);
  return row.check == nullptr ? Result<void>() : row.check(request);
}

Answer answer(Call& call, const wire::Request& request) {
  if (request.released() != nullptr) release_views(call, *request.released());
  const Row row = row_of(request);
  if (row.answer == nullptr)
    return refusal(
        {Errc::invalid_argument, "this daemon does not know that request; it may be older than the client"});
  if (auto ok = check_bounds(request); !ok) return refusal(std::move(ok).error());
  return row.answer(call, request);
}

}  // namespace cowmgr
