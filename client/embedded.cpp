#include "cowmgr/embedded.hpp"

#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <random>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>

#include "client/fork_guard.hpp"
#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

constexpr int kChildFd = 3;  // where the daemon finds its end of the lifeline

std::string find_program(const std::string& wanted) {
  if (!wanted.empty()) return wanted;
  if (const char* named = std::getenv("COWMGR_DAEMON"); named != nullptr && *named != '\0') return named;
  std::error_code ignored;
  const auto beside = fs::read_symlink("/proc/self/exe", ignored).parent_path() / "cowmgr";
  return fs::exists(beside, ignored) ? beside.string() : "cowmgr";
}

std::string random_instance() {
  std::random_device random;
  return fmt::format("embedded-{:08x}{:08x}", random(), random());
}

constexpr const char* kSocketName = "/cowmgr.sock";
constexpr const char* kDirectoryName = "/cowmgr-XXXXXX";

// A directory of this user's alone (mode 0700) below `parent`.
Result<std::string> make_directory_in(const std::string& parent) {
  std::string path = parent + kDirectoryName;
  if (::mkdtemp(path.data()) == nullptr) return tl::unexpected(os_error("mkdtemp", path, errno));
  return path;
}

// Whether this user's runtime directory can hold the socket. Batch systems name one that is not there, su(1)
// that of another user, who may take it away; and a socket's name has 107 bytes at most.
bool is_usable(const std::string& runtime) {
  struct stat status {};
  return runtime.starts_with('/') &&
         (runtime + kDirectoryName + kSocketName).size() < sizeof(sockaddr_un::sun_path) &&
         ::stat(runtime.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid();
}

Result<std::string> make_directory() {
  const char* variable = std::getenv("XDG_RUNTIME_DIR");
  const std::string runtime = variable != nullptr ? variable : "";
  if (is_usable(runtime)) {
    if (auto made = make_directory_in(runtime)) return made;
  }
  return make_directory_in("/tmp");
}

// Starts `arguments` with `lifeline` as its descriptor kChildFd.
Result<pid_t> spawn(std::vector<std::string> arguments, int lifeline) {
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, lifeline, kChildFd);
  pid_t pid = 0;
  const int rc = ::posix_spawnp(&pid, argv.front(), &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (rc == ENOENT) {
    return fail(
        Errc::not_found,
        fmt::format("there is no program {}; set COWMGR_DAEMON to the path of cowmgr", arguments.front()));
  }
  if (rc != 0) return tl::unexpected(os_error("posix_spawn", arguments.front(), rc));
  return pid;
}

int wait_for(pid_t pid) noexcept {
  int status = -1;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

// A daemon that was killed could not clean up; nobody else knows its instance.
void remove_leftovers(const std::string& instance) noexcept {
  std::error_code ignored;
  const std::string prefix = fmt::format("cowmgr.{}.", instance);
  // Not in a range: that throws where the directory cannot be read to its end.
  for (fs::directory_iterator at("/dev/shm", ignored), end; !ignored && at != end; at.increment(ignored)) {
    const std::string file = at->path().filename();
    if (file.compare(0, prefix.size(), prefix) == 0) ::shm_unlink(("/" + file).c_str());
  }
}

}  // namespace

struct EmbeddedDaemon::Impl {
  std::string instance = random_instance();
  std::string directory;
  std::string socket;
  UniqueFd lifeline;  // the daemon ends when this end is closed, by whom or what ever
  pid_t pid = -1;
  std::uint64_t generation = detail::fork_generation();

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    if (generation != detail::fork_generation()) {
      (void)lifeline.release();  // closed at the fork: the daemon is the parent's
      return;
    }
    detail::forget_fd(lifeline.get());
    lifeline.reset();
    const int status = pid > 0 ? wait_for(pid) : 0;
    if (status != 0) remove_leftovers(instance);
    std::error_code ignored;
    if (!directory.empty()) fs::remove_all(directory, ignored);
  }
};

Result<EmbeddedDaemon> EmbeddedDaemon::start(const EmbeddedOptions& options) {
  auto impl = std::make_unique<Impl>();
  auto directory = make_directory();
  if (!directory) return error_of(std::move(directory));
  impl->directory = *std::move(directory);
  impl->socket = impl->directory + kSocketName;
  int ends[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    return tl::unexpected(os_error("socketpair", "AF_UNIX", errno));
  impl->lifeline.reset(ends[0]);
  detail::close_in_children(ends[0]);
  UniqueFd child_end(ends[1]);
  std::vector<std::string> arguments = {find_program(options.program),
                                        "--socket",
                                        impl->socket,
                                        "--instance",
                                        impl->instance,
                                        "--log-level",
                                        options.log_level,
                                        "--parent-fd",
                                        std::to_string(kChildFd)};
  if (options.capacity_bytes > 0) {
    arguments.emplace_back("--capacity");
    arguments.push_back(std::to_string(options.capacity_bytes));
  }
  auto pid = spawn(std::move(arguments), child_end.get());
  if (!pid) return error_of(std::move(pid));
  impl->pid = *pid;
  child_end.reset();
  char ready = 0;
  ssize_t count = 0;
  do count = ::read(impl->lifeline.get(), &ready, 1);
  while (count < 0 && errno == EINTR);
  if (count != 1)
    return fail(Errc::no_daemon, "the embedded daemon ended at once; its log on standard error says why");
  return EmbeddedDaemon(std::move(impl));
}

EmbeddedDaemon::EmbeddedDaemon(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
EmbeddedDaemon::EmbeddedDaemon(EmbeddedDaemon&&) noexcept = default;
EmbeddedDaemon& EmbeddedDaemon::operator=(EmbeddedDaemon&&) noexcept = default;
EmbeddedDaemon::~EmbeddedDaemon() = default;

const std::string& EmbeddedDaemon::socket() const noexcept {
  return impl_->socket;
}
pid_t EmbeddedDaemon::pid() const noexcept {
  return impl_->pid;
}

}  // namespace cowmgr
