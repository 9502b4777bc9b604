#include "tests/bench/restart.hpp"

#include <array>
#include <csignal>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

namespace cowmgr::bench {
namespace {

constexpr std::uint64_t kArrayBytes = 64 << 10;

std::filesystem::path make_directory() {
  std::string path = std::filesystem::temp_directory_path() / "cowmgr-bench-XXXXXX";
  COWMGR_ASSERT(::mkdtemp(path.data()) != nullptr);
  return path;
}

// Asks at once, and again: how soon it answers is what counts.
Client connect_soon(const std::string& socket) {
  for (;;) {
    auto client = Client::connect({.socket = socket, .reconnect = Milliseconds(0)});
    if (client && client->ping()) return *std::move(client);
    ::sched_yield();
  }
}

}  // namespace

RestartedDaemon::RestartedDaemon(std::uint64_t arrays) : directory_(make_directory()) {
  start();
  const Client client = connect_soon(directory_ / "s");
  for (std::uint64_t i = 0; i < arrays; ++i) {
    auto writer =
        value_of(client.create(fmt::format("restart/{}", i), {Dtype::of<std::uint8_t>(), {kArrayBytes}}));
    (void)value_of(writer.seal());
  }
}

RestartedDaemon::~RestartedDaemon() {
  if (connect_soon(directory_ / "s").shutdown(true)) ::waitpid(pid_, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

void RestartedDaemon::kill() noexcept {
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

void RestartedDaemon::start() {
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "cowmgr";
  std::array<std::string, 7> words = {
      program, "--socket", directory_ / "s", "--instance", directory_.filename(), "--log-level", "warning"};
  std::array<char*, words.size() + 1> argv{};
  for (std::size_t i = 0; i < words.size(); ++i) argv[i] = words[i].data();
  COWMGR_ASSERT(::posix_spawn(&pid_, program.c_str(), nullptr, nullptr, argv.data(), environ) == 0);
  (void)connect_soon(directory_ / "s");
}

void add_restarts(const Plan& plan, RestartedDaemon& empty, RestartedDaemon& full) {
  const auto add_one = [&](const char* name, RestartedDaemon& daemon) {
    add(name, plan, 1, [&daemon](benchmark::State& state) {
      daemon.kill();
      time_each(state, [&] { daemon.start(); });
    });
  };
  add_one("restart_of_none", empty);
  add_one("restart_of_1000", full);
}

void add_restart_ratios(Reporter& reporter) {
  reporter.add_ratio("restart_of_1000_vs_none", "restart_of_1000", "restart_of_none", 0,
                     "kill -9 to served again: 1,000 arrays against none");
}

}  // namespace cowmgr::bench
