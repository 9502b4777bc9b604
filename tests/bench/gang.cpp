#include "tests/bench/gang.hpp"

#include <array>
#include <csignal>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/errors.hpp"

namespace cowmgr::bench {

Gang::Gang(std::size_t members, const Prepare& prepare) {
  for (std::size_t i = 0; i < members; ++i) {
    std::array<int, 2> ends{};
    COWMGR_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
    Member member{.pid = -1, .control = UniqueFd(ends[0])};
    const UniqueFd theirs(ends[1]);
    member.pid = ::fork();
    COWMGR_ASSERT(member.pid >= 0);
    if (member.pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      member.control.reset();
      members_.clear();  // their ends are not ours
      const Task task = prepare(i);
      char order = 'r';
      (void)!::write(theirs.get(), &order, 1);
      while (::read(theirs.get(), &order, 1) == 1) {
        task();
        if (::write(theirs.get(), &order, 1) != 1) break;
      }
      ::_exit(0);
    }
    char ready = 0;
    COWMGR_ASSERT(::read(member.control.get(), &ready, 1) == 1);
    members_.push_back(std::move(member));
  }
}

Gang::~Gang() {
  // The end of our sockets would not do: processes that were forked later have them too.
  for (const Member& member : members_) ::kill(member.pid, SIGKILL);
  for (const Member& member : members_) ::waitpid(member.pid, nullptr, 0);
}

void Gang::run() const {
  char order = 'g';
  for (const Member& member : members_) COWMGR_ASSERT(::write(member.control.get(), &order, 1) == 1);
  for (const Member& member : members_) COWMGR_ASSERT(::read(member.control.get(), &order, 1) == 1);
}

}  // namespace cowmgr::bench
