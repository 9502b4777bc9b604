#include "daemon/requests.hpp"

#include <algorithm>
#include <unistd.h>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/fd_socket.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

using Answer = asio::awaitable<Result<Reply>>;

constexpr std::size_t kPageItems = 512;             // of one listing at most
constexpr std::size_t kPageBytesUsed = 96U << 10U;  // then a page is closed: an item may take 20 KiB
constexpr std::size_t kReplyBytesUsed = 127U << 10U;  // the rest of a frame is for what holds the items
constexpr std::size_t kMaxPatternBytes = 1024;      // of a glob: a name has 255
constexpr std::size_t kMaxPatterns = 64;            // of one request
constexpr std::size_t kMaxMessageBytes = 4096;      // of a worker's reason for a failure
// How long a seal waits for the kernel to forget a mapping that was just given up.
constexpr auto kSealPatience = std::chrono::milliseconds(200);
constexpr auto kSealRetry = std::chrono::milliseconds(2);

template <class Table>
Reply reply_of(Offset<Table> body) {
  return {wire::ReplyBodyTraits<Table>::enum_value, body.Union()};
}

Reply done(Call& call) {
  return reply_of(wire::CreateDone(call.builder));
}

tl::unexpected<Error> peer_gone() {
  return fail(Errc::disconnected, "the peer went away");
}

Deadline deadline_after(std::uint32_t wait_ms) {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(wait_ms);
}

Offset<wire::ArrayInfo> pack_array(Call& call, const ArrayRecord& record) {
  return pack(call.builder, record, protection_of(call.core.env, record.owner.uid, ::geteuid()));
}

// ---- Arrays ----

// The capacity has room, the file system that the segments lie in has not: something else fills it.
tl::unexpected<Error> shm_is_full(const Core& core, std::uint64_t size_bytes) {
  const auto space = core.env.space();
  return fail(Errc::out_of_memory,
              fmt::format("this needs {}, but of the {} of /dev/shm only {} are free, whatever the capacity "
                          "says ({}); remove files "
                          "there, evict arrays, or enlarge it with `mount -o remount,size=... /dev/shm`",
                          format_size(size_bytes), format_size(space.total_bytes),
                          format_size(space.free_bytes), format_size(core.config.capacity_bytes)));
}

// Room, then memory. Evicted memory is given back before new memory is taken.
asio::awaitable<Result<const ArrayRecord*>> make_array(Call& call, const CreateRequest& request) {
  Core& core = call.core;
  auto reserved = core.store.reserve(call.session->id(), request, Core::now());
  while (!reserved && reserved.error().code == Errc::out_of_memory && core.store.reclaiming_bytes() > 0) {
    const Deadline never = Deadline::max();
    co_await core.settle_and_reclaim();
    auto woken = Channel::Woken::changed;
    if (core.store.reclaiming_bytes() > 0)
      woken = co_await call.channel.wait_change(Core::reclaim_key(), never);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone();
    reserved = core.store.reserve(call.session->id(), request, Core::now());
  }
  core.settle();
  if (!reserved) co_return error_of(std::move(reserved));
  const ArrayRecord& record = *core.store.find(*reserved);
  auto work = [session = call.session, &env = core.env, id = record.id, size = record.segment_bytes(),
               header = record.header] { return env.create(id, size, header, session->gone()); };
  auto segment = co_await core.offload(std::move(work));
  if (!segment) {
    core.store.fail_backing(*reserved);
    core.settle();
    if (segment.error().code == Errc::out_of_memory)
      co_return shm_is_full(core, data_bytes(request.spec).value_or(0));
    co_return error_of(std::move(segment));
  }
  auto backed = core.store.back(*reserved, *std::move(segment));
  core.settle();
  co_return backed;
}

Answer create_array(Call& call, const wire::MakeArray& table) {
  const Order order = table.order() == wire::ByteOrder::fortran ? Order::fortran : Order::c;
  const auto request = create_request_of(table, order);
  if (!request) co_return error_of(request);
  const auto record = co_await make_array(call, *request);
  if (!record) co_return error_of(record);
  call.fds = {(*record)->segment.writer.get(), (*record)->segment.reader.get()};
  spdlog::debug("array {} (#{}) is being written by process {}", printable(request->name), (*record)->id,
                call.session->peer().pid);
  co_return reply_of(wire::CreateCreated(call.builder, pack_array(call, **record)));
}

// A set's memory is written by its workers: whoever made the set cannot end that as if it were the one
// writer.
tl::unexpected<Error> belongs_to_a_set() {
  return fail(Errc::not_holder,
              "this is the array of a result set, which seals itself when all slots are committed");
}

Answer seal_array(Call& call, const wire::SealArray& table) {
  Core& core = call.core;
  if (core.results.contains(table.id())) co_return belongs_to_a_set();
  const Deadline deadline = std::chrono::steady_clock::now() + kSealPatience;
  asio::steady_timer timer(core.io);
  for (;;) {
    const auto sealed = core.store.seal(call.session->id(), table.id(), true, Core::now());
    core.settle();
    if (!sealed) co_return error_of(sealed);
    if (*sealed) break;
    if (std::chrono::steady_clock::now() >= deadline) {
      const std::string who = co_await core.writers_in_words(table.id());
      co_return fail(
          Errc::still_writable,
          fmt::format("the array can still be written by {}; unmap and close it there, then seal again",
                      who));
    }
    timer.expires_after(kSealRetry);
    co_await timer.async_wait(asio::use_awaitable);
    if (call.session->gone()) co_return peer_gone();
  }
  const ArrayRecord& record = *core.store.find(table.id());
  spdlog::info("array {} version {} (#{}, {}) sealed by process {}", printable(record.name), record.version,
               record.id, format_size(record.data_bytes), call.session->peer().pid);
  const std::vector<Offset<wire::ArrayInfo>> arrays = {pack_array(call, record)};
  co_return reply_of(wire::CreateArraysDirect(call.builder, &arrays));
}

Answer abort_array(Call& call, const wire::AbortArray& table) {
  const ArrayRecord* record = call.core.store.find(table.id());
  if (record == nullptr || record->writer != call.session->id()) {
    co_return fail(Errc::not_holder, "this session is not writing such an array");
  }
  if (call.core.results.contains(table.id())) co_return belongs_to_a_set();
  call.core.store.abort(table.id());
  co_await call.core.settle_and_reclaim();
  co_return done(call);
}

// The views are counted already; if the frame cannot tell of them, they go again.
Result<Reply> views_reply(Call& call, const std::vector<const ArrayRecord*>& records) {
  std::vector<Offset<wire::ArrayInfo>> arrays;
  std::vector<ArrayId> ids;
  for (const ArrayRecord* record : records) {
    arrays.push_back(pack_array(call, *record));
    ids.push_back(record->id);
    call.fds.push_back(record->segment.reader.get());
  }
  if (call.builder.GetSize() <= kReplyBytesUsed)
    return reply_of(wire::CreateArraysDirect(call.builder, &arrays));
  for (const ArrayId id : ids) call.core.store.release(call.session->id(), id, Core::now());
  call.core.settle();
  return fail(Errc::invalid_argument,
              "what there is to say of these arrays, their dtypes above all, does not fit a frame; attach "
              "fewer in one request");
}

Answer attach(Call& call, const wire::Attach& table) {
  Core& core = call.core;
  const auto names = strings_of(table.names());
  const auto ids = shape_of(table.ids());
  if (names.size() + ids.size() == 0 || names.size() + ids.size() > kMaxFrameFds) {
    co_return fail(Errc::invalid_argument, fmt::format("attach 1 to {} arrays in one request", kMaxFrameFds));
  }
  for (const auto& name : names) {
    if (auto ok = check_name(name); !ok) co_return error_of(std::move(ok));
  }
  const Deadline deadline = deadline_after(table.wait_ms());
  for (;;) {
    const auto found = core.store.attach(call.session->id(), names, ids, Core::now());
    if (found) co_return views_reply(call, *found);
    const std::string* missing = core.store.first_missing(names);
    if (missing == nullptr || table.wait_ms() == 0) co_return error_of(found);
    const std::string key = Core::array_key(*missing);
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone();
    if (woken == Channel::Woken::deadline) {
      co_return fail(Errc::timed_out,
                     fmt::format("array {} did not come within {} ms", printable(*missing), table.wait_ms()));
    }
  }
}

void release_views(Call& call, const flatbuffers::Vector<std::uint64_t>& ids) {
  const Time now = Core::now();
  for (const ArrayId id : ids) call.core.store.release(call.session->id(), id, now);
  call.core.settle();
}

Answer nothing_more(Call& /*call*/, const wire::Release& /*table*/) {
  co_return Reply{};
}

Reply names_reply(Call& call, const std::vector<std::string>& names, std::uint64_t freed_bytes) {
  std::vector<Offset<flatbuffers::String>> texts;
  for (const auto& name : names) {
    if (call.builder.GetSize() > kPageBytesUsed) break;
    texts.push_back(call.builder.CreateString(name));
  }
  return reply_of(wire::CreateNamesDirect(call.builder, &texts, names.size(), freed_bytes));
}

// Each pattern is held against every name, in the loop: their number is bounded.
Result<std::vector<std::string>> patterns_of(const flatbuffers::Vector<Offset<flatbuffers::String>>* texts) {
  auto patterns = strings_of(texts);
  const auto is_long = [](const std::string& pattern) { return pattern.size() > kMaxPatternBytes; };
  if (patterns.size() <= kMaxPatterns && std::none_of(patterns.begin(), patterns.end(), is_long))
    return patterns;
  return fail(Errc::invalid_argument,
              fmt::format("name at most {} arrays or globs in one request, of {} bytes each", kMaxPatterns,
                          kMaxPatternBytes));
}

Answer evict(Call& call, const wire::Evict& table) {
  const SessionId session = call.session->id();
  const auto patterns = patterns_of(table.patterns());
  if (!patterns) co_return error_of(patterns);
  auto evicted = table.lru_bytes() > 0 ? call.core.store.evict_lru(session, table.lru_bytes())
                                       : call.core.store.evict(session, *patterns);
  if (!evicted) co_return error_of(std::move(evicted));
  for (const auto& name : evicted->names)
    spdlog::info("array {} evicted by process {}", printable(name), call.session->peer().pid);
  co_await call.core.settle_and_reclaim();  // so that what is free after the answer is free
  co_return names_reply(call, evicted->names, evicted->freed_bytes);
}

Answer pin(Call& call, const wire::Pin& table) {
  const auto patterns = patterns_of(table.patterns());
  if (!patterns) co_return error_of(patterns);
  const auto names = call.core.store.pin(call.session->id(), *patterns, table.pinned());
  if (!names) co_return error_of(names);
  co_return names_reply(call, *names, 0);
}

// ---- Looking ----

Offset<wire::ClientInfo> pack_client(Call& call, const Session& session) {
  const auto use = call.core.store.use_of(session.id());
  const auto command = call.builder.CreateString(session.command());
  return wire::CreateClientInfo(call.builder, session.id(), session.peer().pid, session.peer().uid, command,
                                static_cast<std::uint32_t>(session.channels()), use.views, use.view_bytes,
                                use.writing, call.core.results.leases_of(session.id()),
                                session.connected().time_since_epoch().count());
}

Answer stat_array(Call& call, const wire::StatArray& table) {
  Core& core = call.core;
  const auto found = core.store.find(call.session->id(), view_of(table.name()));
  if (!found) co_return error_of(found);
  const ArrayId id = (*found)->id;
  SegmentUsage usage;
  if (const Segment& segment = (*found)->segment; segment.reader) {
    auto copy = std::make_shared<Segment>(Segment{.name = segment.name, .size_bytes = segment.size_bytes});
    copy->reader.reset(::dup(segment.reader.get()));
    auto work = [&env = core.env, copy] { return env.usage(*copy); };
    const auto measured = co_await core.offload(std::move(work));
    if (measured) usage = *measured;
  }
  if (call.session->gone()) co_return peer_gone();
  const ArrayRecord* record = core.store.find(id);
  if (record == nullptr) co_return fail(Errc::not_found, "the array went away meanwhile");
  std::vector<Offset<wire::ClientInfo>> holders;
  for (const auto& [session, peer] : core.sessions) {
    if (core.store.views_of(session, id) > 0 && call.builder.GetSize() < kPageBytesUsed)
      holders.push_back(pack_client(call, *peer));
  }
  const auto array = pack_array(call, *record);
  co_return reply_of(
      wire::CreateArrayDetailsDirect(call.builder, array, usage.resident_bytes, usage.huge_bytes, &holders));
}

std::size_t page_limit(std::uint32_t asked) {
  return asked == 0 ? kPageItems : std::min<std::size_t>(asked, kPageItems);
}

std::string pattern_of(const flatbuffers::String* pattern) {
  if (pattern == nullptr || pattern->size() == 0) return "*";
  return std::string(view_of(pattern).substr(0, kMaxPatternBytes));  // what is longer matches no name anyway
}

Answer list_arrays(Call& call, const wire::ListArrays& table) {
  const std::size_t limit = page_limit(table.limit());
  const auto found =
      call.core.store.list(call.session->id(), pattern_of(table.pattern()), table.after(), limit);
  std::vector<Offset<wire::ArrayInfo>> arrays;
  for (const ArrayRecord* record : found) {
    if (call.builder.GetSize() > kPageBytesUsed) break;
    arrays.push_back(pack_array(call, *record));
  }
  const bool is_last = arrays.size() == found.size() && found.size() < limit;
  co_return reply_of(
      wire::CreateArraysDirect(call.builder, &arrays, is_last ? 0 : found[arrays.size() - 1]->id));
}

Answer list_clients(Call& call, const wire::ListClients& table) {
  const std::size_t limit = page_limit(table.limit());
  std::vector<Offset<wire::ClientInfo>> clients;
  SessionId next = 0;
  for (auto at = call.core.sessions.upper_bound(table.after()); at != call.core.sessions.end(); ++at) {
    if (clients.size() == limit || call.builder.GetSize() > kPageBytesUsed) break;
    clients.push_back(pack_client(call, *at->second));
    next = std::next(at) == call.core.sessions.end() ? 0 : at->first;
  }
  co_return reply_of(wire::CreateClientsDirect(call.builder, &clients, next));
}

Answer ping(Call& call, const wire::Ping& /*table*/) {
  Core& core = call.core;
  const MemoryUse use = core.store.memory_use();
  co_return reply_of(wire::CreatePongDirect(
      call.builder, std::string(kVersion).c_str(), core.config.instance.c_str(), core.config.socket.c_str(),
      ::getpid(), ::geteuid(), core.started.time_since_epoch().count(),
      protection_of(core.env, call.session->peer().uid, ::geteuid()), use.capacity_bytes, use.used_bytes,
      use.pinned_bytes, use.evictable_bytes, use.viewed_bytes, static_cast<std::uint32_t>(core.store.size()),
      static_cast<std::uint32_t>(core.sessions.size()), static_cast<std::uint32_t>(core.results.size())));
}

Answer shutdown(Call& call, const wire::Shutdown& /*table*/) {
  const uid_t uid = call.session->peer().uid;
  if (uid != 0 && uid != ::geteuid()) {
    co_return fail(Errc::permission_denied,
                   fmt::format("only user {} or root may stop this daemon", ::geteuid()));
  }
  spdlog::info("stopping: asked to by process {}", call.session->peer().pid);
  asio::post(call.core.io, call.core.stop);  // after the answer is on its way
  co_return done(call);
}

// ---- Result sets ----

Reply results_reply(Call& call, const ResultSetRecord& set) {
  const std::vector<Offset<wire::ResultsInfo>> sets = {pack(call.builder, set, call.core.store)};
  return reply_of(wire::CreateResultsDirect(call.builder, &sets));
}

Answer create_results(Call& call, const wire::MakeResults& table) {
  const auto request = create_request_of(table, Order::c);
  if (!request) co_return error_of(request);
  if (auto ok = ResultSets::check(request->spec, table.slots()); !ok) co_return error_of(std::move(ok));
  const auto record = co_await make_array(call, *request);
  if (!record) co_return error_of(record);
  const ResultSetRecord& set = call.core.results.add(call.session->id(), **record, table.slots());
  call.core.waits.wake(Core::array_key(set.name));
  spdlog::info("result set {} (#{}, {} slots, {}) made by process {}", printable(set.name), set.id,
               set.table.size(), format_size(set.data_bytes), set.owner_pid);
  co_return results_reply(call, set);
}

Answer open_results(Call& call, const wire::OpenResults& table) {
  const std::string name(view_of(table.name()));
  if (auto ok = check_name(name); !ok) co_return error_of(std::move(ok));
  const std::string key = Core::array_key(name);
  const Deadline deadline = deadline_after(table.wait_ms());
  for (;;) {
    const auto set = call.core.results.open(call.session->id(), name);
    if (set) co_return results_reply(call, **set);
    if (set.error().code != Errc::not_found || table.wait_ms() == 0) co_return error_of(set);
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone();
    if (woken == Channel::Woken::deadline) {
      co_return fail(Errc::timed_out, fmt::format("result set {} did not come within {} ms", printable(name),
                                                  table.wait_ms()));
    }
  }
}

// The writable descriptor goes with a lease unless the client has the set mapped already.
Reply lease_reply(Call& call, const ResultSetRecord& set, const std::optional<SlotTable::Lease>& lease,
                  bool is_mapped) {
  const std::uint64_t size_bytes = segment_bytes(set.data_bytes);
  if (!lease)
    return reply_of(wire::CreateLeased(call.builder, -1, 0, 0, 0, set.table.is_settled(), size_bytes));
  if (!is_mapped) call.fds = {call.core.store.find(set.id)->segment.writer.get()};
  return reply_of(wire::CreateLeased(call.builder, static_cast<std::int64_t>(lease->slot), lease->attempt,
                                     lease->begin, lease->end, false, size_bytes));
}

Answer lease_slot(Call& call, const wire::LeaseSlot& table) {
  const SessionId session = call.session->id();
  const Deadline deadline = deadline_after(table.wait_ms());
  const std::string key = Core::set_key(table.set());
  std::optional<SlotIndex> wanted;
  if (table.slot() >= 0) wanted = static_cast<SlotIndex>(table.slot());
  for (;;) {
    const auto set = call.core.results.find(session, table.set());
    if (!set) co_return error_of(set);
    const auto lease = call.core.results.lease(session, **set, wanted);
    if (!lease) co_return error_of(lease);
    call.core.settle();
    if (*lease || (*set)->table.is_settled() || table.wait_ms() == 0)
      co_return lease_reply(call, **set, *lease, table.mapped());
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone();
    if (woken == Channel::Woken::deadline) co_return lease_reply(call, **set, std::nullopt, false);
  }
}

Answer commit_slot(Call& call, const wire::CommitSlot& table) {
  const SessionId session = call.session->id();
  const auto set = call.core.results.find(session, table.set());
  if (!set) co_return error_of(set);
  if (auto ok = call.core.results.commit(session, **set, table.slot()); !ok)
    co_return error_of(std::move(ok));
  std::optional<SlotTable::Lease> next;
  if (table.lease_next()) {
    if (const auto lease = call.core.results.lease(session, **set, std::nullopt)) next = *lease;
  }
  const Reply reply = lease_reply(call, **set, next, table.mapped());
  if (!table.mapped() && !next) call.core.results.unmapped(session, table.set());
  call.core.settle();
  co_return reply;
}

// A lease that ends without a commit: failed for good, or given back.
template <class Table, class End>
Result<Reply> end_lease(Call& call, const Table& table, const End& end) {
  const auto set = call.core.results.find(call.session->id(), table.set());
  if (!set) return error_of(set);
  if (auto ok = end(**set); !ok) return error_of(std::move(ok));
  if (!table.mapped()) call.core.results.unmapped(call.session->id(), table.set());
  call.core.settle();
  return done(call);
}

Answer fail_slot(Call& call, const wire::FailSlot& table) {
  const std::string_view message = view_of(table.message()).substr(0, kMaxMessageBytes);
  const std::string reason = is_utf8(message) ? std::string(message) : printable(message);
  co_return end_lease(call, table, [&](ResultSetRecord& set) {
    spdlog::warn("slot {} of result set {} failed in process {}: {}", table.slot(), printable(set.name),
                 call.session->peer().pid, printable(reason));
    return call.core.results.fail(call.session->id(), set, table.slot(), reason);
  });
}

Answer give_back_slot(Call& call, const wire::GiveBackSlot& table) {
  co_return end_lease(call, table, [&](ResultSetRecord& set) {
    return call.core.results.give_back(call.session->id(), set, table.slot());
  });
}

Answer unmapped(Call& call, const wire::Unmapped& table) {
  call.core.results.unmapped(call.session->id(), table.set());
  call.core.settle();
  co_return Reply{};
}

Answer wait_results(Call& call, const wire::WaitResults& table) {
  const Deadline deadline = deadline_after(table.wait_ms());
  const std::string key = Core::set_key(table.set());
  for (bool is_late = table.wait_ms() == 0;;) {
    const auto set = call.core.results.find(call.session->id(), table.set());
    if (!set) co_return error_of(set);
    if ((*set)->revision != table.seen() || is_late) co_return results_reply(call, **set);
    const auto woken = co_await call.channel.wait_change(key, deadline);
    if (woken == Channel::Woken::peer_gone || call.session->gone()) co_return peer_gone();
    is_late = woken == Channel::Woken::deadline;
  }
}

Answer list_results(Call& call, const wire::ListResults& table) {
  const std::size_t limit = page_limit(table.limit());
  const auto found =
      call.core.results.list(call.session->id(), pattern_of(table.pattern()), table.after(), limit);
  std::vector<Offset<wire::ResultsInfo>> sets;
  for (const ResultSetRecord* set : found) {
    if (call.builder.GetSize() > kPageBytesUsed) break;
    sets.push_back(pack(call.builder, *set, call.core.store));
  }
  const bool is_last = sets.size() == found.size() && found.size() < limit;
  co_return reply_of(
      wire::CreateResultsDirect(call.builder, &sets, is_last ? 0 : found[sets.size() - 1]->id));
}

}  // namespace

asio::awaitable<Result<Reply>> answer(Call& call, const wire::Request& request) {
  using Body = wire::RequestBody;
  if (request.released() != nullptr) release_views(call, *request.released());
  switch (request.body_type()) {
    case Body::MakeArray:
      return create_array(call, *request.body_as_MakeArray());
    case Body::SealArray:
      return seal_array(call, *request.body_as_SealArray());
    case Body::AbortArray:
      return abort_array(call, *request.body_as_AbortArray());
    case Body::Attach:
      return attach(call, *request.body_as_Attach());
    case Body::Release:
      return nothing_more(call, *request.body_as_Release());
    case Body::Evict:
      return evict(call, *request.body_as_Evict());
    case Body::Pin:
      return pin(call, *request.body_as_Pin());
    case Body::StatArray:
      return stat_array(call, *request.body_as_StatArray());
    case Body::ListArrays:
      return list_arrays(call, *request.body_as_ListArrays());
    case Body::ListClients:
      return list_clients(call, *request.body_as_ListClients());
    case Body::MakeResults:
      return create_results(call, *request.body_as_MakeResults());
    case Body::OpenResults:
      return open_results(call, *request.body_as_OpenResults());
    case Body::LeaseSlot:
      return lease_slot(call, *request.body_as_LeaseSlot());
    case Body::CommitSlot:
      return commit_slot(call, *request.body_as_CommitSlot());
    case Body::FailSlot:
      return fail_slot(call, *request.body_as_FailSlot());
    case Body::GiveBackSlot:
      return give_back_slot(call, *request.body_as_GiveBackSlot());
    case Body::Unmapped:
      return unmapped(call, *request.body_as_Unmapped());
    case Body::WaitResults:
      return wait_results(call, *request.body_as_WaitResults());
    case Body::ListResults:
      return list_results(call, *request.body_as_ListResults());
    case Body::Ping:
      return ping(call, *request.body_as_Ping());
    case Body::Shutdown:
      return shutdown(call, *request.body_as_Shutdown());
    default:
      return [](Call& /*call*/) -> Answer {
        co_return fail(Errc::invalid_argument,
                       "this daemon does not know that request; it may be older than the client");
      }(call);
  }
}

}  // namespace cowmgr
