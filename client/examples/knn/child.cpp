#include "client/examples/knn/child.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <spawn.h>
#include <string_view>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>

namespace cowmgr::knn {
namespace {

std::string_view name_of(std::string_view variable) {
  return variable.substr(0, variable.find('='));
}

// Our environment with `changes`.
std::vector<std::string> environment_with(const std::vector<std::string>& changes) {
  std::vector<std::string> result = changes;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const bool is_replaced = std::ranges::any_of(
        changes, [&](const std::string& change) { return name_of(change) == name_of(*variable); });
    if (!is_replaced) result.emplace_back(*variable);
  }
  return result;
}

// As exec takes them; valid while `texts` is.
std::vector<char*> pointers_to(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  pointers.reserve(texts.size() + 1);
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

// What posix_spawn is to do between fork and exec.
class SpawnPlan {
 public:
  explicit SpawnPlan(const ChildOptions& options) {
    ::posix_spawn_file_actions_init(&actions_);
    for (const auto& [ours, its] : options.descriptors) {
      // Of equal numbers, glibc takes the close-on-exec flag away.
      ::posix_spawn_file_actions_adddup2(&actions_, ours, its);
    }
    ::posix_spawnattr_init(&attributes_);
    set_signals();
    const int session = options.own_session ? POSIX_SPAWN_SETSID : 0;
    ::posix_spawnattr_setflags(&attributes_,
                               static_cast<short>(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | session));
  }
  SpawnPlan(const SpawnPlan&) = delete;
  SpawnPlan& operator=(const SpawnPlan&) = delete;
  ~SpawnPlan() {
    ::posix_spawnattr_destroy(&attributes_);
    ::posix_spawn_file_actions_destroy(&actions_);
  }

  // An error number, or 0.
  [[nodiscard]] int spawn(pid_t& pid, const std::string& program, char* const* argv,
                          char* const* envp) const {
    return ::posix_spawn(&pid, program.c_str(), &actions_, &attributes_, argv, envp);
  }

 private:
  // The signals that we block or ignore mean to the child what they usually mean.
  void set_signals() {
    sigset_t none;
    ::sigemptyset(&none);
    ::posix_spawnattr_setsigmask(&attributes_, &none);
    sigset_t usual;
    ::sigemptyset(&usual);
    ::sigaddset(&usual, SIGPIPE);
    ::posix_spawnattr_setsigdefault(&attributes_, &usual);
  }

  posix_spawn_file_actions_t actions_{};
  posix_spawnattr_t attributes_{};
};

std::string end_in_words(int status) {
  if (!WIFSIGNALED(status)) return fmt::format("ended with exit status {}", WEXITSTATUS(status));
  return fmt::format("was killed by signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)));
}

pid_t wait_for(pid_t pid, int& status, int flags) {
  pid_t waited = 0;
  do {
    waited = ::waitpid(pid, &status, flags);
  } while (waited < 0 && errno == EINTR);
  return waited;
}

}  // namespace

Result<Child> Child::start(const ChildOptions& options) {
  auto arguments = options.arguments;
  auto environment = environment_with(options.environment);
  const SpawnPlan plan(options);
  pid_t pid = 0;
  const std::string& program = arguments.front();
  const int error = plan.spawn(pid, program, pointers_to(arguments).data(), pointers_to(environment).data());
  if (error == ENOENT) {
    return fail(Errc::not_found, fmt::format("there is no program {}; build it with `./dev build`", program));
  }
  if (error != 0) return tl::unexpected(os_error("posix_spawn", program, error));
  Child child(pid, UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))));
  if (!child.pidfd_) return tl::unexpected(os_error("pidfd_open", program, errno));
  return child;
}

Child::Child(Child&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      pidfd_(std::move(other.pidfd_)),
      status_(other.status_),
      end_(std::move(other.end_)) {}

Child::~Child() {
  if (pid_ < 0 || end_) return;
  send(SIGKILL);
  wait_for(pid_, status_, 0);
}

const std::optional<std::string>& Child::ended() {
  if (!end_ && wait_for(pid_, status_, WNOHANG) == pid_) end_ = end_in_words(status_);
  return end_;
}

// Until it is waited for, the number belongs to our child and nobody else.
void Child::send(int signal) noexcept {
  if (pid_ > 0 && !end_) ::kill(pid_, signal);
}

std::string path_of_sibling(const std::string& program) {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / program;
}

}  // namespace cowmgr::knn
