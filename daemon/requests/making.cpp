#include "daemon/requests/making.hpp"

#include <algorithm>
#include <unistd.h>

#include <fmt/format.h>

#include "daemon/core/undo.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

// How long a seal waits for the kernel to forget a mapping that was just given up.
constexpr auto kSealPatience = std::chrono::milliseconds(200);
constexpr auto kSealRetry = std::chrono::milliseconds(2);

}  // namespace

Offset<wire::ArrayInfo> pack_array(Call& call, const ArrayRecord& record) {
  return pack(call.builder, record, protection_of(call.core.env, record.owner.uid, ::geteuid()));
}

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
  const auto header = header_of(record);
  if (!header) co_return error_of(header);
  auto work = [session = call.session, &env = core.env, id = record.id, size = record.segment_bytes(),
               header = *header, trailer = trailer_page(record)] {
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

}  // namespace cowmgr
