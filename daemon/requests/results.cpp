// Result sets: made, found, waited for, ended. What their workers do is in slots.cpp.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/core/undo.hpp"
#include "daemon/requests/handlers.hpp"
#include "daemon/requests/making.hpp"
#include "daemon/requests/reply_room.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

using Topic = WaitKey::Topic;

// A set's segment starts with room for a few reasons, and grows as values come (slots.cpp).
constexpr std::uint64_t kFirstValueBytes = 4 * kPageBytes;

Reply results_reply(Call& call, const ResultSetRecord& set) {
  const std::vector<Offset<wire::ResultsInfo>> sets = {pack(call.builder, set)};
  return reply_of(wire::CreateResultsDirect(call.builder, &sets));
}

// With the segment of the slots, for the peer to read.
Reply opened_reply(Call& call, const ResultSetRecord& set) {
  call.fds = {set.memory.segment.reader.get()};
  return results_reply(call, set);
}

// ---- Making a set ----

std::vector<std::byte> bytes_of(const flatbuffers::Vector<std::uint8_t>* bytes) {
  if (bytes == nullptr) return {};
  const auto span = std::as_bytes(std::span(bytes->data(), bytes->size()));
  return {span.begin(), span.end()};
}

ResultTerms terms_of(const wire::MakeResults& table) {
  return {.slots = table.slots(),
          .is_ragged = table.ragged(),
          .is_detached = table.detached(),
          .limits = {.attempts = table.attempts(), .lease = std::chrono::milliseconds(table.lease_ms())},
          .queue = std::string(view_of(table.queue())),
          .token = table.token(),
          .job = bytes_of(table.job())};
}

Result<CreateRequest> request_of(const wire::MakeResults& table) {
  if (!table.ragged()) return create_request_of(table, Order::c);
  CreateRequest request{.name = std::string(view_of(table.name())),
                        .spec = {Dtype::of<std::uint8_t>(), {}},
                        .replace = table.replace(),
                        .mode = table.mode()};
  if (auto ok = check_name(request.name); !ok) return error_of(std::move(ok));
  return request;
}

// The segment for the slots of a new set, charged to its owner. What of it is in `memory` afterwards,
// whatever the outcome, the caller adds to the sets or discards.
asio::awaitable<Result<void>> make_slot_memory(Call& call, const ResultRecord& record,
                                               std::span<const std::byte> job, SlotMemory& memory) {
  Core& core = call.core;
  const uid_t owner = record.owner_uid;
  const ResultLayout layout = result_layout(record);
  const std::uint64_t size_bytes = std::min(layout.max_bytes, layout.values_offset + kFirstValueBytes);
  auto take = [&] { return core.store.take_room(owner, size_bytes); };
  auto room = co_await when_there_is_room(call, take);
  if (!room) co_return error_of(std::move(room));
  auto work = [session = call.session, &env = core.env, id = core.store.next_id(), size_bytes] {
    return env.create(id, size_bytes, "", {}, session->gone());
  };
  auto segment = co_await core.background.run_sized(size_bytes, owner, std::move(work));
  if (!segment) co_return not_backed(core, size_bytes, segment.error());
  memory.segment = *std::move(segment);
  memory.room = *std::move(room);
  if (call.session->gone()) co_return peer_gone(call);
  memory.segment.lease.reset();  // the daemon goes on writing to it
  auto mapping = Mapping::map(memory.segment.writer.get(), layout.max_bytes, Access::read_write);
  if (!mapping) co_return error_of(std::move(mapping));
  memory.mapping = *std::move(mapping);
  write_result_header(memory.mapping.data(), record, layout, job);
  co_return core.env.mark_slots(memory.segment);
}

// Makes the memory of a set's slots, and of both the set. Nothing that was looked at before is as it was when
// the memory is there: neither the name nor, of a dense set, the output array, which another connection of
// the session may have given up.
asio::awaitable<Result<const ResultSetRecord*>> make_set(Call& call, const ResultRecord& record,
                                                         const CreateRequest& request,
                                                         std::span<const std::byte> job) {
  Core& core = call.core;
  SlotMemory memory;
  const Undo unused([&core, &memory] {
    if (memory.segment.writer) core.store.discard(std::move(memory.room), std::move(memory.segment));
  });
  if (auto ok = co_await make_slot_memory(call, record, job, memory); !ok) co_return error_of(std::move(ok));
  auto is_free = core.results.check_name_is_free(call.session->id(), request.name, request.replace);
  if (!is_free) co_return error_of(std::move(is_free));
  co_return core.results.add(record, memory);
}

asio::awaitable<Result<const ResultSetRecord*>> make_dense(Call& call, const CreateRequest& request,
                                                           const ResultTerms& terms) {
  const auto array = co_await make_array(call, request);
  if (!array) co_return error_of(array);
  Undo output([&store = call.core.store, id = (*array)->id] { store.retire(id); });
  const ResultRecord record = ResultSets::record_of(call.session->id(), terms, **array);
  const auto made = co_await make_set(call, record, request, terms.job);
  if (made) output.keep();
  co_return made;
}

asio::awaitable<Result<const ResultSetRecord*>> make_ragged(Call& call, const CreateRequest& request,
                                                            const ResultTerms& terms) {
  const ResultRecord record =
      call.core.results.record_of(call.session->id(), terms, call.core.store.next_id(), request, Core::now());
  co_return co_await make_set(call, record, request, terms.job);
}

}  // namespace

Answer create_results(Call& call, const wire::MakeResults& table) {
  const auto request = request_of(table);
  if (!request) co_return error_of(request);
  const ResultTerms terms = terms_of(table);
  ResultSets& results = call.core.results;
  if (auto ok = ResultSets::check(*request, terms); !ok) co_return error_of(std::move(ok));
  if (const auto* made = call.is_again ? results.find_made(call.session->id(), terms.token) : nullptr)
    co_return opened_reply(call, *made);
  if (auto ok = results.check_name_is_free(call.session->id(), request->name, request->replace); !ok)
    co_return error_of(std::move(ok));
  Result<const ResultSetRecord*> made = nullptr;
  if (terms.is_ragged)
    made = co_await make_ragged(call, *request, terms);
  else
    made = co_await make_dense(call, *request, terms);
  if (!made) co_return error_of(made);
  const ResultSetRecord& set = **made;
  call.core.log.info(call.session->peer().uid, [&] {
    return fmt::format("result set {} (#{}, {} slots, {}) made by process {}", printable(set.name), set.id,
                       set.table.size(), terms.is_ragged ? "ragged" : format_size(set.data_bytes),
                       set.owner_pid);
  });
  const Reply reply = opened_reply(call, set);
  call.grants.set(set.id);
  co_return reply;
}

namespace {

Answer open_queued(Call& call, const wire::OpenResults& table) {
  const std::string queue(view_of(table.queue()));
  if (auto ok = check_name(queue); !ok) co_return error_of(std::move(ok));
  const Deadline deadline = deadline_after(table.wait_ms());
  const WaitKey key{Topic::queue, call.session->peer().uid, queue};
  for (bool is_late = table.wait_ms() == 0;;) {
    if (const auto* set = call.core.results.open_queued(call.session->id(), queue, Core::moment()))
      co_return opened_reply(call, *set);
    if (is_late)
      co_return fail(Errc::timed_out, fmt::format("no set of queue {} has a free slot", printable(queue)));
    const auto woken = co_await call.waiter.change(key, deadline);
    if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    is_late = woken == Waiter::Woken::deadline;
  }
}

}  // namespace

Answer open_results(Call& call, const wire::OpenResults& table) {
  if (size_of(table.queue()) > 0) co_return co_await open_queued(call, table);
  const std::string name(view_of(table.name()));
  if (auto ok = check_name(name); !ok) co_return error_of(std::move(ok));
  const Deadline deadline = deadline_after(table.wait_ms());
  const WaitKey key{Topic::array_name, 0, name};
  for (;;) {
    const auto set = call.core.results.open(call.session->id(), name);
    if (set && (*set)->state == ResultSetRecord::State::cancelled)
      co_return fail(Errc::cancelled,
                     fmt::format("result set {} was cancelled by its owner", printable(name)));
    if (set) co_return opened_reply(call, **set);
    if (set.error().code != Errc::not_found || table.wait_ms() == 0) co_return error_of(set);
    const auto woken = co_await call.waiter.change(key, deadline);
    if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    if (woken == Waiter::Woken::deadline) {
      co_return fail(Errc::timed_out, fmt::format("result set {} did not come within {} ms", printable(name),
                                                  table.wait_ms()));
    }
  }
}

// Answers when the set has ended, when more slots are settled than `settled`, or else, where that is not
// asked for, when anything changed since revision `seen` but not before `pace_ms` are over; or at the
// deadline.
Answer wait_results(Call& call, const wire::WaitResults& table) {
  const Deadline deadline = deadline_after(table.wait_ms());
  const Deadline pace = std::min(deadline, deadline_after(table.pace_ms()));
  const bool wants_settled = table.settled() != UINT64_MAX;
  for (bool is_late = table.wait_ms() == 0, is_paced = table.pace_ms() > 0;;) {
    const auto found = call.core.results.find(call.session->id(), table.set());
    if (!found) co_return error_of(found);
    const ResultSetRecord& set = **found;
    const bool has_changed = !wants_settled && !is_paced && set.revision != table.seen();
    if (is_late || set.table.settled() > table.settled() || has_changed ||
        (!set.is_open() && set.revision != table.seen()))
      co_return results_reply(call, set);
    const WaitKey key{wants_settled ? Topic::slot_settled
                      : is_paced    ? Topic::set_ended
                                    : Topic::set_changed,
                      table.set()};
    const Deadline end = is_paced ? pace : deadline;
    auto woken = Waiter::Woken::changed;
    if (wants_settled)
      woken = co_await call.waiter.count(key, table.settled(), end);
    else
      woken = co_await call.waiter.change(key, end);
    if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    if (woken != Waiter::Woken::deadline) continue;
    is_late = !is_paced || pace == deadline;
    is_paced = false;
  }
}

Answer cancel_results(Call& call, const wire::CancelResults& table) {
  const auto set = call.core.results.find(call.session->id(), table.set());
  if (!set && call.is_again && set.error().code == Errc::not_found) co_return done(call);  // so it is done
  if (!set) co_return error_of(set);
  const std::string name = (*set)->name;
  if (auto ok = call.core.results.cancel(call.session->id(), **set, table.forget()); !ok)
    co_return error_of(std::move(ok));
  const Peer& peer = call.session->peer();
  call.core.log.info(peer.uid, [&] {
    return fmt::format("result set {} (#{}) cancelled by process {}", printable(name), table.set(), peer.pid);
  });
  co_await call.core.reclaimer.reclaim_now();
  co_return done(call);
}

Answer list_results(Call& call, const wire::ListResults& table) {
  const std::size_t limit = page_limit(table.limit());
  const auto filter = filter_of(table.name(), table.pattern());
  if (!filter) co_return error_of(filter);
  const auto page = call.core.results.list(call.session->id(), *filter, table.after(), limit);
  Page<wire::ResultsInfo> sets(call.builder);
  const auto next = add_all(sets, page, [&](const auto& set) { return pack(call.builder, set); });
  co_return reply_of(wire::CreateResultsDirect(call.builder, &sets.items(), next));
}

}  // namespace cowmgr
