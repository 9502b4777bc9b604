#include "daemon/requests/requests.hpp"

#include <algorithm>
#include <cerrno>
#include <set>
#include <unistd.h>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/core/undo.hpp"
#include "daemon/requests/bounds.hpp"
#include "daemon/requests/reply_room.hpp"
#include "daemon/requests/result_requests.hpp"
#include "proto/fd_socket.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

// Of a reply with names, for those that were passed over.
constexpr std::size_t kPassedOverBytes = kMaxItemBytes + (std::size_t{8} << 10U);
// How long a seal waits for the kernel to forget a mapping that was just given up.
constexpr auto kSealPatience = std::chrono::milliseconds(200);
constexpr auto kSealRetry = std::chrono::milliseconds(2);

Offset<wire::ArrayInfo> pack_array(Call& call, const ArrayRecord& record) {
  return pack(call.builder, record, protection_of(call.core.env, record.owner.uid, ::geteuid()));
}

// An array that the session has just got a view of.
Offset<wire::ArrayInfo> pack_view(Call& call, const ArrayRecord& record) {
  call.grants.view(record.id);
  return pack_array(call, record);
}

// ---- Arrays ----

Answer create_array(Call& call, const wire::MakeArray& table) {
  const auto request = create_request_of(table, order_of(table.order()));
  if (!request) co_return error_of(request);
  const auto record = co_await make_array(call, *request);
  if (!record) co_return error_of(record);
  call.grants.array((*record)->id);
  co_return created_reply(call, **record);
}

// A set's memory is written by its workers: whoever made the set cannot end that as if it were the one
// writer.
tl::unexpected<Error> belongs_to_a_set() {
  return fail(Errc::not_holder,
              "this is the array of a result set, which seals itself when all slots are committed");
}

Answer seal_array(Call& call, const wire::SealArray& table) {
  if (call.core.results.contains(table.id())) co_return belongs_to_a_set();
  const auto sealed = co_await seal(call, call.session->id(), table.id(), true, table.checksum());
  if (!sealed) co_return error_of(sealed);
  const std::vector<Offset<wire::ArrayInfo>> arrays = {pack_view(call, *call.core.store.find(table.id()))};
  co_return reply_of(wire::CreateArraysDirect(call.builder, &arrays));
}

Answer abort_array(Call& call, const wire::AbortArray& table) {
  if (call.core.results.abort_allocated(call.session->id(), table.id())) {
    co_await call.core.reclaimer.reclaim_now();
    co_return done(call);
  }
  const ArrayRecord* record = call.core.store.find(table.id());
  if (record == nullptr || record->writer != call.session->id()) {
    co_return fail(Errc::not_holder, "this session is not writing such an array");
  }
  if (call.core.results.contains(table.id())) co_return belongs_to_a_set();
  call.core.store.abort(table.id());
  co_await call.core.reclaimer.reclaim_now();
  co_return done(call);
}

// All or nothing.
Result<Reply> views_reply(Call& call, const std::vector<const ArrayRecord*>& records) {
  Page<wire::ArrayInfo> arrays(call.builder);
  for (const ArrayRecord* record : records) {
    arrays.add(pack_view(call, *record));
    call.fds.push_back(record->segment.reader.get());
  }
  if (arrays.is_whole()) return reply_of(wire::CreateArraysDirect(call.builder, &arrays.items()));
  return fail(Errc::invalid_argument,
              "what there is to say of these arrays, their dtypes above all, does not fit a frame; attach "
              "fewer in one request");
}

Answer attach(Call& call, const wire::Attach& table) {
  Core& core = call.core;
  const auto names = strings_of(table.names());
  const auto ids = shape_of(table.ids());
  for (const auto& name : names) {
    if (auto ok = check_name(name); !ok) co_return error_of(std::move(ok));
  }
  const Deadline deadline = deadline_after(table.wait_ms());
  for (;;) {
    const auto found = core.store.attach(call.session->id(), names, ids, Core::now());
    if (found) co_return views_reply(call, *found);
    const std::string* missing = core.store.first_missing(names);
    if (missing == nullptr || table.wait_ms() == 0) co_return error_of(found);
    const WaitKey key{WaitKey::Topic::array_name, 0, *missing};
    const auto woken = co_await call.waiter.change(key, deadline);
    if (woken == Waiter::Woken::peer_gone || call.session->gone()) co_return peer_gone(call);
    if (woken == Waiter::Woken::deadline) {
      co_return fail(Errc::timed_out,
                     fmt::format("array {} did not come within {} ms", printable(*missing), table.wait_ms()));
    }
  }
}

Answer refusal(Error error) {
  co_return tl::unexpected(std::move(error));
}

void release_views(Call& call, const flatbuffers::Vector<std::uint64_t>& ids) {
  const Time now = Core::now();
  for (const ArrayId id : ids) call.core.store.release(call.session->id(), id, now);
}

Answer nothing_more(Call& /*call*/, const wire::Release& /*table*/) {
  co_return Reply{};
}

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

// As many as there is room for, beside `kept_bytes` for the rest of the reply.
Page<flatbuffers::String> pack_names(Call& call, const std::vector<std::string>& names,
                                     std::size_t kept_bytes) {
  Page<flatbuffers::String> texts(call.builder, kept_bytes);
  for (const auto& name : names) {
    if (texts.is_full()) break;
    texts.add(call.builder.CreateString(name));
  }
  return texts;
}

Reply names_reply(Call& call, const Store::Evicted& done) {
  const auto names = pack_names(call, done.names, done.passed_over.empty() ? 0 : kPassedOverBytes);
  const auto pinned = pack_names(call, done.passed_over, names.size() * sizeof(Offset<flatbuffers::String>));
  return reply_of(wire::CreateNamesDirect(call.builder, &names.items(), done.names.size(), done.freed_bytes,
                                          &pinned.items()));
}

// What a request to change arrays is about, found. Errors: invalid_argument.
template <class Table>
asio::awaitable<Result<Selection>> select(Call& call, const Table& table) {
  Selection selection;
  if (table.names() != nullptr) {
    selection.names = strings_of(table.names());
  } else if (table.match()) {
    for (const auto& text : strings_of(table.patterns())) {
      auto pattern = Glob::parse(text);
      if (!pattern) co_return error_of(std::move(pattern));
      selection.patterns.push_back(*std::move(pattern));
    }
  } else {
    auto both = call.core.store.names_or_patterns(strings_of(table.patterns()));
    if (!both) co_return error_of(std::move(both));
    selection = *std::move(both);
  }
  for (;;) {
    const auto is_over = call.core.store.search(call.session->id(), selection);
    if (!is_over) co_return error_of(is_over);
    if (*is_over) co_return selection;
    co_await asio::post(call.core.io, asio::use_awaitable);  // it is the others' turn
    if (call.session->gone()) co_return peer_gone(call);
  }
}

void log_change(const Call& call, const std::vector<std::string>& names, std::string_view what) {
  const Peer& peer = call.session->peer();
  for (const auto& name : names) {
    call.core.log.info(peer.uid, [&] {
      return fmt::format("array {} {} by process {} of user {}", printable(name), what, peer.pid, peer.uid);
    });
  }
}

Answer evict(Call& call, const wire::Evict& table) {
  const SessionId session = call.session->id();
  if (call.is_again && table.lru_bytes() > 0)
    co_return fail(Errc::disconnected,
                   "the daemon went away while it evicted; look how much is free, then ask for the rest");
  std::optional<Time> asked;
  if (call.is_again) asked = time_at(table.asked_us());
  const auto selection = co_await select(call, table);
  if (!selection) co_return error_of(selection);
  auto evicted = table.lru_bytes() > 0 ? call.core.store.evict_lru(session, table.lru_bytes())
                                       : call.core.store.evict(session, *selection, asked);
  if (!evicted) co_return error_of(std::move(evicted));
  log_change(call, evicted->names, "evicted");
  // So that what is free after the answer is free.
  const std::uint64_t held_bytes = co_await call.core.reclaimer.reclaim_now();
  evicted->freed_bytes -= std::min(evicted->freed_bytes, held_bytes);
  co_return names_reply(call, *evicted);
}

Answer pin(Call& call, const wire::Pin& table) {
  const auto selection = co_await select(call, table);
  if (!selection) co_return error_of(selection);
  auto names = call.core.store.pin(call.session->id(), *selection, table.pinned());
  if (!names) co_return error_of(names);
  log_change(call, *names, table.pinned() ? "pinned" : "unpinned");
  co_return names_reply(call, {.names = *std::move(names)});
}

// ---- Looking ----

Offset<wire::ClientInfo> pack_client(Call& call, const Session& session) {
  const auto use = call.core.store.use_of(session.id());
  const auto command = call.builder.CreateString(session.command());
  return wire::CreateClientInfo(call.builder, session.id(), session.peer().pid, session.peer().uid, command,
                                static_cast<std::uint32_t>(session.connections()), use.views, use.view_bytes,
                                use.writing, call.core.results.leases_of(session.id()),
                                microseconds(session.connected()));
}

Answer stat_array(Call& call, const wire::StatArray& table) {
  Core& core = call.core;
  const auto found = core.store.find(call.session->id(), view_of(table.name()));
  if (!found) co_return error_of(found);
  const ArrayId id = (*found)->id;
  SegmentUsage usage;
  if (const Segment& segment = (*found)->segment; segment.reader) {
    auto copy = reader_of(segment);
    if (!copy) co_return error_of(copy);
    auto work = [&env = core.env, from = *std::move(copy)] { return env.usage(from); };
    const auto measured =
        co_await core.background.run(LaneKind::scan, call.session->peer().uid, std::move(work));
    if (!measured) co_return error_of(measured);
    usage = *measured;
  }
  if (call.session->gone()) co_return peer_gone(call);
  const ArrayRecord* record = core.store.find(id);
  if (record == nullptr) co_return fail(Errc::not_found, "the array went away meanwhile");
  std::vector<const Session*> viewers;
  for (const auto& [session, peer] : core.sessions) {
    if (core.store.views_of(session, id) > 0) viewers.push_back(peer.get());
  }
  std::ranges::sort(viewers, {}, &Session::connected);
  const auto array = pack_array(call, *record);
  Page<wire::ClientInfo> holders(call.builder);
  for (const Session* viewer : viewers) {
    if (!holders.is_full()) holders.add(pack_client(call, *viewer));
  }
  co_return reply_of(wire::CreateArrayDetailsDirect(call.builder, array, usage.resident_bytes,
                                                    usage.huge_bytes, &holders.items()));
}

Answer list_arrays(Call& call, const wire::ListArrays& table) {
  const std::size_t limit = page_limit(table.limit());
  const auto filter = filter_of(table.name(), table.pattern());
  if (!filter) co_return error_of(filter);
  const auto page = call.core.store.list(call.session->id(), *filter, table.after(), limit);
  Page<wire::ArrayInfo> arrays(call.builder);
  for (const ArrayRecord* record : page.entries) {
    if (arrays.is_full()) break;
    arrays.add(pack_array(call, *record));
  }
  const bool is_whole = arrays.size() == page.entries.size();
  co_return reply_of(wire::CreateArraysDirect(call.builder, &arrays.items(),
                                              is_whole ? page.next : page.entries[arrays.size() - 1]->id));
}

Answer list_clients(Call& call, const wire::ListClients& table) {
  const std::size_t limit = page_limit(table.limit());
  Page<wire::ClientInfo> clients(call.builder);
  SessionId next = 0;
  for (auto at = call.core.sessions.upper_bound(table.after()); at != call.core.sessions.end(); ++at) {
    if (clients.size() == limit || clients.is_full()) break;
    clients.add(pack_client(call, *at->second));
    next = std::next(at) == call.core.sessions.end() ? 0 : at->first;
  }
  co_return reply_of(wire::CreateClientsDirect(call.builder, &clients.items(), next));
}

Answer ping(Call& call, const wire::Ping& /*table*/) {
  Core& core = call.core;
  const MemoryUse use = core.store.memory_use();
  const auto memory = pack(call.builder, use.states);
  co_return reply_of(wire::CreatePongDirect(
      call.builder, std::string(kVersion).c_str(), core.config.instance.c_str(), core.config.socket.c_str(),
      ::getpid(), ::geteuid(), microseconds(core.started),
      protection_of(core.env, call.session->peer().uid, ::geteuid()), use.capacity_bytes, use.used_bytes,
      use.pinned_bytes, use.evictable_bytes, use.viewed_bytes, static_cast<std::uint32_t>(core.store.size()),
      static_cast<std::uint32_t>(core.sessions.size()), static_cast<std::uint32_t>(core.results.size()),
      memory));
}

Answer shutdown(Call& call, const wire::Shutdown& table) {
  const uid_t uid = call.session->peer().uid;
  if (uid != 0 && uid != ::geteuid()) {
    co_return fail(Errc::permission_denied,
                   fmt::format("only user {} or root may stop this daemon", ::geteuid()));
  }
  spdlog::info("stopping: asked to by process {}", call.session->peer().pid);
  call.core.purges = call.core.purges || table.purge();
  asio::post(call.core.io, call.core.stop);  // after the answer is on its way
  co_return done(call);
}

}  // namespace

// ---- What both kinds of requests need ----

tl::unexpected<Error> not_backed(const Core& core, std::uint64_t size_bytes, const Error& error) {
  const auto space = core.env.space();
  if (error.code != Errc::out_of_memory || space.free_bytes >= size_bytes) return tl::unexpected(error);
  return fail(Errc::out_of_memory,
              fmt::format("this needs {}, but of the {} of /dev/shm only {} are free, whatever the capacity "
                          "says ({}); remove files "
                          "there, evict arrays, or enlarge it with `mount -o remount,size=... /dev/shm`",
                          format_size(size_bytes), format_size(space.total_bytes),
                          format_size(space.free_bytes), format_size(core.config.capacity_bytes)));
}

asio::awaitable<Result<const ArrayRecord*>> make_array(Call& call, const CreateRequest& request) {
  Core& core = call.core;
  auto reserve = [&] { return core.store.reserve(call.session->id(), request, Core::now()); };
  const auto reserved = co_await when_there_is_room(call, reserve);
  if (!reserved) co_return error_of(reserved);
  Undo unbacked([&core, id = *reserved] {
    core.store.fail_backing(id);
    core.waits.wake({WaitKey::Topic::reclaimed});
  });
  const ArrayRecord& record = *core.store.find(*reserved);
  auto work = [session = call.session, &env = core.env, id = record.id, size = record.segment_bytes(),
               header = record.header, trailer = trailer_page(record)] {
    return env.create(id, size, header, trailer, session->gone());
  };
  auto segment =
      co_await core.background.run_sized(record.segment_bytes(), record.owner.uid, std::move(work));
  if (!segment) co_return not_backed(core, data_bytes(request.spec).value_or(0), segment.error());
  unbacked.keep();
  auto backed = core.store.back(*reserved, *std::move(segment));
  co_return backed;
}

Reply created_reply(Call& call, const ArrayRecord& record) {
  call.fds = {record.segment.writer.get(), record.segment.reader.get()};
  const Peer& peer = call.session->peer();
  call.core.log.debug(peer.uid, [&] {
    return fmt::format("array {} (#{}) is being written by process {}", printable(record.name), record.id,
                       peer.pid);
  });
  return reply_of(wire::CreateCreated(call.builder, pack_array(call, record)));
}

asio::awaitable<Result<void>> seal(Call& call, SessionId writer, ArrayId id, bool keep_view,
                                   std::uint64_t checksum) {
  Core& core = call.core;
  const Deadline deadline = std::chrono::steady_clock::now() + kSealPatience;
  asio::steady_timer timer(core.io);
  for (;;) {
    const auto sealed = core.store.seal(writer, id, keep_view, Core::now(), checksum);
    if (!sealed) co_return error_of(sealed);
    if (*sealed) break;
    if (std::chrono::steady_clock::now() >= deadline) {
      const std::string who = co_await core.writers_in_words(id);
      co_return fail(
          Errc::still_writable,
          fmt::format("the array can still be written by {}; unmap and close it there, then seal again",
                      who));
    }
    timer.expires_after(kSealRetry);
    co_await timer.async_wait(asio::use_awaitable);
    if (call.session->gone()) co_return peer_gone(call);
  }
  // Without a view it may have gone at once: a newer version of the name was sealed before.
  if (const ArrayRecord* record = core.store.find(id)) {
    const Peer& peer = call.session->peer();
    core.log.info(peer.uid, [&] {
      return fmt::format("array {} version {} (#{}, {}) sealed by process {}", printable(record->name),
                         record->version, id, format_size(record->data_bytes), peer.pid);
    });
  }
  co_return Result<void>();
}

std::size_t page_limit(std::uint32_t asked) {
  return asked == 0 ? kPageItems : std::min<std::size_t>(asked, kPageItems);
}

Result<NameFilter> filter_of(const flatbuffers::String* name, const flatbuffers::String* pattern) {
  NameFilter filter;
  if (name != nullptr) filter.name = view_of(name);
  if (name != nullptr || pattern == nullptr || pattern->size() == 0) return filter;
  auto parsed = Glob::parse(view_of(pattern));
  if (!parsed) return error_of(std::move(parsed));
  filter.pattern = *std::move(parsed);
  return filter;
}

Answer answer(Call& call, const wire::Request& request) {
  using Body = wire::RequestBody;
  if (request.released() != nullptr) release_views(call, *request.released());
  if (auto ok = check_bounds(request); !ok) return refusal(std::move(ok).error());
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
    case Body::LeaseSlots:
      return lease_slots(call, *request.body_as_LeaseSlots());
    case Body::AllocateSlot:
      return allocate_slot(call, *request.body_as_AllocateSlot());
    case Body::CommitSlots:
      return commit_slots(call, *request.body_as_CommitSlots());
    case Body::FailSlot:
      return fail_slot(call, *request.body_as_FailSlot());
    case Body::GiveBackSlots:
      return give_back_slots(call, *request.body_as_GiveBackSlots());
    case Body::Unmapped:
      return unmapped(call, *request.body_as_Unmapped());
    case Body::WaitResults:
      return wait_results(call, *request.body_as_WaitResults());
    case Body::CancelResults:
      return cancel_results(call, *request.body_as_CancelResults());
    case Body::ListResults:
      return list_results(call, *request.body_as_ListResults());
    case Body::Ping:
      return ping(call, *request.body_as_Ping());
    case Body::Hold:
      return hold(call, *request.body_as_Hold());
    case Body::Shutdown:
      return shutdown(call, *request.body_as_Shutdown());
    default:
      return refusal({Errc::invalid_argument,
                      "this daemon does not know that request; it may be older than the client"});
  }
}

}  // namespace cowmgr
