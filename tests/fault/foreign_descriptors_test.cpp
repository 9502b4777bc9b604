// Descriptors that nobody asked for: whoever closes the last one of a socket may have to wait for it as long
// as a stranger liked. The daemon's loop never does.
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <memory>
#include <netinet/in.h>
#include <optional>
#include <span>
#include <string>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"
#include "tests/support/broken_calls.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

constexpr int kPassRights = 83;  // SO_PASSRIGHTS: Linux 6.16
// Whoever waits for it is given up before.
constexpr int kLingerSeconds = 2 * static_cast<int>(std::chrono::seconds(kDeadline).count());

auto ping() {
  return [](Builder& b) { return wire::CreatePing(b); };
}

bool kernel_refuses_descriptors() {
  const UniqueFd probe(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
  int value = 0;
  socklen_t bytes = sizeof value;
  return ::getsockopt(probe.get(), SOL_SOCKET, kPassRights, &value, &bytes) == 0;
}

// A TCP connection over which more was sent than the other end has taken: to close its last descriptor takes
// kLingerSeconds, or until the other end reads.
class Lingering {
 public:
  Lingering() {
    const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof address;
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(listener.get(), generic, bytes), 0);
    EXPECT_EQ(::listen(listener.get(), 1), 0);
    EXPECT_EQ(::getsockname(listener.get(), generic, &bytes), 0);
    near_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(near_.get(), generic, bytes), 0);
    far_.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const std::vector<std::byte> data(std::size_t{1} << 16U);
    while (::send(near_.get(), data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
    }
    EXPECT_EQ(errno, EAGAIN);
    const linger how{1, kLingerSeconds};
    EXPECT_EQ(::setsockopt(near_.get(), SOL_SOCKET, SO_LINGER, &how, sizeof how), 0);
  }
  // The descriptor that is to be passed; whoever has passed it closes it.
  [[nodiscard]] UniqueFd take() { return std::move(near_); }

 private:
  UniqueFd near_;
  UniqueFd far_;  // never read
};

// The daemon does nothing as long as this lives: whoever passes a descriptor and closes its own leaves the
// last one to the daemon.
class Paused {
 public:
  explicit Paused(pid_t daemon) : daemon_(daemon) {
    int status = 0;
    EXPECT_EQ(::kill(daemon_, SIGSTOP), 0);
    EXPECT_EQ(::waitpid(daemon_, &status, WUNTRACED), daemon_);
    EXPECT_TRUE(WIFSTOPPED(status));
  }
  ~Paused() { ::kill(daemon_, SIGCONT); }
  Paused(const Paused&) = delete;
  Paused& operator=(const Paused&) = delete;

 private:
  pid_t daemon_;
};

class ForeignDescriptors : public DaemonLifeTest {
 protected:
  // A daemon on a kernel that passes descriptors to every socket, asked for or not.
  void start_on_an_older_kernel(std::vector<std::string> arguments = {}) {
    arguments.emplace_back("--purge");
    start_keeping(arguments,
                  {.program = "cowmgr-broken", .environment = {std::string(kPassesRightsVariable) + "=1"}});
  }

  // Sends a frame with the last descriptor of a connection that lingers. False when the kernel refuses it.
  [[nodiscard]] bool pass(const RawPeer& peer, std::span<const std::byte> bytes) {
    const UniqueFd passed = lingering_.emplace_back().take();
    const int fd = passed.get();
    const auto sent = send_frame(peer.socket(), bytes, {&fd, 1});
    if (sent && *sent) return true;
    const linger off{};  // it is this process that closes it
    ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &off, sizeof off);
    return false;
  }
  [[nodiscard]] bool pass_with_ping(const RawPeer& peer) {
    Builder builder;
    return pass(peer, RawPeer::frame_of(builder, ping()));
  }
  [[nodiscard]] Paused pause() const { return Paused(daemon_->pid()); }
  // Nobody has read what the passed connections hold: what was closed by now, somebody else waited for.
  void expect_others_are_served() { EXPECT_NE(witness_->ask<wire::Pong>(ping()), nullptr); }
  void connect_witness() { witness_.emplace(RawPeer::greeted(socket())); }

  [[nodiscard]] std::size_t open_files() const {
    const std::filesystem::directory_iterator files("/proc/" + std::to_string(daemon_->pid()) + "/fd");
    return static_cast<std::size_t>(std::distance(begin(files), end(files)));
  }

  std::optional<RawPeer> witness_;
  std::vector<Lingering> lingering_;
};

TEST_F(ForeignDescriptors, AreRefusedByTheKernelWhereItCan) {
  if (!kernel_refuses_descriptors()) GTEST_SKIP() << "Linux before 6.16";
  start();
  connect_witness();
  RawPeer stranger(socket());
  RawPeer peer = RawPeer::greeted(socket());
  {
    const Paused paused = pause();
    EXPECT_FALSE(pass_with_ping(stranger));
    EXPECT_FALSE(pass_with_ping(peer));
  }
  expect_others_are_served();
  EXPECT_NE(peer.ask<wire::Pong>(ping()), nullptr) << "nothing has come, so nothing is wrong";
}

TEST_F(ForeignDescriptors, OfAGreetingHoldNobodyUp) {
  start_on_an_older_kernel();
  connect_witness();
  RawPeer stranger(socket());
  {
    const Paused paused = pause();
    ASSERT_TRUE(pass_with_ping(stranger));
  }
  EXPECT_TRUE(stranger.is_hung_up());
  expect_others_are_served();
}

TEST_F(ForeignDescriptors, OfARequestHoldNobodyUp) {
  start_on_an_older_kernel();
  connect_witness();
  RawPeer peer = RawPeer::greeted(socket());
  {
    const Paused paused = pause();
    ASSERT_TRUE(pass_with_ping(peer));
  }
  EXPECT_TRUE(peer.is_hung_up()) << "who passes descriptors breaks the protocol";
  expect_others_are_served();
}

// They lie behind a request that waits, and behind frames that nobody will read.
TEST_F(ForeignDescriptors, InTheQueueOfAConnectionThatEndsHoldNobodyUp) {
  start_on_an_older_kernel();
  connect_witness();
  for (const bool is_junk : {false, true}) {
    RawPeer peer = RawPeer::greeted(socket());
    auto paused = std::make_unique<Paused>(daemon_->pid());
    if (is_junk)
      ASSERT_TRUE(peer.send(std::vector<std::byte>(10)));
    else
      ASSERT_TRUE(peer.request([](Builder& b) {
        const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString("never")};
        return wire::CreateAttachDirect(b, &names, nullptr, 3'600'000);
      }));
    ASSERT_TRUE(pass_with_ping(peer));
    peer.hang_up();
    paused.reset();
    expect_others_are_served();
  }
}

TEST_F(ForeignDescriptors, OfWhoIsNotServedHoldNobodyUp) {
  start_on_an_older_kernel({"--owner-sessions", "1"});
  connect_witness();
  auto paused = std::make_unique<Paused>(daemon_->pid());
  RawPeer refused(socket());
  ASSERT_TRUE(pass_with_ping(refused));
  paused.reset();
  EXPECT_TRUE(refused.is_hung_up());
  expect_others_are_served();
}

// Neither those that the daemon has read, nor those of a connection that it has not even accepted.
TEST_F(ForeignDescriptors, DoNotHoldUpTheEnd) {
  start_on_an_older_kernel();
  RawPeer peer = RawPeer::greeted(socket());
  auto paused = std::make_unique<Paused>(daemon_->pid());
  RawPeer late(socket());
  ASSERT_TRUE(pass_with_ping(late));
  ASSERT_TRUE(pass_with_ping(peer));
  ::kill(daemon_->pid(), SIGTERM);
  paused.reset();
  EXPECT_EQ(daemon_->wait(), 0);
  daemon_.reset();
}

// What is being closed counts as its user's, and is closed in the end, though the other side never reads.
TEST_F(ForeignDescriptors, AreClosedInTheEnd) {
  start_on_an_older_kernel({"--owner-sessions", "4"});
  connect_witness();
  const std::size_t before = open_files();
  for (int i = 0; i < 20; ++i) {
    std::optional<RawPeer> peer;
    ASSERT_TRUE(eventually([&] {
      peer.emplace(socket());
      return peer->ask<wire::Welcome>(
                 [](Builder& b) { return wire::CreateHelloDirect(b, kProtocolVersion, "raw"); }) != nullptr;
    })) << "after "
        << i;
    const Paused paused = pause();
    ASSERT_TRUE(pass_with_ping(*peer));
  }
  expect_others_are_served();
  EXPECT_TRUE(eventually([&] { return open_files() <= before; }));
}

}  // namespace
}  // namespace cowmgr::test
