#include "client/fork_guard.hpp"

#include <array>
#include <atomic>
#include <pthread.h>
#include <type_traits>
#include <unistd.h>

namespace cowmgr::detail {
namespace {

constexpr std::size_t kMaxSockets =
    1024;  // beyond that a child keeps some open, and the daemon's pidfd helps

std::atomic<std::uint64_t> generation{1};
std::array<std::atomic<int>, kMaxSockets> sockets{};  // descriptor + 1; 0: unused

// Only async-signal-safe calls here: the child of a program with threads may do no more (fork(2)).
void in_child() noexcept {
  generation.fetch_add(1, std::memory_order_relaxed);
  for (auto& entry : sockets) {
    if (const int fd = entry.exchange(0, std::memory_order_relaxed) - 1; fd >= 0) ::close(fd);
  }
  pool_mutex().unlock();
}

// Registered when the library is loaded, before anybody can fork with a connection open.
const int registered = ::pthread_atfork([] { pool_mutex().lock(); }, [] { pool_mutex().unlock(); }, in_child);

}  // namespace

std::uint64_t fork_generation() noexcept {
  (void)registered;
  return generation.load(std::memory_order_relaxed);
}

std::mutex& pool_mutex() noexcept {
  // Needs no destructor, so that it serves a fork that comes after those of static objects.
  static_assert(std::is_trivially_destructible_v<std::mutex>);
  static constinit std::mutex mutex;
  return mutex;
}

void close_in_children(int fd) noexcept {
  for (auto& entry : sockets) {
    int unused = 0;
    if (entry.compare_exchange_strong(unused, fd + 1, std::memory_order_relaxed)) return;
  }
}

void forget_fd(int fd) noexcept {
  for (auto& entry : sockets) {
    int wanted = fd + 1;
    if (entry.compare_exchange_strong(wanted, 0, std::memory_order_relaxed)) return;
  }
}

}  // namespace cowmgr::detail
