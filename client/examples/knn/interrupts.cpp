#include "client/examples/knn/interrupts.hpp"

#include <cerrno>
#include <poll.h>
#include <sys/signalfd.h>
#include <vector>

namespace cowmgr::knn {
namespace {

// The kernel keeps a blocked signal even if it is ignored, as under nohup: that one must not be blocked.
bool is_ignored(int signal) {
  struct sigaction action {};
  return ::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
}

}  // namespace

Interrupts::Interrupts() {
  sigset_t watched;
  ::sigemptyset(&watched);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    if (!is_ignored(signal)) ::sigaddset(&watched, signal);
  }
  ::pthread_sigmask(SIG_BLOCK, &watched, &before_);
  fd_.reset(::signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK));
  COWMGR_ASSERT(fd_);
}

Interrupts::~Interrupts() {
  ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

Result<void> Interrupts::check() const {
  pollfd pending{fd_.get(), POLLIN, 0};
  if (::poll(&pending, 1, 0) > 0) return fail(Errc::shutting_down, "interrupted");
  return {};
}

Result<void> Interrupts::wait_for(std::initializer_list<int> fds) const {
  std::vector<pollfd> watched = {{fd_.get(), POLLIN, 0}};
  for (const int fd : fds) watched.push_back({fd, POLLIN, 0});
  while (::poll(watched.data(), watched.size(), -1) < 0) {
    if (errno != EINTR) return tl::unexpected(os_error("poll", "the child processes", errno));
  }
  return check();
}

}  // namespace cowmgr::knn
