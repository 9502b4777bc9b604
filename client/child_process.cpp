#include "client/child_process.hpp"

#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/unique_fd.hpp"

namespace cowmgr::detail {
namespace {

constexpr int kFreeFd = 10;  // from here on no number is one that a program gets

// Returns an error number, or 0.
int spawn_with(const posix_spawn_file_actions_t& actions, pid_t& pid, char* const* argv) {
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  sigset_t none;
  ::sigemptyset(&none);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  const int error = ::posix_spawnp(&pid, argv[0], &actions, &attributes, argv, environ);
  ::posix_spawnattr_destroy(&attributes);
  return error;
}

}  // namespace

Result<pid_t> spawn(std::vector<std::string> arguments, const std::vector<Handed>& descriptors) {
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::vector<UniqueFd> copies;  // one of ours may have the number that another shall get
  for (const auto& [ours, its] : descriptors) {
    copies.emplace_back(::fcntl(ours, F_DUPFD_CLOEXEC, kFreeFd));
    if (!copies.back()) return tl::unexpected(os_error("dup", arguments.front(), errno));
  }
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  for (std::size_t i = 0; i < copies.size(); ++i)
    ::posix_spawn_file_actions_adddup2(&actions, copies[i].get(), descriptors[i].its);
  pid_t pid = 0;
  const int error = spawn_with(actions, pid, argv.data());
  ::posix_spawn_file_actions_destroy(&actions);
  if (error == ENOENT) return fail(Errc::not_found, "there is no program " + arguments.front());
  if (error != 0) return tl::unexpected(os_error("posix_spawn", arguments.front(), error));
  return pid;
}

pid_t wait_for(pid_t pid, int& status, int flags) noexcept {
  pid_t waited = 0;
  do waited = ::waitpid(pid, &status, flags);
  while (waited < 0 && errno == EINTR);
  return waited;
}

std::string end_in_words(int status) {
  if (!WIFSIGNALED(status)) return fmt::format("ended with exit status {}", WEXITSTATUS(status));
  const char* signal = ::sigdescr_np(WTERMSIG(status));
  return fmt::format("was killed by signal {} ({})", WTERMSIG(status),
                     signal != nullptr ? signal : "unknown");
}

}  // namespace cowmgr::detail
