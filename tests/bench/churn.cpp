#include "tests/bench/churn.hpp"

#include <array>
#include <csignal>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cowmgr/client.hpp"
#include "proto/errors.hpp"

namespace cowmgr::bench {
namespace {

bool is_readable(int fd) {
  pollfd poll{fd, POLLIN, 0};
  return ::poll(&poll, 1, 0) == 1;
}

void make_and_evict(const Client& client, std::uint64_t size_bytes) {
  auto writer = client.create("bench/churn", {Dtype::of<std::uint8_t>(), {size_bytes}});
  COWMGR_ASSERT(writer.has_value());
  COWMGR_ASSERT(writer->seal().has_value());
  const std::array<std::string, 1> names = {"bench/churn"};
  COWMGR_ASSERT(client.evict(names).has_value());
}

// Each byte from the parent changes between resting and running; each rest is answered with a count.
void obey(int control, const std::string& socket, std::uint64_t size_bytes) {
  const auto client = Client::connect({.socket = socket, .command = "churn"});
  COWMGR_ASSERT(client.has_value());
  for (char order = 0; ::read(control, &order, 1) == 1;) {
    std::uint64_t made = 0;
    do {
      make_and_evict(*client, size_bytes);
      ++made;
    } while (!is_readable(control));
    if (::read(control, &order, 1) != 1 || ::write(control, &made, sizeof made) < 0) return;
  }
}

}  // namespace

Churn::Churn(std::string socket, std::uint64_t size_bytes) {
  std::array<int, 2> ends{};
  COWMGR_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
  control_.reset(ends[0]);
  const UniqueFd theirs(ends[1]);
  pid_ = ::fork();
  COWMGR_ASSERT(pid_ >= 0);
  if (pid_ == 0) {
    control_.reset();
    obey(theirs.get(), socket, size_bytes);
    ::_exit(0);
  }
}

Churn::~Churn() {
  control_.reset();
  ::waitpid(pid_, nullptr, 0);
}

void Churn::start() {
  COWMGR_ASSERT(::write(control_.get(), "g", 1) == 1);
}

std::uint64_t Churn::stop() {
  std::uint64_t made = 0;
  COWMGR_ASSERT(::write(control_.get(), "s", 1) == 1);
  COWMGR_ASSERT(::read(control_.get(), &made, sizeof made) == sizeof made);
  return made;
}

}  // namespace cowmgr::bench
