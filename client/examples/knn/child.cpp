#include "client/examples/knn/child.hpp"

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/child_process.hpp"

namespace cowmgr::knn {

Result<Child> Child::start(std::vector<std::string> arguments, const UniqueFd& input,
                           const UniqueFd& output) {
  const std::string program = arguments.front();
  const auto pid =
      detail::spawn(std::move(arguments), {{input.get(), STDIN_FILENO}, {output.get(), STDOUT_FILENO}});
  if (!pid && pid.error().code == Errc::not_found)
    return fail(Errc::not_found, pid.error().message + "; build it with `./dev build`");
  if (!pid) return error_of(pid);
  Child child(*pid, UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, *pid, 0))));
  if (!child.pidfd_) return tl::unexpected(os_error("pidfd_open", program, errno));
  return child;
}

// Until it is waited for, the number belongs to our child and nobody else.
Child::~Child() {
  if (!pidfd_ || end_) return;
  ::kill(pid_, SIGKILL);
  detail::wait_for(pid_, status_, 0);
}

const std::optional<std::string>& Child::ended() {
  if (!end_ && detail::wait_for(pid_, status_, WNOHANG) == pid_) end_ = detail::end_in_words(status_);
  return end_;
}

std::string path_of_sibling(const std::string& program) {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / program;
}

}  // namespace cowmgr::knn
