#include "daemon/peers/connection.hpp"

#include <exception>
#include <unistd.h>

#include <boost/asio/detached.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/peers/channel.hpp"
#include "daemon/requests/reply_room.hpp"
#include "daemon/requests/table.hpp"
#include "proto/fd_socket.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kKeptBytes = 8192;       // of a connection's buffers, between two requests
constexpr std::size_t kMaxCommandBytes = 128;  // of what a client calls itself
constexpr std::size_t kMaxConnections = 256;   // of one session
constexpr std::size_t kMaxLoggedBytes = 1024;  // of why a request was refused, which may name long dtypes

// A connection: its channel, and the buffers that its requests and replies use again and again.
struct Connection {
  Core& core;
  Channel channel;
  std::vector<std::byte> frame{};
  Builder builder{1024};
  std::shared_ptr<Session> session{};  // from the greeting on

  // Nobody keeps a full frame's memory for a request that was large once.
  void trim() {
    if (frame.capacity() > kKeptBytes) std::vector<std::byte>().swap(frame);
    if (builder.GetSize() > kKeptBytes) builder.Reset();
  }
};

// The request in the frame that was received, or null when the connection is to be closed.
const wire::Request* request_of(const Connection& connection, const Peer& peer) {
  const auto* request = verified_root<wire::Request>(connection.frame);
  // The verifier accepts a union whose type is set and whose table is absent.
  if (request != nullptr && request->body() != nullptr) return request;
  connection.core.log.debug(peer.uid, [&] {
    return fmt::format("a connection of process {} is closed: malformed frame of {} bytes", peer.pid,
                       connection.frame.size());
  });
  return nullptr;
}

// Builds the frame of a reply.
std::span<const std::byte> frame_of(Builder& builder, const Reply& reply) {
  builder.Finish(wire::CreateReply(builder, reply.type, reply.body));
  return bytes_of(builder);
}

std::span<const std::byte> frame_of(Builder& builder, const Error& error) {
  builder.Clear();
  const auto body =
      wire::CreateFailure(builder, static_cast<std::uint16_t>(error.code),
                          builder.CreateString(std::string_view(error.message).substr(0, kReplyBytes)));
  return frame_of(builder, Reply{wire::ReplyBody::Failure, body.Union()});
}

Result<std::shared_ptr<Session>> join(Core& core, const Peer& peer, SessionId id) {
  const auto at = core.sessions.find(id);
  // The kernel vouches for the pid: nobody else can join.
  if (at == core.sessions.end() || at->second->peer().pid != peer.pid || at->second->peer().uid != peer.uid) {
    return fail(Errc::permission_denied, fmt::format("session {} is not one of process {}", id, peer.pid));
  }
  if (at->second->connections() >= kMaxConnections) {
    return fail(Errc::quota_exceeded,
                fmt::format("one process may have {} connections at once", kMaxConnections));
  }
  return at->second;
}

SessionId new_session_id(const Core& core, pid_t pid) {
  SessionId id = 0;
  do id = session_id(random_id(), pid);
  while (id == 0 || core.sessions.contains(id));
  return id;
}

std::shared_ptr<Session> open_session(Core& core, const Peer& peer, std::string_view command, UniqueFd pidfd,
                                      SessionId id) {
  const std::string_view shown = command.substr(0, kMaxCommandBytes);
  auto session = std::make_shared<Session>(core, id, peer, check_name(shown) ? std::string(shown) : "?");
  core.sessions.emplace(id, session);
  if (pidfd) asio::co_spawn(core.io, session->watch_process(std::move(pidfd)), asio::detached);
  core.log.debug(peer.uid, [&] {
    return fmt::format("session {} of process {} ({}) begins", id, peer.pid, session->command());
  });
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
  const bool is_there = core.sessions.contains(hello->join());
  if (hello->join() != 0 && (is_there || !hello->resume())) return join(core, peer, hello->join());
  // A session of an earlier daemon: its number says whose it was, and the kernel who asks.
  const bool is_own = is_session_id(hello->join()) && peer.pid > 0 && pid_of(hello->join()) == peer.pid;
  const SessionId id = is_own ? hello->join() : new_session_id(core, peer.pid);
  if (is_own && core.awaited.erase(id) > 0)
    core.log.debug(peer.uid, [&] { return fmt::format("process {} came back to its session", peer.pid); });
  auto session = open_session(core, peer, view_of(hello->command()), std::move(pidfd), id);
  core.store.set_layout(id, hello->layout());
  return session;
}

// Why there is no reply but this, in its place.
tl::unexpected<Error> does_not_fit(std::size_t size_bytes) {
  spdlog::error("a reply of {} bytes does not fit a frame", size_bytes);
  return fail(Errc::invalid_argument, "the reply does not fit a frame; ask for less in one request");
}
tl::unexpected<Error> too_many_descriptors() {
  return fail(Errc::out_of_memory,
              "too many descriptors of the daemon's user are on their way through sockets; "
              "try again, or raise the daemon's limit of open files");
}

// Whether somebody was denied what there is: what whoever runs the daemon is asked about. The rest, as a name
// that is not there, is part of ordinary work.
constexpr bool is_denial(Errc code) noexcept {
  return code == Errc::out_of_memory || code == Errc::quota_exceeded || code == Errc::pinned ||
         code == Errc::permission_denied;
}

// The one place where a refusal is logged: every reply passes here.
void log_refusal(const Call& call, const wire::Request& request, const Error& error) {
  const Peer& peer = call.session->peer();
  const auto level = is_denial(error.code) ? spdlog::level::info : spdlog::level::debug;
  call.core.log.write(level, peer.uid, [&] {
    return fmt::format("{} of process {} of user {} is refused ({}): {}",
                       wire::EnumNameRequestBody(request.body_type()), peer.pid, peer.uid,
                       to_string(error.code), std::string_view(error.message).substr(0, kMaxLoggedBytes));
  });
}

// Answers requests until the connection or the session ends.
asio::awaitable<void> answer_all(Connection& connection) {
  const std::shared_ptr<Session>& session = connection.session;
  using Sent = Channel::Sent;
  while (co_await connection.channel.receive(connection.frame)) {
    const auto* request = request_of(connection, session->peer());
    // The process may have ended while its last frames still lay in the socket: what it held is gone.
    if (request == nullptr || session->gone()) co_return;
    connection.builder.Clear();
    Call call{connection.core, connection.channel.waiter(connection.core.waits), session, connection.builder,
              request->again()};
    auto reply = co_await answer(call, *request);
    // A reply that cannot be sent is not what ends a connection, or its peer would ask again for ever.
    for (bool is_sent = false; !is_sent;) {
      if (session->gone() || call.peer_is_gone) co_return;
      if (reply && reply->type == wire::ReplyBody::NONE) break;
      if (!reply) {
        call.bring_nothing();
        log_refusal(call, *request, reply.error());
      }
      const auto frame =
          reply ? frame_of(connection.builder, *reply) : frame_of(connection.builder, reply.error());
      if (frame.size() > kMaxFrameBytes) {
        reply = does_not_fit(frame.size());
        continue;
      }
      auto sent = connection.channel.try_send(frame, call.fds);
      if (sent == Sent::no_room) sent = co_await connection.channel.send_late(frame, call.fds);
      if (session->gone()) co_return;
      if (sent == Sent::too_many_descriptors)
        reply = too_many_descriptors();
      else if (sent != Sent::yes)
        co_return;
      is_sent = sent == Sent::yes;
    }
    call.grants.keep();
    connection.trim();
  }
}

asio::awaitable<void> converse(Connection& connection, const Peer& peer, UniqueFd pidfd) {
  if (!co_await connection.channel.receive(connection.frame)) co_return;
  const auto* request = request_of(connection, peer);
  if (request == nullptr) co_return;
  auto session = greet(connection.core, peer, *request, std::move(pidfd));
  if (!session) {
    connection.core.log.info(peer.uid, [&] {
      return fmt::format("process {} of user {} is refused: {}", peer.pid, peer.uid, session.error().message);
    });
    (void)connection.channel.try_send(frame_of(connection.builder, session.error()), {});
    co_return;
  }
  connection.session = *std::move(session);
  connection.session->add(connection.channel.fd());
  const auto welcome = wire::CreateWelcomeDirect(
      connection.builder, kProtocolVersion, std::string(kVersion).c_str(),
      connection.core.config.instance.c_str(), connection.session->id(), ::getpid());
  const auto frame = frame_of(connection.builder, Reply{wire::ReplyBody::Welcome, welcome.Union()});
  if (connection.channel.try_send(frame, {}) == Channel::Sent::yes) co_await answer_all(connection);
}

}  // namespace

void refuse(int socket, const Error& error) {
  Builder builder;
  (void)send_frame(socket, frame_of(builder, error), {});
}

asio::awaitable<void> serve(Core& core, Sockets& sockets, UniqueFd socket, Peer peer, UniqueFd pidfd) {
  Connection connection{
      core, Channel(core.io, core.log, std::move(socket), peer.uid, sockets.may_bring_descriptors())};
  try {
    co_await converse(connection, peer, std::move(pidfd));
  } catch (const std::exception& error) {
    // Nothing here throws but for want of memory; then this connection ends, and the others go on.
    core.log.warn(peer.uid, [&] {
      return fmt::format("the connection of process {} is closed: {}", peer.pid, error.what());
    });
  }
  if (connection.session) connection.session->remove(connection.channel.fd());
  sockets.close(connection.channel.take_socket());
}

}  // namespace cowmgr
