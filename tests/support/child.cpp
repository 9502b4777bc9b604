#include "tests/support/child.hpp"

#include <array>
#include <cerrno>
#include <csignal>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>

#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {

void Link::say(std::string_view word) const {
  (void)::send(socket_.get(), word.data(), word.size(), MSG_NOSIGNAL);
}

std::string Link::hear() const {
  if (!wait_readable(socket_.get())) return {};
  std::array<char, 4096> word{};
  const auto count = ::recv(socket_.get(), word.data(), word.size(), 0);
  return {word.data(), count > 0 ? static_cast<std::size_t>(count) : 0};
}

void Link::await_word() const {
  if (hear().empty()) ::_exit(2);
}

Child::Child(const std::function<void(const Link&)>& script) : link_(UniqueFd()) {
  std::array<int, 2> ends{-1, -1};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
  UniqueFd ours(ends[0]);
  UniqueFd theirs(ends[1]);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ != 0) {
    link_ = Link(std::move(ours));
    return;
  }
  // A test that dies must not leave its children behind.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(2);
  ours.reset();
  script(Link(std::move(theirs)));
  ::_exit(testing::Test::HasFailure() ? 1 : 0);
}

Child::Child(Child&& other) noexcept : pid_(std::exchange(other.pid_, -1)), link_(std::move(other.link_)) {}

Child& Child::operator=(Child&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(link_, other.link_);
  return *this;
}

Child::~Child() {
  if (pid_ > 0) kill();
}

void Child::expect(std::string_view word) const {
  EXPECT_EQ(link_.hear(), word);
}

void Child::kill() {
  ::kill(pid_, SIGKILL);
  (void)wait();
}

int Child::wait() {
  return reap(std::exchange(pid_, -1));
}

}  // namespace cowmgr::test
