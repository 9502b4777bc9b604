#include "cowmgr/embedded.hpp"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "client/child_process.hpp"
#include "client/fork_guard.hpp"
#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

constexpr int kChildFd = 3;  // where the daemon finds its end of the lifeline
constexpr int kOtherFd = 4;  // where one that may outlive us has our end, too

std::string find_program(const std::string& wanted) {
  if (!wanted.empty()) return wanted;
  if (const char* named = std::getenv("COWMGR_DAEMON"); named != nullptr && *named != '\0') return named;
  std::error_code ignored;
  const auto beside = fs::read_symlink("/proc/self/exe", ignored).parent_path() / "cowmgr";
  return fs::exists(beside, ignored) ? beside.string() : "cowmgr";
}

std::string random_instance() {
  std::random_device random;
  return fmt::format("embedded-{}-{:08x}{:08x}", ::getpid(), random(), random());
}

constexpr const char* kSocketName = "/cowmgr.sock";
constexpr const char* kLogName = "/cowmgr.log";
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

void copy_to_stderr(const std::string& file) {
  std::ifstream in(file);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  static_cast<void>(std::fputs(text.c_str(), stderr));
}

}  // namespace

struct EmbeddedDaemon::Impl {
  std::string instance = random_instance();
  std::string directory;
  std::string socket;
  std::string log_file;
  UniqueFd lifeline;  // the daemon ends when this end is closed, by whom or what ever
  pid_t pid = -1;     // -1: not running, or not ours any more
  bool is_kept = false;
  std::uint64_t generation = detail::fork_generation();

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    if (is_forked()) {
      (void)lifeline.release();  // closed at the fork: the daemon is the parent's
      return;
    }
    if (is_kept && pid >= 0) {
      detail::forget_fd(lifeline.get());
      return;
    }
    (void)stop();
    if (!log_file.empty()) copy_to_stderr(log_file);
    std::error_code ignored;
    if (!directory.empty()) fs::remove_all(directory, ignored);
  }

  [[nodiscard]] bool is_forked() const noexcept { return generation != detail::fork_generation(); }

  Result<void> make_directory_for(const EmbeddedOptions& options) {
    auto made = make_directory();
    if (!made) return error_of(std::move(made));
    directory = *std::move(made);
    socket = directory + kSocketName;
    if (options.may_outlive) log_file = directory + kLogName;
    return {};
  }

  // Makes the lifeline; returns the daemon's end.
  Result<UniqueFd> tie() {
    int ends[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
      return tl::unexpected(os_error("socketpair", "AF_UNIX", errno));
    lifeline.reset(ends[0]);
    detail::close_in_children(ends[0]);
    return UniqueFd(ends[1]);
  }

  [[nodiscard]] std::vector<std::string> command(const EmbeddedOptions& options) const {
    std::vector<std::string> words = {find_program(options.program),
                                      "--socket",
                                      socket,
                                      "--instance",
                                      instance,
                                      "--log-level",
                                      options.log_level,
                                      "--parent-fd",
                                      std::to_string(kChildFd)};
    if (options.capacity_bytes > 0) {
      words.emplace_back("--capacity");
      words.push_back(std::to_string(options.capacity_bytes));
    }
    return words;
  }

  Result<void> launch(const EmbeddedOptions& options) {
    const auto its_end = tie();
    if (!its_end) return error_of(its_end);
    std::vector<detail::Handed> descriptors = {{its_end->get(), kChildFd}};
    UniqueFd null;
    UniqueFd log;
    if (options.may_outlive) {
      null.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
      log.reset(::open(log_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
      if (!null || !log) return tl::unexpected(os_error("open", log_file, errno));
      // Whoever has both ends sees no end. And whoever reads our output to its end must not wait for the
      // daemon's.
      descriptors.insert(descriptors.end(), {{lifeline.get(), kOtherFd},
                                             {null.get(), STDIN_FILENO},
                                             {log.get(), STDOUT_FILENO},
                                             {log.get(), STDERR_FILENO}});
    }
    const auto started = detail::spawn(command(options), descriptors);
    if (started) pid = *started;
    if (started) return {};
    Error error = started.error();
    if (error.code == Errc::not_found) error.message += "; set COWMGR_DAEMON to the path of cowmgr";
    return tl::unexpected<Error>(std::move(error));
  }

  Result<void> await_ready() {
    char ready = 0;
    ssize_t count = 0;
    do count = ::read(lifeline.get(), &ready, 1);
    while (count < 0 && errno == EINTR);
    if (count == 1) return {};
    const auto ended = stop();
    return fail(Errc::no_daemon, fmt::format("{}; its log on standard error says why",
                                             ended ? "cowmgr ended at once" : ended.error().message));
  }

  // See EmbeddedDaemon::stop().
  Result<void> stop() {
    if (is_forked() || !lifeline) return {};
    ::shutdown(lifeline.get(), SHUT_RDWR);  // a daemon that may outlive us has that end, too
    detail::forget_fd(lifeline.get());
    lifeline.reset();
    if (pid < 0) return {};
    ::kill(pid, SIGCONT);  // what somebody stopped would not end
    int status = 0;
    const bool is_told = detail::wait_for(std::exchange(pid, -1), status) > 0;  // not if SIGCHLD is ignored
    if (is_told && status == 0) return {};
    remove_leftovers(instance);
    if (!is_told) return {};
    return fail(Errc::no_daemon, fmt::format("cowmgr {}", detail::end_in_words(status)));
  }
};

Result<EmbeddedDaemon> EmbeddedDaemon::start(const EmbeddedOptions& options) {
  auto impl = std::make_unique<Impl>();
  if (auto ok = impl->make_directory_for(options); !ok) return error_of(std::move(ok));
  if (auto ok = impl->launch(options); !ok) return error_of(std::move(ok));
  if (auto ok = impl->await_ready(); !ok) return error_of(std::move(ok));
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
Result<void> EmbeddedDaemon::stop() {
  return impl_->stop();
}
const std::string& EmbeddedDaemon::log_file() const noexcept {
  return impl_->log_file;
}

void EmbeddedDaemon::keep() noexcept {
  COWMGR_ASSERT(!impl_->log_file.empty());
  impl_->is_kept = true;
}

}  // namespace cowmgr
