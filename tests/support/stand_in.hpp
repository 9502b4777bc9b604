// What listens in a daemon's place and answers what a test wants: a daemon that dies of a request, or lies.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <functional>
#include <memory>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"
#include "proto/frames.hpp"
#include "proto/unique_fd.hpp"
#include "proto/version.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {

class StandIn {
 public:
  using Builder = flatbuffers::FlatBufferBuilder;
  struct Answer {
    wire::ReplyBody type = wire::ReplyBody::NONE;  // NONE: it dies
    flatbuffers::Offset<void> body{};
    std::vector<int> fds{};
    std::vector<std::byte> bytes{};  // the frame, if it is none of the protocol's
  };
  // Answers a request; greetings, and what a client holds, are answered already.
  using Script = std::function<Answer(const wire::Request&, Builder&)>;

  template <class Table>
  [[nodiscard]] static Answer say(flatbuffers::Offset<Table> table, std::vector<int> fds = {}) {
    return {wire::ReplyBodyTraits<Table>::enum_value, table.Union(), std::move(fds), {}};
  }
  [[nodiscard]] static Answer die() { return {}; }

  // Dies `deaths` times at most: then nobody listens any more.
  StandIn(std::string path, Script script, int deaths = 0)
      : path_(std::move(path)), script_(std::move(script)), lives_(deaths), stop_(::eventfd(0, EFD_CLOEXEC)) {
    listen();
    thread_ = std::thread([this] { run(); });
  }
  StandIn(const StandIn&) = delete;
  StandIn& operator=(const StandIn&) = delete;
  ~StandIn() {
    (void)::eventfd_write(stop_.get(), 1);
    thread_.join();
    ::unlink(path_.c_str());
  }

  [[nodiscard]] int deaths() const noexcept { return deaths_; }

 private:
  void listen() {
    auto listener = listen_at(path_, 0600);
    EXPECT_THAT(listener, Succeeds());
    if (listener) listener_ = *std::move(listener);
  }

  void run() {
    for (;;) {
      std::vector<pollfd> polls = {{stop_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
      for (const UniqueFd& peer : peers_) polls.push_back({peer.get(), POLLIN, 0});
      if (::poll(polls.data(), polls.size(), -1) < 0 && errno != EINTR) return;
      if (polls[0].revents != 0) return;
      for (std::size_t i = 2; i < polls.size(); ++i) {
        if (polls[i].revents == 0 || serve(peers_[i - 2])) continue;
        if (!rise_again()) return;
        break;
      }
      if (polls[1].revents != 0 && polls.size() == peers_.size() + 2)
        peers_.emplace_back(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    }
  }

  // False when it dies of what the peer asks.
  bool serve(UniqueFd& peer) {
    auto frame = receive_frame(peer.get(), {buffer_.get(), kMaxFrameBytes});
    if (!frame || !*frame) {
      peer.reset();
      return true;
    }
    const auto* request = verified_root<wire::Request>((*frame)->bytes);
    if (request == nullptr || request->body() == nullptr) return true;
    builder_.Clear();
    const Answer answer = answer_to(*request);
    if (!answer.bytes.empty()) return send_frame(peer.get(), answer.bytes).has_value();
    if (answer.type == wire::ReplyBody::NONE) return false;
    builder_.Finish(wire::CreateReply(builder_, answer.type, answer.body));
    (void)send_frame(peer.get(), bytes_of(builder_), answer.fds);
    return true;
  }

  Answer answer_to(const wire::Request& request) {
    if (request.body_as_Hello() != nullptr)
      return say(wire::CreateWelcomeDirect(builder_, kProtocolVersion, "stand-in", "test", 7, ::getpid()));
    if (request.body_as_Hold() != nullptr) return say(wire::CreateDone(builder_));
    return script_(request, builder_);
  }

  bool rise_again() {
    ++deaths_;
    peers_.clear();
    listener_.reset();
    ::unlink(path_.c_str());
    if (deaths_ >= lives_) return false;
    listen();
    return true;
  }

  std::string path_;
  Script script_;
  int lives_;
  UniqueFd stop_;
  UniqueFd listener_;
  std::vector<UniqueFd> peers_;
  std::unique_ptr<std::byte[]> buffer_{new std::byte[kMaxFrameBytes]};
  Builder builder_;
  std::atomic<int> deaths_{0};
  std::thread thread_;
};

}  // namespace cowmgr::test
