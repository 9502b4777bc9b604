#include "daemon/result_requests.hpp"

#include <algorithm>
#include <fcntl.h>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using Topic = WaitKey::Topic;

// A set's segment starts with room for a few reasons, and grows by as much as it has, within these bounds.
constexpr std::uint64_t kFirstValueBytes = 4 * kPageBytes;
constexpr std::uint64_t kLeastGrowth = std::uint64_t{1} << 20;
constexpr std::uint64_t kMostGrowth = std::uint64_t{64} << 20;

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

// The segment for the slots of a new set, charged to its owner.
asio::awaitable<Result<SlotMemory>> make_slot_memory(Call& call, const ResultRecord& record,
                                                     std::span<const std::byte> job) {
  Core& core = call.core;
  const uid_t owner = record.owner_uid;
  const ResultLayout layout = result_layout(record);
  const std::uint64_t size_bytes = std::min(layout.max_bytes, layout.values_offset + kFirstValueBytes);
  auto charge = [&] { return core.store.charge_segment(owner, size_bytes); };
  const auto charged = co_await when_there_is_room(call, charge);
  if (!charged) co_return error_of(charged);
  auto work = [session = call.session, &env = core.env, id = core.store.next_id(), size_bytes] {
    return env.create(id, size_bytes, "", {}, session->gone());
  };
  auto segment = co_await core.offload(std::move(work));
  if (!segment) {
    core.store.release_segment(owner, size_bytes);
    co_return not_backed(core, size_bytes, segment.error());
  }
  segment->lease.reset();  // the daemon goes on writing to it
  auto mapping = Mapping::map(segment->writer.get(), layout.max_bytes, Access::read_write);
  if (!mapping || call.session->gone()) {
    core.store.discard(owner, *std::move(segment));
    core.settle();
    if (!mapping) co_return error_of(std::move(mapping));
    co_return peer_gone(call);
  }
  write_result_header(mapping->data(), record, layout, job);
  if (auto marked = core.env.mark_slots(*segment); !marked) {
    core.store.discard(owner, *std::move(segment));
    core.settle();
    co_return error_of(std::move(marked));
  }
  co_return SlotMemory{*std::move(segment), *std::move(mapping)};
}

asio::awaitable<Result<const ResultSetRecord*>> make_dense(Call& call, const CreateRequest& request,
                                                           const ResultTerms& terms) {
  const auto array = co_await make_array(call, request);
  if (!array) co_return error_of(array);
  const ArrayId id = (*array)->id;
  const ResultRecord described = ResultSets::record_of(call.session->id(), terms, **array);
  auto memory = co_await make_slot_memory(call, described, terms.job);
  if (!memory) {
    call.core.store.retire(id);
    call.core.settle();
    co_return error_of(std::move(memory));
  }
  // The array goes with its session, which make_slot_memory() has looked at.
  co_return &call.core.results.add(described, *std::move(memory));
}

asio::awaitable<Result<const ResultSetRecord*>> make_ragged(Call& call, const CreateRequest& request,
                                                            const ResultTerms& terms) {
  const ResultRecord record =
      call.core.results.record_of(call.session->id(), terms, call.core.store.next_id(), request, Core::now());
  auto memory = co_await make_slot_memory(call, record, terms.job);
  if (!memory) co_return error_of(std::move(memory));
  const SessionId session = call.session->id();
  // Somebody may have been faster while the memory was made.
  if (auto ok = call.core.results.check_name_is_free(session, request.name, request.replace); !ok) {
    call.core.store.discard(call.session->peer().uid, std::move(memory->segment));
    co_return error_of(std::move(ok));
  }
  co_return &call.core.results.add(record, *std::move(memory));
}

// ---- Room for values ----

// How long the segment shall be, so that it takes `size_bytes` more than now.
std::uint64_t grown_bytes(const ResultSetRecord& set, std::uint64_t size_bytes) {
  const std::uint64_t now = set.table.backed_bytes();
  const std::uint64_t more = std::max(std::clamp(set.table.value_bytes(), kLeastGrowth, kMostGrowth),
                                      (size_bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
  return std::min(now + more, set.table.max_bytes());
}

// Makes the set's segment longer. The set may be gone when this is done.
asio::awaitable<Result<void>> grow(Call& call, ArrayId id, std::uint64_t new_bytes) {
  Core& core = call.core;
  const ResultSetRecord* set = core.results.get(id);
  const uid_t owner = set->owner.uid;
  const std::uint64_t more = new_bytes - set->memory.segment.size_bytes;
  auto segment = std::make_shared<Segment>(
      Segment{.name = set->memory.segment.name, .size_bytes = set->memory.segment.size_bytes});
  if (auto ok = check_descriptors(); !ok) co_return ok;
  segment->writer = UniqueFd(::fcntl(set->memory.segment.writer.get(), F_DUPFD_CLOEXEC, 0));
  if (!segment->writer) co_return tl::unexpected(os_error("fcntl(F_DUPFD_CLOEXEC)", segment->name, errno));
  auto charge = [&] { return core.store.charge_growth(owner, more); };
  if (const auto charged = co_await when_there_is_room(call, charge); !charged) co_return error_of(charged);
  auto work = [&env = core.env, segment, new_bytes] { return env.grow(*segment, new_bytes); };
  const auto grown = co_await core.offload(std::move(work));
  ResultSetRecord* still = core.results.get(id);
  const bool is_over = still == nullptr || still->state == ResultSetRecord::State::cancelled;
  if (!grown || is_over) {
    core.store.release_growth(owner, more);
    if (!grown) co_return not_backed(core, more, grown.error());
    co_return Result<void>();
  }
  still->memory.segment.size_bytes = new_bytes;
  still->table.extend(new_bytes);
  co_return Result<void>();
}

// Waits until the set has room for values of `size_bytes`, or is as large as it may ever be: a slot that is
// not settled has its room then. Errors: as find_to_work(), out_of_memory, quota_exceeded.
asio::awaitable<Result<ResultSetRecord*>> with_value_room(Call& call, ArrayId id, std::uint64_t size_bytes) {
  Core& core = call.core;
  const WaitKey key{Topic::set_changed, id};  // not in the co_await: gcc 12 destroys temporaries there twice
  for (;;) {
    const auto set = core.results.find_to_work(call.session->id(), id);
    if (!set || (*set)->table.room_bytes() >= size_bytes) co_return set;
    if ((*set)->table.backed_bytes() == (*set)->table.max_bytes()) co_return set;
    if ((*set)->is_growing) {
      const auto woken = co_await call.channel.wait_change(key, Deadline::max());
      if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
      continue;
    }
    (*set)->is_growing = true;
    const auto grown = co_await grow(call, id, grown_bytes(**set, size_bytes));
    if (ResultSetRecord* still = core.results.get(id)) still->is_growing = false;
    core.waits.wake(key);
    if (call.session->gone()) co_return peer_gone(call);
    if (!grown) co_return error_of(grown);
  }
}

// ---- Leasing and committing ----

// The writable descriptor of a dense set goes with a lease unless the client has the set mapped already.
Reply lease_reply(Call& call, const ResultSetRecord& set, std::span<const ResultSets::Lease> leases,
                  bool is_mapped, const std::vector<Offset<wire::Refusal>>& refused = {}) {
  std::vector<wire::SlotLease> slots;
  for (const auto& lease : leases) {
    slots.emplace_back(lease.slot, lease.attempt);
    call.leases.emplace_back(set.id, lease.slot);
  }
  if (!leases.empty() && !is_mapped && !set.terms.is_ragged)
    call.fds = {call.core.store.find(set.id)->segment.writer.get()};
  return reply_of(
      wire::CreateLeasedDirect(call.builder, &slots, set.table.is_settled() || !set.is_open(),
                               set.terms.is_ragged ? 0 : segment_bytes(set.data_bytes, set.data_offset),
                               refused.empty() ? nullptr : &refused));
}

std::uint64_t batch_of(std::uint32_t asked) {
  return std::clamp<std::uint64_t>(asked, 1, kMaxBatch);
}

// What a request to commit says of each slot.
struct Commit {
  SlotIndex slot = 0;
  std::uint32_t attempt = 0;  // 0: whichever is under way
  bool is_array = false;
  std::span<const std::byte> value{};
};

Result<std::vector<Commit>> commits_of(const wire::CommitSlots& table) {
  std::vector<Commit> commits;
  const std::size_t count = size_of(table.slots());
  const auto* sizes = table.value_bytes();
  const auto* attempts = table.attempts();
  if ((sizes != nullptr && sizes->size() != count) || (attempts != nullptr && attempts->size() != count))
    return fail(Errc::invalid_argument, "commit slots with a value each or with none");
  std::span<const std::byte> rest;
  if (table.values() != nullptr)
    rest = std::as_bytes(std::span(table.values()->data(), table.values()->size()));
  for (flatbuffers::uoffset_t i = 0; i < count; ++i) {
    Commit commit{.slot = table.slots()->Get(i), .attempt = attempts == nullptr ? 0 : attempts->Get(i)};
    const std::uint32_t size_bytes = sizes == nullptr ? 0 : sizes->Get(i);
    commit.is_array = size_bytes == kArrayValue;
    if (!commit.is_array) {
      if (size_bytes > kMaxValueBytes || size_bytes > rest.size())
        return fail(
            Errc::invalid_argument,
            fmt::format("a slot's value has at most {} bytes; allocate an array for more", kMaxValueBytes));
      commit.value = rest.first(size_bytes);
      rest = rest.subspan(size_bytes);
    }
    commits.push_back(commit);
  }
  return commits;
}

// The array of a slot is sealed first, as any other; if the slot is lost meanwhile, the array goes.
asio::awaitable<Result<void>> commit_array(Call& call, ArrayId id, const Commit& commit) {
  Core& core = call.core;
  ResultSetRecord& set = *core.results.get(id);
  const SlotIndex slot = commit.slot;
  if (auto ok = set.table.check_holder(call.session->id(), slot, commit.attempt); !ok) co_return ok;
  const auto at = set.allocated.find(slot);
  if (at == set.allocated.end())
    co_return fail(Errc::invalid_argument, fmt::format("no array was allocated for slot {}", slot));
  const ArrayId array = at->second;
  set.table.hold(slot);
  const auto sealed = co_await seal(call, kHouse, array, false);
  if (call.session->gone()) co_return peer_gone(call);
  if (!sealed) {
    if (ResultSetRecord* refused = core.results.get(id); refused != nullptr && refused->is_open()) {
      refused->table.resume(slot, Core::moment().tick);
      // What cannot be sealed at all is gone: the slot is free of it, and may be allocated or given back.
      if (core.store.find(array) == nullptr) core.results.drop_allocated(*refused, slot);
    }
    co_return sealed;
  }
  const auto still = core.results.find_to_work(call.session->id(), id);
  if (still) co_return core.results.commit_array(call.session->id(), **still, slot, Core::now());
  core.store.retire(array);
  co_return error_of(still);
}

// What needs no waiting.
Result<void> commit_at_once(Call& call, ResultSetRecord& set, const Commit& commit) {
  const SessionId session = call.session->id();
  const Time now = Core::now();
  if (auto ok = set.table.check_holder(session, commit.slot, commit.attempt); !ok) return ok;
  if (!set.terms.is_ragged) return call.core.results.commit_rows(session, set, commit.slot, now);
  return call.core.results.commit_value(session, set, commit.slot, commit.value, now);
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
  call.core.settle();
  if (!made) co_return error_of(made);
  const ResultSetRecord& set = **made;
  call.core.waits.wake({Topic::array_name, 0, set.name});
  if (!set.terms.queue.empty()) call.core.waits.wake({Topic::queue, 0, set.terms.queue});
  call.core.log.info(call.session->peer().uid, [&] {
    return fmt::format("result set {} (#{}, {} slots, {}) made by process {}", printable(set.name), set.id,
                       set.table.size(), terms.is_ragged ? "ragged" : format_size(set.data_bytes),
                       set.owner_pid);
  });
  co_return opened_reply(call, set);
}

namespace {

Answer open_queued(Call& call, const wire::OpenResults& table) {
  const std::string queue(view_of(table.queue()));
  if (auto ok = check_name(queue); !ok) co_return error_of(std::move(ok));
  const Deadline deadline = deadline_after(table.wait_ms());
  const WaitKey key{Topic::queue, 0, queue};
  for (bool is_late = table.wait_ms() == 0;;) {
    if (const auto* set = call.core.results.open_queued(call.session->id(), queue))
      co_return opened_reply(call, *set);
    if (is_late)
      co_return fail(Errc::timed_out, fmt::format("no set of queue {} has a free slot", printable(queue)));
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    is_late = woken == Channel::Woken::deadline;
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
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    if (woken == Channel::Woken::deadline) {
      co_return fail(Errc::timed_out, fmt::format("result set {} did not come within {} ms", printable(name),
                                                  table.wait_ms()));
    }
  }
}

Answer lease_slots(Call& call, const wire::LeaseSlots& table) {
  const SessionId session = call.session->id();
  ResultSets& results = call.core.results;
  const Deadline deadline = deadline_after(table.wait_ms());
  const WaitKey key{Topic::slot_free, table.set()};
  for (bool is_late = table.wait_ms() == 0;;) {
    const auto set = results.find_to_work(session, table.set());
    if (!set) co_return error_of(set);
    std::vector<ResultSets::Lease> leases;
    if (table.slot() >= 0) {
      const auto lease = results.lease(session, **set, static_cast<SlotIndex>(table.slot()), Core::moment());
      if (!lease) co_return error_of(lease);
      leases.push_back(*lease);
    } else {
      leases = results.lease(session, **set, batch_of(table.count()), table.share(), Core::moment());
    }
    call.core.settle();
    if (!leases.empty() || (*set)->table.is_settled() || is_late)
      co_return lease_reply(call, **set, leases, table.mapped());
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    is_late = woken == Channel::Woken::deadline;
  }
}

Answer allocate_slot(Call& call, const wire::AllocateSlot& table) {
  const SessionId session = call.session->id();
  Core& core = call.core;
  auto set = core.results.find_to_work(session, table.set());
  if (!set) co_return error_of(set);
  if (!(*set)->terms.is_ragged)
    co_return fail(Errc::invalid_argument, "the slots of a dense set are rows of its array: write there");
  if (auto ok = (*set)->table.check_holder(session, table.slot(), table.attempt()); !ok)
    co_return error_of(std::move(ok));
  core.results.drop_allocated(**set, table.slot());  // it has the name
  auto dtype = dtype_of(table.dtype());
  if (!dtype) co_return error_of(std::move(dtype));
  const CreateRequest request{.name = fmt::format("{}/{}", (*set)->name, table.slot()),
                              .spec = {*std::move(dtype), shape_of(table.shape()), order_of(table.order())},
                              .owner = (*set)->owner};
  const auto record = co_await make_array(call, request);
  if (!record) co_return error_of(record);
  const ArrayId array = (*record)->id;
  // The slot, or the whole set, may be lost by now.
  set = core.results.find_to_work(session, table.set());
  auto held =
      set ? (*set)->table.check_holder(session, table.slot(), table.attempt()) : Result<void>(error_of(set));
  if (!held) {
    core.store.retire(array);
    core.settle();
    co_return error_of(std::move(held));
  }
  core.results.allocated(**set, table.slot(), array);
  co_return created_reply(call, **record);
}

Answer commit_slots(Call& call, const wire::CommitSlots& table) {
  const SessionId session = call.session->id();
  ResultSets& results = call.core.results;
  const auto commits = commits_of(table);
  if (!commits) co_return error_of(commits);
  auto set = results.find_to_work(session, table.set());
  if (!set) co_return error_of(set);
  std::vector<Offset<wire::Refusal>> refused;
  for (const Commit& commit : *commits) {
    // An earlier daemon did it, and could not say so any more.
    if (call.is_again && (*set)->table.was_committed(commit.slot, commit.attempt)) continue;
    if ((*set)->table.room_bytes() < commit.value.size())
      set = co_await with_value_room(call, table.set(), commit.value.size());
    if (!set) break;
    // Who awaits where there is nothing to wait for pays as much as for the rest of the request.
    Result<void> committed;
    if (commit.is_array && (*set)->terms.is_ragged)
      committed = co_await commit_array(call, table.set(), commit);
    else
      committed = commit_at_once(call, **set, commit);
    if (call.session->gone()) co_return peer_gone(call);
    if (!committed) {
      const auto& [code, message] = committed.error();
      refused.push_back(wire::CreateRefusalDirect(call.builder, commit.slot, static_cast<std::uint16_t>(code),
                                                  message.c_str()));
    }
    set = results.find_to_work(session, table.set());
    if (!set) break;
  }
  if (!set) {
    call.core.settle();  // of what was committed before
    co_return error_of(set);
  }
  std::vector<ResultSets::Lease> leases;
  if (table.next() > 0)
    leases = results.lease(session, **set, batch_of(table.next()), table.share(), Core::moment());
  const Reply reply = lease_reply(call, **set, leases, table.mapped(), refused);
  if (!table.mapped() && leases.empty()) results.unmapped(session, table.set());
  call.core.settle();
  co_return reply;
}

Answer fail_slot(Call& call, const wire::FailSlot& table) {
  const std::string_view message = view_of(table.message()).substr(0, kMaxReasonBytes);
  const std::string reason = is_utf8(message) ? std::string(message) : printable(message);
  const auto set = co_await with_value_room(call, table.set(), reason.size());
  if (!set) co_return error_of(set);
  if (auto ok = (*set)->table.check_holder(call.session->id(), table.slot(), table.attempt()); !ok) {
    if (call.is_again) co_return done(call);  // an earlier daemon did it
    co_return error_of(std::move(ok));
  }
  if (auto ok =
          call.core.results.fail(call.session->id(), **set, table.slot(), reason, table.final(), Core::now());
      !ok)
    co_return error_of(std::move(ok));
  const Peer& peer = call.session->peer();
  call.core.log.warn(peer.uid, [&] {
    return fmt::format("slot {} of result set {} failed in process {}: {}", table.slot(),
                       printable((*set)->name), peer.pid, printable(reason));
  });
  if (!table.mapped()) call.core.results.unmapped(call.session->id(), table.set());
  call.core.settle();
  co_return done(call);
}

// All that can be given back; the first refusal is told.
Answer give_back_slots(Call& call, const wire::GiveBackSlots& table) {
  const SessionId session = call.session->id();
  const auto set = call.core.results.find_to_work(session, table.set());
  if (!set) co_return error_of(set);
  Result<void> given;
  for (std::size_t i = 0; i < size_of(table.slots()); ++i) {
    const SlotIndex slot = table.slots()->Get(static_cast<flatbuffers::uoffset_t>(i));
    const std::uint32_t attempt =
        i < size_of(table.attempts()) ? table.attempts()->Get(static_cast<flatbuffers::uoffset_t>(i)) : 0;
    auto ok = (*set)->table.check_holder(session, slot, attempt);
    if (ok) ok = call.core.results.give_back(session, **set, slot, Core::now());
    if (!ok && given) given = std::move(ok);
  }
  if (!table.mapped()) call.core.results.unmapped(session, table.set());
  call.core.settle();
  if (!given) co_return error_of(std::move(given));
  co_return done(call);
}

Answer unmapped(Call& call, const wire::Unmapped& table) {
  call.core.results.unmapped(call.session->id(), table.set());
  call.core.settle();
  co_return Reply{};
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
    const auto woken = co_await call.channel.wait_change(key, is_paced ? pace : deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    if (woken != Channel::Woken::deadline) continue;
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
  co_await call.core.settle_and_reclaim();
  co_return done(call);
}

Answer list_results(Call& call, const wire::ListResults& table) {
  const std::size_t limit = page_limit(table.limit());
  const auto filter = filter_of(table.name(), table.pattern());
  if (!filter) co_return error_of(filter);
  const auto page = call.core.results.list(call.session->id(), *filter, table.after(), limit);
  std::vector<Offset<wire::ResultsInfo>> sets;
  for (const ResultSetRecord* set : page.entries) {
    if (call.builder.GetSize() > kPageBytesUsed) break;
    sets.push_back(pack(call.builder, *set));
  }
  const bool is_whole = sets.size() == page.entries.size();
  co_return reply_of(wire::CreateResultsDirect(call.builder, &sets,
                                               is_whole ? page.next : page.entries[sets.size() - 1]->id));
}

}  // namespace cowmgr
