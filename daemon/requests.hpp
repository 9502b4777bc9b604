// What a peer may ask for, and the answers: one function for each request of the schema.
#pragma once

#include <memory>
#include <vector>

#include "daemon/session.hpp"
#include "daemon/wire.hpp"

namespace cowmgr {

// One request under way.
struct Call {
  Core& core;
  Channel& channel;
  std::shared_ptr<Session> session;
  Builder& builder;      // where the reply is built
  std::vector<int> fds;  // that go with the reply; borrowed
};

// The body of a reply; `none` for requests that have no reply.
struct Reply {
  wire::ReplyBody type = wire::ReplyBody::NONE;
  Offset<void> body;
};

// Carries out `request`, which has been verified. The frame that it lies in must outlive the coroutine.
[[nodiscard]] asio::awaitable<Result<Reply>> answer(Call& call, const wire::Request& request);

}  // namespace cowmgr
