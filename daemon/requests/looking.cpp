// What there is: arrays, clients, the daemon itself.
#include <algorithm>
#include <unistd.h>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/requests/handlers.hpp"
#include "daemon/requests/making.hpp"
#include "daemon/requests/reply_room.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

Offset<wire::ClientInfo> pack_client(Call& call, const Session& session) {
  const auto use = call.core.store.use_of(session.id());
  const auto command = call.builder.CreateString(session.command());
  return wire::CreateClientInfo(call.builder, session.id(), session.peer().pid, session.peer().uid, command,
                                static_cast<std::uint32_t>(session.connections()), use.views, use.view_bytes,
                                use.writing, call.core.results.leases_of(session.id()),
                                microseconds(session.connected()));
}

}  // namespace

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
  const auto next = add_all(arrays, page, [&](const auto& record) { return pack_array(call, record); });
  co_return reply_of(wire::CreateArraysDirect(call.builder, &arrays.items(), next));
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

}  // namespace cowmgr
