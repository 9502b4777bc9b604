#include "daemon/serve.hpp"

#include <exception>
#include <unistd.h>

#include <boost/asio/detached.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/requests.hpp"
#include "proto/fd_socket.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kMaxCommandBytes = 128;  // of what a client calls itself
constexpr std::size_t kMaxChannels = 256;      // of one session

// A connection: its channel, and the buffers that its requests and replies use again and again.
struct Connection {
  Core& core;
  Channel channel;
  std::vector<std::byte> frame{};
  Builder builder{1024};
  std::shared_ptr<Session> session{};  // from the greeting on
};

// The next verified request, or null when the connection is to be closed.
asio::awaitable<const wire::Request*> next_request(Connection& connection) {
  if (!co_await connection.channel.receive(connection.frame)) co_return nullptr;
  const auto* request = verified_root<wire::Request>(connection.frame);
  // The verifier accepts a union whose type is set and whose table is absent.
  if (request != nullptr && request->body() != nullptr) co_return request;
  spdlog::debug("a connection is closed: malformed frame of {} bytes", connection.frame.size());
  co_return nullptr;
}

asio::awaitable<Channel::Sent> send_reply(Connection& connection, const Reply& reply,
                                          std::span<const int> fds) {
  connection.builder.Finish(wire::CreateReply(connection.builder, reply.type, reply.body));
  return connection.channel.send(bytes_of(connection.builder), fds);
}

asio::awaitable<Channel::Sent> send_failure(Connection& connection, const Error& error) {
  connection.builder.Clear();
  const auto body = wire::CreateFailureDirect(connection.builder, static_cast<std::uint16_t>(error.code),
                                              error.message.c_str());
  return send_reply(connection, {wire::ReplyBody::Failure, body.Union()}, {});
}

Result<std::shared_ptr<Session>> join(Core& core, const Peer& peer, SessionId id) {
  const auto at = core.sessions.find(id);
  // The kernel vouches for the pid: nobody else can join.
  if (at == core.sessions.end() || at->second->peer().pid != peer.pid || at->second->peer().uid != peer.uid) {
    return fail(Errc::permission_denied, fmt::format("session {} is not one of process {}", id, peer.pid));
  }
  if (at->second->channels() >= kMaxChannels) {
    return fail(Errc::quota_exceeded,
                fmt::format("one process may have {} connections at once", kMaxChannels));
  }
  return at->second;
}

std::shared_ptr<Session> open_session(Core& core, const Peer& peer, std::string_view command,
                                      UniqueFd pidfd) {
  const SessionId id = ++core.last_session;
  const std::string_view shown = command.substr(0, kMaxCommandBytes);
  auto session = std::make_shared<Session>(core, id, peer, check_name(shown) ? std::string(shown) : "?");
  core.sessions.emplace(id, session);
  if (pidfd) asio::co_spawn(core.io, session->watch_process(std::move(pidfd)), asio::detached);
  spdlog::debug("session {} of process {} ({}) begins", id, peer.pid, session->command());
  return session;
}

Result<std::shared_ptr<Session>> greet(Core& core, const Peer& peer, const wire::Request& request,
                                       UniqueFd pidfd) {
  const auto* hello = request.body_as_Hello();
  if (hello == nullptr) return fail(Errc::protocol_error, "the first request must be Hello");
  if (hello->protocol() != kProtocolVersion) {
    return fail(
        Errc::protocol_mismatch,
        fmt::format(
            "this daemon (cowmgr {}) speaks protocol version {}, the client speaks {}; upgrade the older one",
            kVersion, kProtocolVersion, hello->protocol()));
  }
  if (hello->join() != 0) return join(core, peer, hello->join());
  return open_session(core, peer, view_of(hello->command()), std::move(pidfd));
}

// The views that a reply could not bring do not count.
asio::awaitable<Channel::Sent> take_views_back(Connection& connection, const Call& call) {
  for (const ArrayId id : call.views) call.core.store.release(call.session->id(), id, Core::now());
  call.core.settle();
  return send_failure(connection,
                      {Errc::out_of_memory,
                       "too many descriptors of the daemon's user are on their way through sockets; "
                       "try again, or raise the daemon's limit of open files"});
}

// Answers requests until the connection or the session ends.
asio::awaitable<void> answer_all(Connection& connection) {
  const std::shared_ptr<Session>& session = connection.session;
  while (const auto* request = co_await next_request(connection)) {
    // The process may have ended while its last frames still lay in the socket: what it held is gone.
    if (session->gone()) co_return;
    connection.builder.Clear();
    Call call{connection.core, connection.channel, session, connection.builder, {}, {}};
    const auto reply = co_await answer(call, *request);
    if (session->gone() || call.peer_is_gone) co_return;
    if (reply && reply->type == wire::ReplyBody::NONE) continue;
    auto sent = Channel::Sent::connection_ended;
    if (reply)
      sent = co_await send_reply(connection, *reply, call.fds);
    else
      sent = co_await send_failure(connection, reply.error());
    if (session->gone()) co_return;
    if (sent == Channel::Sent::too_many_descriptors && !call.views.empty())
      sent = co_await take_views_back(connection, call);
    if (sent != Channel::Sent::yes) co_return;
  }
}

asio::awaitable<void> converse(Connection& connection, const Peer& peer, UniqueFd pidfd) {
  const auto* request = co_await next_request(connection);
  if (request == nullptr) co_return;
  auto session = greet(connection.core, peer, *request, std::move(pidfd));
  if (!session) {
    spdlog::info("process {} of user {} is refused: {}", peer.pid, peer.uid, session.error().message);
    co_await send_failure(connection, session.error());
    co_return;
  }
  connection.session = *std::move(session);
  connection.session->add(connection.channel);
  const auto welcome = wire::CreateWelcomeDirect(
      connection.builder, kProtocolVersion, std::string(kVersion).c_str(),
      connection.core.config.instance.c_str(), connection.session->id(), ::getpid());
  const Reply reply{wire::ReplyBody::Welcome, welcome.Union()};
  if (co_await send_reply(connection, reply, {}) == Channel::Sent::yes) co_await answer_all(connection);
}

}  // namespace

void refuse(int socket, const Error& error) {
  Builder builder;
  const auto body =
      wire::CreateFailureDirect(builder, static_cast<std::uint16_t>(error.code), error.message.c_str());
  builder.Finish(wire::CreateReply(builder, wire::ReplyBody::Failure, body.Union()));
  (void)send_frame(socket, bytes_of(builder), {});
}

asio::awaitable<void> serve(Core& core, UniqueFd socket, Peer peer, UniqueFd pidfd) {
  Connection connection{core, Channel(core, std::move(socket))};
  core.connections.insert(&connection.channel);
  try {
    co_await converse(connection, peer, std::move(pidfd));
  } catch (const std::exception& error) {
    // Nothing here throws but for want of memory; then this connection ends, and the others go on.
    spdlog::error("the connection of process {} is closed: {}", peer.pid, error.what());
  }
  if (connection.session) connection.session->remove(connection.channel);
  core.connections.erase(&connection.channel);
  core.store.quota().release_session(peer.uid);
}

}  // namespace cowmgr
