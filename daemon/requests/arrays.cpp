// Arrays: made, sealed, viewed, pinned, evicted.
#include <algorithm>
#include <optional>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "daemon/requests/handlers.hpp"
#include "daemon/requests/making.hpp"
#include "daemon/requests/reply_room.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

// Of a reply with names, for those that were passed over.
constexpr std::size_t kPassedOverBytes = kMaxItemBytes + (std::size_t{8} << 10U);

// An array that the session has just got a view of.
Offset<wire::ArrayInfo> pack_view(Call& call, const ArrayRecord& record) {
  call.grants.view(record.id);
  return pack_array(call, record);
}

// A set's memory is written by its workers: whoever made the set cannot end that as if it were the one
// writer.
tl::unexpected<Error> belongs_to_a_set() {
  return fail(Errc::not_holder,
              "this is the array of a result set, which seals itself when all slots are committed");
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

}  // namespace

// ---- Making and viewing ----

Answer create_array(Call& call, const wire::MakeArray& table) {
  const auto request = create_request_of(table, order_of(table.order()));
  if (!request) co_return error_of(request);
  const auto record = co_await make_array(call, *request);
  if (!record) co_return error_of(record);
  call.grants.array((*record)->id);
  co_return created_reply(call, **record);
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

// ---- Changing those that there are ----

namespace {

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

// Calls `some()` until it says that all is done, with the others' turns in between.
template <class Some>
asio::awaitable<Result<void>> in_slices(Call& call, Some some) {
  for (;;) {
    const Result<bool> is_done = some();
    if (!is_done) co_return error_of(is_done);
    if (*is_done) co_return Result<void>();
    co_await asio::post(call.core.io, asio::use_awaitable);
    if (call.session->gone()) co_return peer_gone(call);
  }
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
  auto some = [&] { return call.core.store.search(call.session->id(), selection); };
  if (const auto done = co_await in_slices(call, some); !done) co_return error_of(done);
  co_return selection;
}

void log_change(const Call& call, const std::vector<std::string>& names, std::string_view what) {
  const Peer& peer = call.session->peer();
  for (const auto& name : names) {
    call.core.log.info(peer.uid, [&] {
      return fmt::format("array {} {} by process {} of user {}", printable(name), what, peer.pid, peer.uid);
    });
  }
}

}  // namespace

Answer evict(Call& call, const wire::Evict& table) {
  Store& store = call.core.store;
  const SessionId session = call.session->id();
  if (call.is_again && table.lru_bytes() > 0)
    co_return fail(Errc::disconnected,
                   "the daemon went away while it evicted; look how much is free, then ask for the rest");
  std::optional<Time> asked;
  if (call.is_again) asked = time_at(table.asked_us());
  auto selection = co_await select(call, table);
  if (!selection) co_return error_of(selection);
  if (table.lru_bytes() > 0) selection = store.least_used(session, table.lru_bytes());
  Store::Evicted evicted;
  std::uint64_t held_bytes = 0;
  for (bool is_done = false; !is_done;) {
    const auto done = store.evict_some(session, *selection, evicted, asked);
    if (!done) co_return error_of(done);
    is_done = *done;
    // So that what is free after the answer is free.
    call.core.forget_dropped();
    held_bytes += co_await call.core.reclaimer.reclaim_now();
    if (!is_done) co_await asio::post(call.core.io, asio::use_awaitable);  // it is the others' turn
    if (call.session->gone()) co_return peer_gone(call);
  }
  log_change(call, evicted.names, "evicted");
  evicted.freed_bytes -= std::min(evicted.freed_bytes, held_bytes);
  co_return names_reply(call, evicted);
}

Answer pin(Call& call, const wire::Pin& table) {
  auto selection = co_await select(call, table);
  if (!selection) co_return error_of(selection);
  std::vector<std::string> names;
  auto some = [&] { return call.core.store.pin_some(call.session->id(), *selection, table.pinned(), names); };
  if (const auto done = co_await in_slices(call, some); !done) co_return error_of(done);
  log_change(call, names, table.pinned() ? "pinned" : "unpinned");
  co_return names_reply(call, {.names = std::move(names)});
}

}  // namespace cowmgr
