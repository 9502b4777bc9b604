#include "client/own_thread.hpp"

#include <csignal>
#include <exception>
#include <sys/prctl.h>

namespace cowmgr::detail {

void OwnThread::start(const std::function<void()>& work) noexcept {
  if (is_there()) return;
  (void)thread_.release();  // the parent's, if any
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::make_unique<std::thread>([work] {
      ::prctl(PR_SET_NAME, kThreadName);
      work();
    });
    generation_ = fork_generation();
  } catch (const std::exception&) {  // there is none
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void OwnThread::join() noexcept {
  if (is_there())
    thread_->join();
  else
    (void)thread_.release();
  thread_.reset();
}

}  // namespace cowmgr::detail
