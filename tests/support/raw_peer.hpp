// A peer that does not use the client library: any bytes, any frames, any lies.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <sys/socket.h>
#include <sys/time.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"
#include "proto/frames.hpp"
#include "proto/unique_fd.hpp"
#include "proto/version.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {

class RawPeer {
 public:
  using Builder = flatbuffers::FlatBufferBuilder;

  // Connects, and says nothing.
  explicit RawPeer(const std::string& path) {
    auto connected = connect_to(path);
    EXPECT_THAT(connected, Succeeds());
    if (connected) socket_ = *std::move(connected);
    const timeval deadline{std::chrono::seconds(kDeadline).count(), 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof deadline);
  }

  // Connects, and introduces itself as a good client does.
  [[nodiscard]] static RawPeer greeted(const std::string& path) {
    RawPeer peer(path);
    const auto* welcome = peer.ask<wire::Welcome>(
        [](Builder& b) { return wire::CreateHelloDirect(b, kProtocolVersion, "raw"); });
    EXPECT_NE(welcome, nullptr);
    if (welcome != nullptr) peer.session_ = welcome->session();
    return peer;
  }

  // Another connection of that peer's session.
  [[nodiscard]] static RawPeer joined(const std::string& path, const RawPeer& first) {
    RawPeer peer(path);
    const auto* welcome = peer.ask<wire::Welcome>(
        [&](Builder& b) { return wire::CreateHelloDirect(b, kProtocolVersion, "raw", first.session()); });
    EXPECT_NE(welcome, nullptr);
    peer.session_ = first.session();
    return peer;
  }

  // Sends one record. False when the connection is closed.
  bool send(std::span<const std::byte> bytes) {
    return ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) >= 0;
  }

  // Sends a well-formed request, without waiting for the answer.
  template <class Build>
  bool request(const Build& build) {
    Builder builder;
    return send(frame_of(builder, build));
  }

  template <class Build>
  [[nodiscard]] static std::span<const std::byte> frame_of(Builder& builder, const Build& build) {
    const auto table = build(builder);
    builder.Finish(wire::CreateRequest(builder, type_of(table), table.Union()));
    return bytes_of(builder);
  }

  // The next reply, valid until the next one; null when the daemon closed the connection.
  [[nodiscard]] const wire::Reply* receive() {
    auto frame = receive_frame(socket_.get(), {buffer_.get(), kMaxFrameBytes});
    is_closed_ = !frame;
    if (is_closed_) return nullptr;
    EXPECT_TRUE(*frame) << "the daemon neither answers nor hangs up";
    if (!*frame) return nullptr;
    fds_ = std::move((*frame)->fds);
    const auto* reply = verified_root<wire::Reply>((*frame)->bytes);
    EXPECT_NE(reply, nullptr);
    return reply;
  }

  // A request and its answer; null when it is of another type, or none.
  template <class Body, class Build>
  [[nodiscard]] const Body* ask(const Build& build) {
    if (!request(build)) return nullptr;
    const auto* reply = receive();
    return reply == nullptr ? nullptr : reply->body_as<Body>();
  }

  // Why a request was refused.
  template <class Build>
  [[nodiscard]] Error refusal(const Build& build) {
    const auto* failure = ask<wire::Failure>(build);
    if (failure == nullptr) return {};
    return {static_cast<Errc>(failure->code()), std::string(view_of(failure->message()))};
  }

  // Waits for the end of the connection, passing over answers.
  [[nodiscard]] bool is_hung_up() {
    while (receive() != nullptr) {
    }
    return is_closed_;
  }

  [[nodiscard]] std::vector<UniqueFd>& fds() noexcept { return fds_; }
  [[nodiscard]] int socket() const noexcept { return socket_.get(); }
  [[nodiscard]] std::uint64_t session() const noexcept { return session_; }
  void hang_up() noexcept { socket_.reset(); }

 private:
  template <class Table>
  static constexpr wire::RequestBody type_of(flatbuffers::Offset<Table> /*table*/) {
    return wire::RequestBodyTraits<Table>::enum_value;
  }

  UniqueFd socket_;
  std::unique_ptr<std::byte[]> buffer_{new std::byte[kMaxFrameBytes]};
  std::vector<UniqueFd> fds_;
  std::uint64_t session_ = 0;
  bool is_closed_ = false;
};

}  // namespace cowmgr::test
