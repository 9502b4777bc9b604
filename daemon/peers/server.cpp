#include "daemon/peers/server.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/detached.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/core/session.hpp"
#include "daemon/peers/connection.hpp"
#include "proto/fd_socket.hpp"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5
#endif

namespace cowmgr {
namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);
constexpr auto kAcceptPause = std::chrono::milliseconds(100);  // when there is no descriptor left
constexpr auto kLook = std::chrono::microseconds(50);          // for more requests, before the loop sleeps
constexpr unsigned kLongestPause = 1023;                       // between two looks, in handlers run

std::vector<gid_t> groups_of(int socket) {
  socklen_t bytes = 0;
  // The first call fails with ERANGE and says how much room the groups take (socket(7), SO_PEERGROUPS).
  ::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, nullptr, &bytes);
  std::vector<gid_t> groups(bytes / sizeof(gid_t));
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &bytes) != 0) groups.clear();
  return groups;
}

Peer peer_of(int socket) {
  ucred credentials{};
  socklen_t bytes = sizeof credentials;
  const int rc = ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes);
  COWMGR_ASSERT(rc == 0);
  return {credentials.pid, credentials.uid, credentials.gid, groups_of(socket)};
}

// A descriptor that becomes readable when the peer's process ends; none when it cannot be had.
UniqueFd pidfd_of(int socket, pid_t pid) {
  int fd = -1;
  socklen_t bytes = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &bytes) == 0) return UniqueFd(fd);
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

UniqueFd lease_signals() {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, lease_signal());
  return UniqueFd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
}

}  // namespace

int lease_signal() noexcept {
  return SIGRTMIN;
}

Server::Server(asio::io_context& io, Core& core, Housekeeping& housekeeping, UniqueFd listener,
               UniqueFd names)
    : io_(io),
      core_(core),
      housekeeping_(housekeeping),
      sockets_(io),
      listener_(io, listener.release()),
      leases_(io, lease_signals().release()),
      names_(io),
      parent_(io),
      signals_(io, SIGTERM),
      pause_(io) {
  if (core.config.parent_fd >= 0) {
    // What a terminal sends goes to the whole process group: the parent may still need its daemon to end its
    // own work. Its end ends us.
    parent_.assign(core.config.parent_fd);
    for (const int number : {SIGINT, SIGQUIT, SIGHUP}) std::signal(number, SIG_IGN);
  } else {
    signals_.add(SIGINT);
    signals_.add(SIGHUP);  // the terminal was closed
  }
  if (names) names_.assign(names.release());
  sockets_.look_at(listener_.native_handle());
  core_.stop = [this] { stop(); };
}

void Server::run() {
  asio::co_spawn(io_, accept_peers(), asio::detached);
  asio::co_spawn(io_, watch_signals(), asio::detached);
  asio::co_spawn(io_, watch_leases(), asio::detached);
  if (names_.is_open()) asio::co_spawn(io_, watch_names(), asio::detached);
  if (parent_.is_open()) asio::co_spawn(io_, watch_parent(), asio::detached);
  run_loop();  // until the last coroutine has ended, which stop() brings about
}

// As io.run(), with the housekeeping after every turn. Whoever was just answered often asks again at once,
// and to sleep and be woken takes longer than most requests: up to 60 us once the processor has gone idle. So
// the loop looks for more for a moment before it sleeps (`./dev bench`, tiny tasks). Where that is in vain,
// as when whoever would ask needs this very processor, it looks ever more seldom.
void Server::run_loop() {
  unsigned pause = 0;
  unsigned left_of_pause = 0;
  tend();
  while (io_.run_one() > 0) {
    tend();
    if (left_of_pause > 0) {
      --left_of_pause;
      continue;
    }
    while (finds_more()) pause = 0;
    pause = std::min(2 * pause + 1, kLongestPause);
    left_of_pause = pause;
  }
}

void Server::tend() {
  if (housekeeping_.tend() && io_.stopped())
    io_.restart();  // it has begun something after the last coroutine
}

bool Server::finds_more() {
  const auto end = std::chrono::steady_clock::now() + kLook;
  do {
    if (take_turns()) return true;
  } while (!io_.stopped() && std::chrono::steady_clock::now() < end);
  return false;
}

// All that is ready. Whether anything was.
bool Server::take_turns() {
  bool is_any = false;
  while (io_.poll_one() > 0) {
    is_any = true;
    tend();
  }
  return is_any;
}

asio::awaitable<void> Server::accept_peers() {
  for (;;) {
    const auto [error] = co_await listener_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return;
    const int number = accept_one();
    const bool was_short = std::exchange(
        is_short_, number == EMFILE || number == ENFILE || number == ENOBUFS || number == ENOMEM);
    if (!is_short_) continue;
    if (!was_short)  // once is enough to say so
      spdlog::error("connections cannot be accepted: {}; raise the limit of open files",
                    std::generic_category().message(number));
    pause_.expires_after(kAcceptPause);
    co_await pause_.async_wait(kAwait);
  }
}

// Returns 0, or why there was nothing to accept (errno).
int Server::accept_one() {
  UniqueFd socket(::accept4(listener_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket) return errno;
  Peer peer = peer_of(socket.get());
  auto charge = core_.store.charges().connection(peer.uid);
  if (!charge) {
    core_.log.warn(peer.uid, [&] {
      return fmt::format("process {} of user {} is refused: {}", peer.pid, peer.uid, charge.error().message);
    });
    refuse(socket.get(), charge.error());
    sockets_.close(std::move(socket));
    return 0;
  }
  sockets_.add(socket.get(), *std::move(charge));
  auto pidfd = pidfd_of(socket.get(), peer.pid);
  asio::co_spawn(io_, serve(core_, sockets_, std::move(socket), std::move(peer), std::move(pidfd)),
                 asio::detached);
  return 0;
}

asio::awaitable<void> Server::watch_signals() {
  const auto [error, number] = co_await signals_.async_wait(kAwait);
  if (error) co_return;
  spdlog::info("stopping: {}", number == SIGINT ? "interrupted" : "asked to by a signal");
  stop();
}

asio::awaitable<void> Server::watch_leases() {
  for (;;) {
    const auto [error] = co_await leases_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return;
    signalfd_siginfo info{};
    while (::read(leases_.native_handle(), &info, sizeof info) == sizeof info) {
      asio::co_spawn(io_, housekeeping_.report_tampering(info.ssi_fd), asio::detached);
    }
  }
}

asio::awaitable<void> Server::watch_names() {
  for (;;) {
    const auto [error] = co_await names_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return;
    housekeeping_.report_removals(core_.env.read_removals(names_.native_handle()));
  }
}

// The parent never writes: what can be read is the end of its side.
asio::awaitable<void> Server::watch_parent() {
  do {
    const auto [error] = co_await parent_.async_wait(asio::posix::stream_descriptor::wait_read, kAwait);
    if (error) co_return;
  } while (!is_readable(parent_.native_handle()));
  spdlog::info("stopping: the parent process ended");
  stop();
}

void Server::stop() {
  if (std::exchange(is_stopping_, true)) return;
  boost::system::error_code ignored;
  sockets_.close_listener(UniqueFd(listener_.release()));
  leases_.close(ignored);
  names_.close(ignored);
  parent_.close(ignored);
  signals_.cancel(ignored);
  pause_.cancel();
  housekeeping_.stop();
  // Memory that is being made for them is given up; views in other processes stay valid. A session takes
  // itself out of the map.
  while (!core_.sessions.empty()) core_.sessions.begin()->second->close();
  sockets_.shut_down_all();
}

}  // namespace cowmgr
