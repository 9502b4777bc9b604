// The slots of result sets: leased, filled, committed, given back.
#include <algorithm>
#include <fcntl.h>
#include <map>

#include <fmt/format.h>

#include "daemon/core/undo.hpp"
#include "daemon/requests/handlers.hpp"
#include "daemon/requests/making.hpp"
#include "daemon/requests/reply_room.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

using Topic = WaitKey::Topic;

// A set's segment grows by as much as it has, within these bounds.
constexpr std::uint64_t kLeastGrowth = std::uint64_t{1} << 20;
constexpr std::uint64_t kMostGrowth = std::uint64_t{64} << 20;

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
  const auto still_there = [&core, id]() -> ResultSetRecord* {
    ResultSetRecord* still = core.results.get(id);
    return still == nullptr || still->state == ResultSetRecord::State::cancelled ? nullptr : still;
  };
  auto extend = [&]() -> Result<void> {
    ResultSetRecord* still = still_there();
    return still == nullptr ? Result<void>() : core.store.extend(still->memory.room, more);
  };
  if (const auto ok = co_await when_there_is_room(call, extend); !ok) co_return error_of(ok);
  if (still_there() == nullptr) co_return Result<void>();
  Undo extended([&still_there, more] {
    if (ResultSetRecord* still = still_there()) still->memory.room.shrink(more);
  });
  auto work = [&env = core.env, segment, new_bytes] { return env.grow(*segment, new_bytes); };
  const auto grown = co_await core.background.run_sized(more, owner, std::move(work));
  ResultSetRecord* still = still_there();
  if (!grown) co_return not_backed(core, more, grown.error());
  if (still == nullptr) co_return Result<void>();
  extended.keep();
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
      const auto woken = co_await call.waiter.change(key, Deadline::max());
      if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
      continue;
    }
    (*set)->is_growing = true;
    const Undo growing([&core, &key, id] {
      if (ResultSetRecord* still = core.results.get(id)) still->is_growing = false;
      core.waits.wake(key);
    });
    const auto grown = co_await grow(call, id, grown_bytes(**set, size_bytes));
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
    call.grants.lease(set.id, lease);
  }
  if (!leases.empty() && !is_mapped && !set.terms.is_ragged)
    call.fds = {call.core.store.find(set.id)->segment.writer.get()};
  return reply_of(
      wire::CreateLeasedDirect(call.builder, &slots, set.table.is_settled() || !set.is_open(),
                               set.terms.is_ragged ? 0 : segment_bytes(set.data_bytes, set.data_offset),
                               refused.empty() ? nullptr : &refused));
}

// As many leases as were asked for, and as a reply with `refused` refusals still has room for.
std::uint64_t batch_of(const Call& call, std::uint32_t asked, std::size_t refused = 0) {
  const std::size_t room_bytes = room_of(call.builder);
  const std::size_t list_bytes = std::min(room_bytes, refused * sizeof(Offset<wire::Refusal>));
  return std::min({std::uint64_t{asked}, std::uint64_t{kMaxBatch},
                   std::uint64_t{(room_bytes - list_bytes) / sizeof(wire::SlotLease)}});
}

// A slot of a commit that was not taken.
struct Refused {
  SlotIndex slot = 0;
  Error why;
};

// Tells of every slot, however many they are, and why; where the frame has no room for all the reasons, those
// of a kind (which are about the same but for the slot's number) share the first one's.
class Refusals {
 public:
  Refusals(Builder& builder, std::span<const Refused> refused)
      : builder_(builder), text_bytes_(room_for_texts(builder, refused.size())) {
    for (const auto& [slot, why] : refused)
      tables_.push_back(
          wire::CreateRefusal(builder, slot, static_cast<std::uint16_t>(why.code), text_of(slot, why)));
  }
  [[nodiscard]] const std::vector<Offset<wire::Refusal>>& tables() const noexcept { return tables_; }

 private:
  // kMaxBatch refusals take 112 KiB without a word, and leave 14 KiB for words.
  static constexpr std::size_t kTableBytes = 24;     // slot, code, where the text is; aligned
  static constexpr std::size_t kSharedBytes = 7168;  // kept for the shared reasons: a dozen kinds
  static constexpr std::size_t kTextBytes = 512;     // of one reason at most

  static std::size_t room_for_texts(const Builder& builder, std::size_t count) {
    const std::size_t fixed_bytes = count * (kTableBytes + sizeof(Offset<wire::Refusal>)) + kSharedBytes;
    const std::size_t room_bytes = room_of(builder);
    return room_bytes > fixed_bytes ? room_bytes - fixed_bytes : 0;
  }
  Offset<flatbuffers::String> text_of(SlotIndex slot, const Error& why) {
    const std::string text = why.message.substr(0, kTextBytes);
    const std::size_t bytes = text.size() + 16;  // its length, its end, and alignment
    if (bytes <= text_bytes_) {
      text_bytes_ -= bytes;
      return builder_.CreateString(text);
    }
    Offset<flatbuffers::String>& shared = shared_[why.code];
    if (shared.IsNull()) shared = builder_.CreateString(fmt::format("as slot {}: {}", slot, text));
    return shared;
  }

  Builder& builder_;
  std::size_t text_bytes_;
  std::map<Errc, Offset<flatbuffers::String>> shared_;
  std::vector<Offset<wire::Refusal>> tables_;
};

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

// The array of a slot is sealed first, as any other.
asio::awaitable<Result<void>> commit_array(Call& call, ArrayId id, const Commit& commit) {
  ResultSets& results = call.core.results;
  const SessionId session = call.session->id();
  const auto set = results.find_to_work(session, id);
  if (!set) co_return error_of(set);
  const auto sealing = results.begin_sealing(session, **set, commit.slot, commit.attempt);
  if (!sealing) co_return error_of(sealing);
  const auto sealed = co_await seal(call, kDaemonSession, sealing->array, false);
  if (call.session->gone()) co_return peer_gone(call);
  if (sealed) co_return results.commit_array(session, *sealing, Core::now());
  results.give_up_sealing(session, *sealing, Core::moment().tick);
  co_return sealed;
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
      leases = results.lease(session, **set, std::max<std::uint64_t>(batch_of(call, table.count()), 1),
                             table.share(), Core::moment());
    }
    if (!leases.empty() || (*set)->table.is_settled() || is_late) {
      const Reply reply = lease_reply(call, **set, leases, table.mapped());
      co_return reply;
    }
    const auto woken = co_await call.waiter.change(key, deadline);
    if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    is_late = woken == Waiter::Woken::deadline;
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
    co_return error_of(std::move(held));
  }
  if (!core.results.allocated(**set, table.slot(), array))
    co_return fail(Errc::not_found, "the array was given up while it was being made");
  call.grants.allocation(table.set(), table.slot(), array);
  co_return created_reply(call, **record);
}

Answer commit_slots(Call& call, const wire::CommitSlots& table) {
  const SessionId session = call.session->id();
  ResultSets& results = call.core.results;
  const auto commits = commits_of(table);
  if (!commits) co_return error_of(commits);
  auto set = results.find_to_work(session, table.set());
  if (!set) co_return error_of(set);
  std::vector<Refused> refused;
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
    if (!committed) refused.push_back({commit.slot, std::move(committed).error()});
    set = results.find_to_work(session, table.set());
    if (!set) break;
  }
  if (!set) {
    co_return error_of(set);
  }
  const Refusals refusals(call.builder, refused);
  std::vector<ResultSets::Lease> leases;
  if (const auto count = batch_of(call, table.next(), refused.size()); count > 0)
    leases = results.lease(session, **set, count, table.share(), Core::moment());
  const Reply reply = lease_reply(call, **set, leases, table.mapped(), refusals.tables());
  if (!table.mapped() && leases.empty()) results.unmapped(session, table.set());
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
  if (!given) co_return error_of(std::move(given));
  co_return done(call);
}

Answer unmapped(Call& call, const wire::Unmapped& table) {
  call.core.results.unmapped(call.session->id(), table.set());
  co_return Reply{};
}

}  // namespace cowmgr
