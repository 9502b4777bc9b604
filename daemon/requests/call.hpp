// One request under way, and its reply.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "daemon/core/session.hpp"
#include "daemon/requests/grants.hpp"
#include "daemon/requests/wire.hpp"

namespace cowmgr {

// One request under way.
struct Call {
  Core& core;
  Waiter waiter;  // waits in the peer's name
  std::shared_ptr<Session> session;
  Builder& builder;              // where the reply is built
  bool is_again;                 // an earlier daemon may have carried the request out already
  std::vector<int> fds{};        // that go with the reply; borrowed
  Grants grants{core, session};  // what it brings
  bool peer_is_gone = false;     // or broke the protocol while it waited: the connection is to be closed

  // The reply is a refusal, or cannot be sent.
  void bring_nothing() {
    fds.clear();
    grants.take_back();
  }
};

// The body of a reply; `none` for requests that have no reply.
struct Reply {
  wire::ReplyBody type = wire::ReplyBody::NONE;
  Offset<void> body;
};

using Answer = asio::awaitable<Result<Reply>>;

template <class Table>
[[nodiscard]] Reply reply_of(Offset<Table> body) {
  return {wire::ReplyBodyTraits<Table>::enum_value, body.Union()};
}
[[nodiscard]] inline Reply done(Call& call) {
  return reply_of(wire::CreateDone(call.builder));
}
[[nodiscard]] inline tl::unexpected<Error> peer_gone(Call& call) {
  call.peer_is_gone = true;
  return fail(Errc::disconnected, "the peer went away");
}
[[nodiscard]] inline Deadline deadline_after(std::uint32_t wait_ms) {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(wait_ms);
}

// Tries until there is room: waits while memory is being given back, or taken only for a while, and looks
// once whether what outsiders hold is free by now. `reserve` returns a Result<T>.
template <class Reserve>
[[nodiscard]] asio::awaitable<std::invoke_result_t<Reserve>> when_there_is_room(Call& call, Reserve reserve) {
  Core& core = call.core;
  const WaitKey key{
      WaitKey::Topic::reclaimed};  // not in the co_await: gcc 12 destroys temporaries there twice
  auto reserved = reserve();
  bool has_looked_outside = false;
  while (!reserved && reserved.error().code == Errc::out_of_memory) {
    if (core.store.expects_room()) {
      if (co_await call.waiter.change(key, Deadline::max()) == Waiter::Woken::peer_gone)
        co_return peer_gone(call);
    } else {
      if (std::exchange(has_looked_outside, true) || core.store.bytes(MemoryState::outside) == 0) break;
      co_await core.reclaimer.look_outside();
    }
    if (call.session->gone()) co_return peer_gone(call);
    reserved = reserve();
  }
  co_return reserved;
}

}  // namespace cowmgr
