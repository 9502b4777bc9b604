#include "tests/support/service_manager.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sstream>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr int kLeastNumber = 100;  // of a stored descriptor: beyond those that a service gets them as

UniqueFd listen_at(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), std::min(path.size(), sizeof address.sun_path - 1));
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0) << path;
  return fd;
}

}  // namespace

ServiceManager::ServiceManager(std::string path) : path_(std::move(path)), socket_(listen_at(path_)) {}

ServiceManager::~ServiceManager() {
  ::unlink(path_.c_str());
}

bool ServiceManager::await_ready(pid_t pid) {
  is_ready_ = false;
  const UniqueFd pidfd = open_pidfd(pid);
  const int timeout_ms = static_cast<int>(std::chrono::milliseconds(kDeadline).count());
  while (!is_ready_) {
    std::array<pollfd, 2> events{{{socket_.get(), POLLIN, 0}, {pidfd.get(), POLLIN, 0}}};
    if (::poll(events.data(), events.size(), timeout_ms) <= 0 || (events[0].revents & POLLIN) == 0)
      return false;
    (void)hear();
  }
  return true;
}

const ServiceManager::Stored& ServiceManager::stored() {
  while (hear()) {
  }
  return stored_;
}

std::vector<std::string> ServiceManager::names() {
  std::vector<std::string> names;
  for (const auto& entry : stored()) names.push_back(entry.first);
  return names;
}

void ServiceManager::store(const std::string& name, const UniqueFd& fd) {
  stored_.emplace_back(name, UniqueFd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, kLeastNumber)));
}

bool ServiceManager::hear() {
  std::vector<std::byte> buffer(kMaxFrameBytes);
  const auto message = receive_frame(socket_.get(), buffer);
  if (!message || !*message) return false;
  obey(text_of((*message)->bytes), (*message)->fds);
  return true;
}

void ServiceManager::obey(const std::string& message, const std::vector<UniqueFd>& fds) {
  std::istringstream lines(message);
  std::string name = "stored";  // what systemd calls those that have no name
  bool is_to_store = false;
  bool is_to_remove = false;
  for (std::string line; std::getline(lines, line);) {
    if (line == "READY=1") is_ready_ = true;
    if (line == "FDSTORE=1") is_to_store = true;
    if (line == "FDSTOREREMOVE=1") is_to_remove = true;
    if (line.starts_with("FDNAME=")) name = line.substr(std::strlen("FDNAME="));
  }
  if (is_to_remove) std::erase_if(stored_, [&](const auto& entry) { return entry.first == name; });
  if (!is_to_store) return;
  for (const UniqueFd& fd : fds) store(name, fd);
}

}  // namespace cowmgr::test
