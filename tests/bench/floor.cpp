#include "tests/bench/floor.hpp"

#include <array>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/errors.hpp"

namespace cowmgr::bench {
namespace {

using Record = std::array<char, 64>;

UniqueFd unnamed_object(std::size_t size_bytes) {
  const UniqueFd writer(::shm_open("/cowmgr-bench-floor", O_RDWR | O_CREAT | O_EXCL, 0400));
  UniqueFd reader(::shm_open("/cowmgr-bench-floor", O_RDONLY, 0));
  ::shm_unlink("/cowmgr-bench-floor");
  COWMGR_ASSERT(reader && ::ftruncate(writer.get(), static_cast<off_t>(size_bytes)) == 0);
  return reader;
}

void answer_until_end(int socket, int fd) {
  Record record{};
  while (::recv(socket, record.data(), record.size(), 0) > 0) {
    iovec part{record.data(), record.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof fd)> control{};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (::sendmsg(socket, &message, MSG_NOSIGNAL) < 0) return;
  }
}

}  // namespace

FloorServer::FloorServer(std::size_t size_bytes) : size_bytes_(size_bytes) {
  std::array<int, 2> ends{};
  COWMGR_ASSERT(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) == 0);
  socket_.reset(ends[0]);
  UniqueFd theirs(ends[1]);
  const UniqueFd object = unnamed_object(size_bytes);
  pid_ = ::fork();
  COWMGR_ASSERT(pid_ >= 0);
  if (pid_ == 0) {
    socket_.reset();
    answer_until_end(theirs.get(), object.get());
    ::_exit(0);
  }
}

FloorServer::~FloorServer() {
  socket_.reset();
  ::waitpid(pid_, nullptr, 0);
}

void FloorServer::map_and_unmap() const {
  Record record{};
  COWMGR_ASSERT(::send(socket_.get(), record.data(), record.size(), MSG_NOSIGNAL) > 0);
  iovec part{record.data(), record.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  COWMGR_ASSERT(::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC) > 0);
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  COWMGR_ASSERT(header != nullptr);
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  void* address = ::mmap(nullptr, size_bytes_, PROT_READ, MAP_SHARED, fd, 0);
  COWMGR_ASSERT(address != MAP_FAILED);
  ::munmap(address, size_bytes_);
  ::close(fd);
}

void put_by_hand(const std::byte* from, std::size_t size_bytes) {
  const UniqueFd fd(::shm_open("/cowmgr-bench-put", O_RDWR | O_CREAT | O_EXCL, 0600));
  COWMGR_ASSERT(fd && ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) == 0);
  void* address = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  COWMGR_ASSERT(address != MAP_FAILED);
  std::memcpy(address, from, size_bytes);
  ::munmap(address, size_bytes);
  ::shm_unlink("/cowmgr-bench-put");
}

}  // namespace cowmgr::bench
