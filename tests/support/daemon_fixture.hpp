// A real daemon as a child process, and the fixture whose tests talk to it.
//
// Every test has a daemon, a directory and an instance of its own. When it ends, the daemon must end with 0
// upon SIGTERM, and leave nothing in /dev/shm and nothing in its directory.
#pragma once

#include <chrono>
#include <csignal>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "cowmgr/cowmgr.hpp"
#include "proto/unique_fd.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr::test {

// After this, what was waited for will not come any more. Far beyond what a loaded machine needs.
inline constexpr std::chrono::seconds kDeadline{60};

// Asks again until `holds()`, each time a round trip to the daemon. False when the deadline is over.
template <class Ask>
[[nodiscard]] bool eventually(const Ask& holds) {
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
  }
  return true;
}

// A directory under /tmp that other users may enter; removed with all in it.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::string file(std::string_view name) const { return path_ + "/" + std::string(name); }
  [[nodiscard]] std::vector<std::string> files() const;

 private:
  std::string path_;
};

// The program `name` of this build.
[[nodiscard]] std::string program_path(std::string_view name);
// A name for an instance that nobody else has.
[[nodiscard]] std::string unique_instance();
// What lies in /dev/shm for `instance`.
[[nodiscard]] std::vector<std::string> shm_files(const std::string& instance);
// A descriptor that can be read when the process has ended.
[[nodiscard]] UniqueFd open_pidfd(pid_t pid);
// Waits until `fd` can be read. False when the deadline is over.
[[nodiscard]] bool wait_readable(int fd);
// Waits for the end of a child and reaps it. The exit code, or minus the signal that killed it.
[[nodiscard]] int reap(pid_t pid);

// Bytes that differ from page to page and from seed to seed.
[[nodiscard]] std::vector<std::byte> pattern_bytes(std::size_t size_bytes, unsigned seed = 1);
[[nodiscard]] std::vector<std::byte> copy_of(std::span<const std::byte> bytes);
[[nodiscard]] inline std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// All arrays that `client` may see; none when the daemon refuses.
[[nodiscard]] inline std::vector<ArrayInfo> arrays_of(const Client& client) {
  auto arrays = client.list();
  EXPECT_THAT(arrays, Succeeds());
  return arrays ? *std::move(arrays) : std::vector<ArrayInfo>();
}

class ServiceManager;

// Ends handles before their scope does: what they have mapped counts as used until then.
template <class... Handle>
void drop(Handle&... handles) {
  (static_cast<void>(Handle(std::move(handles))), ...);
}

inline constexpr int kClosed = -2;  // no descriptor at all

// What is started, where that is not the daemon as everybody has it.
struct Launch {
  std::string program = "cowmgr";          // of this build
  std::vector<std::string> environment{};  // "NAME=value", beside that of the test
  int log = -1;                            // its standard error; -1: that of the test; kClosed: none
  bool may_refuse = false;                 // to start: Daemon::serves() tells. Default: the test fails
  std::string group{};                     // directory of the control group that it enters first
  ServiceManager* manager = nullptr;       // hands it what it has stored; null: one of its own, for the start
};

// A running daemon; killed if it still runs when this object goes.
class Daemon {
 public:
  // Starts `cowmgr` and returns when it says that it serves; a test fails when it does not.
  Daemon(std::string socket, std::string instance, const std::vector<std::string>& arguments,
         const Launch& launch = {});
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  [[nodiscard]] const std::string& socket() const noexcept { return socket_; }
  [[nodiscard]] const std::string& instance() const noexcept { return instance_; }
  [[nodiscard]] pid_t pid() const noexcept { return pid_; }
  // False when it refused to start: then wait() says how it ended.
  [[nodiscard]] bool serves() const noexcept { return serves_; }
  // Sends `signal` and waits for the end. Returns what reap() does.
  int stop(int signal);
  // Waits for an end that somebody else brings about.
  int wait();

 private:
  std::string socket_;
  std::string instance_;
  pid_t pid_ = -1;
  bool serves_ = false;
};

// A daemon that is expected to end by itself: how, and what it wrote to standard error.
struct Ended {
  int exit_code = 0;
  std::string log;
};
[[nodiscard]] Ended run_daemon(const std::vector<std::string>& arguments);

// Tests that start their daemon themselves.
class DaemonLifeTest : public testing::Test {
 protected:
  void TearDown() override;

  // A daemon whose arrays go with it.
  Daemon& start(std::vector<std::string> arguments = {});
  // One that leaves them to the next.
  Daemon& start_keeping(const std::vector<std::string>& arguments = {}, const Launch& launch = {});
  // Ends the daemon as an operator would, and checks that it leaves nothing.
  void stop();
  // Unless a test asks for it, clients do not look for another daemon when theirs goes away, nor when it does
  // so just now.
  [[nodiscard]] Client connect(const std::string& command = "test",
                               Milliseconds reconnect = Milliseconds(0)) const;
  [[nodiscard]] std::string socket() const { return directory_.file("s"); }
  [[nodiscard]] const std::string& instance() const noexcept { return instance_; }

  TemporaryDirectory directory_;
  std::string instance_ = unique_instance();
  std::unique_ptr<Daemon> daemon_;
};

// Tests whose daemon leaves its arrays to the next one; the last takes everything away.
class KeepingDaemonTest : public DaemonLifeTest {
 protected:
  void SetUp() override { start_keeping(); }
  void TearDown() override;
  void kill() { EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL); }
  void kill_and_start(const std::vector<std::string>& arguments = {}) {
    kill();
    start_keeping(arguments);
  }
};

class DaemonTest : public DaemonLifeTest {
 protected:
  void SetUp() override { start(); }
};

}  // namespace cowmgr::test
