#include "client/examples/knn/own_daemon.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <fstream>
#include <iostream>
#include <poll.h>
#include <string_view>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <fmt/format.h>

namespace cowmgr::knn {
namespace {

namespace fs = std::filesystem;

constexpr int kLifelineFd = 3;           // in the daemon
constexpr int kStopPatienceMs = 10000;   // it gives back some hundred MiB; that takes well under a second
constexpr std::size_t kSuffixBytes = 6;  // that mkdtemp() chooses

// Only this user gets at the socket in it.
Result<fs::path> make_directory() {
  std::error_code error;
  const fs::path parent = fs::temp_directory_path(error);  // $TMPDIR, else /tmp
  if (error) return fail(Errc::not_found, "there is no directory for temporary files; set TMPDIR to one");
  std::string path = fs::absolute(parent) / "cowmgr-demo-XXXXXX";  // NOTIFY_SOCKET must be absolute
  if (::mkdtemp(path.data()) == nullptr) return tl::unexpected(os_error("mkdtemp", path, errno));
  return path;
}

Result<UniqueFd> bind_datagrams(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(Errc::invalid_argument,
                fmt::format("{} is too long for a socket; set TMPDIR to a shorter path", path));
  }
  std::ranges::copy(path, std::begin(address.sun_path));
  UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd) return tl::unexpected(os_error("socket", path, errno));
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return tl::unexpected(os_error("bind", path, errno));
  }
  return fd;
}

// Whether a message has come that says so.
bool says_ready(int socket) {
  constexpr std::string_view kReady = "READY=1";
  std::array<char, 4096> buffer{};
  const ssize_t count = ::recv(socket, buffer.data(), buffer.size(), MSG_DONTWAIT);
  if (count < 0) return false;
  const std::string_view message(buffer.data(), static_cast<std::size_t>(count));
  return message.find(kReady) != std::string_view::npos;
}

// What a daemon that was killed could not remove; nobody else uses its instance.
void remove_segments(const std::string& instance) {
  std::error_code ignored;
  const std::string prefix = fmt::format("cowmgr.{}.", instance);
  for (const auto& entry : fs::directory_iterator("/dev/shm", ignored)) {
    if (entry.path().filename().native().starts_with(prefix)) fs::remove(entry.path(), ignored);
  }
}

}  // namespace

OwnDaemon::OwnDaemon(fs::path directory)
    : directory_(std::move(directory)),
      instance_(fmt::format("demo-{}-{}", ::getpid(),
                            directory_.native().substr(directory_.native().size() - kSuffixBytes))) {}

Result<std::unique_ptr<OwnDaemon>> OwnDaemon::start(bool may_outlive, const Interrupts& interrupts) {
  auto directory = make_directory();
  if (!directory) return error_of(directory);
  std::unique_ptr<OwnDaemon> daemon(new OwnDaemon(*std::move(directory)));
  if (const auto ok = daemon->launch(may_outlive); !ok) return error_of(ok);
  if (const auto ok = daemon->await_ready(interrupts); !ok) return error_of(ok);
  return daemon;
}

Result<void> OwnDaemon::launch(bool may_outlive) {
  auto notify = bind_datagrams(notify_socket());
  if (!notify) return error_of(notify);
  notify_ = *std::move(notify);
  ChildOptions options;
  options.arguments = {path_of_sibling("cowmgr"),
                       "--socket",
                       socket(),
                       "--instance",
                       instance_,
                       "--log-level",
                       "warning",
                       "--purge"};
  options.environment = {"NOTIFY_SOCKET=" + notify_socket()};
  options.own_session = true;  // Ctrl-C is for us: the daemon must not go before those who use it
  return may_outlive ? spawn_independent(std::move(options)) : spawn_dependent(std::move(options));
}

Result<void> OwnDaemon::spawn_independent(ChildOptions options) {
  const UniqueFd input(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  // Whoever reads our output to its end must not wait for the daemon's.
  const UniqueFd output(::open(log().c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (!input || !output) return tl::unexpected(os_error("open", log(), errno));
  options.descriptors = {
      {input.get(), STDIN_FILENO}, {output.get(), STDOUT_FILENO}, {output.get(), STDERR_FILENO}};
  return spawn(options);
}

Result<void> OwnDaemon::spawn_dependent(ChildOptions options) {
  std::array<int, 2> ends{-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) {
    return tl::unexpected(os_error("socketpair", "AF_UNIX", errno));
  }
  lifeline_.reset(ends[0]);
  const UniqueFd its_end(ends[1]);
  options.arguments.insert(options.arguments.end(), {"--parent-fd", std::to_string(kLifelineFd)});
  options.descriptors = {{its_end.get(), kLifelineFd}};
  return spawn(options);
}

Result<void> OwnDaemon::spawn(const ChildOptions& options) {
  auto child = Child::start(options);
  if (!child) return error_of(child);
  child_ = std::make_unique<Child>(*std::move(child));
  return {};
}

Result<void> OwnDaemon::await_ready(const Interrupts& interrupts) {
  while (!says_ready(notify_.get())) {
    if (const auto end = child_->ended()) {
      child_.reset();  // that it ended is told once
      return fail(Errc::no_daemon, fmt::format("cowmgr {}; what it says above is the reason", *end));
    }
    if (auto ok = interrupts.wait_for({notify_.get(), child_->pidfd()}); !ok) return ok;
  }
  // If we are killed, the daemon removes its directory, provided that nothing of ours is in it.
  ::unlink(notify_socket().c_str());
  return {};
}

void OwnDaemon::keep() noexcept {
  is_kept_ = true;
  child_->let_go();
}

OwnDaemon::~OwnDaemon() {
  if (is_kept_) return;
  if (child_) stop();
  // Here only the log of a daemon that was to be kept, and is not.
  if (std::ifstream file(log()); file.peek() != std::ifstream::traits_type::eof()) std::cerr << file.rdbuf();
  remove_segments(instance_);
  std::error_code ignored;
  fs::remove_all(directory_, ignored);
}

void OwnDaemon::stop() noexcept {
  child_->send(SIGTERM);
  pollfd ended{child_->pidfd(), POLLIN, 0};
  while (::poll(&ended, 1, kStopPatienceMs) < 0 && errno == EINTR) {
  }
  const auto end = child_->ended().value_or("does not stop, and is killed");
  if (!child_->has_succeeded()) fmt::print(stderr, "knn-demo: cowmgr {}\n", end);
  child_.reset();
}

}  // namespace cowmgr::knn
