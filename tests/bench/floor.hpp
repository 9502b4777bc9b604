// The least that handing out a mapping can cost: plain system calls, and nothing else.
#pragma once

#include <cstddef>
#include <sys/types.h>

#include "proto/unique_fd.hpp"

namespace cowmgr::bench {

// A process that answers each 64-byte record on a SOCK_SEQPACKET socket with a record and the read-only
// descriptor of one shared memory object. Ends with this object.
class FloorServer {
 public:
  // `size_bytes` of the object; it is not backed by memory, since it is mapped and never touched.
  explicit FloorServer(std::size_t size_bytes);
  ~FloorServer();
  FloorServer(const FloorServer&) = delete;
  FloorServer& operator=(const FloorServer&) = delete;

  // One round trip with a passed descriptor, mmap, munmap, close.
  void map_and_unmap() const;
  [[nodiscard]] pid_t pid() const noexcept { return pid_; }

 private:
  std::size_t size_bytes_;
  UniqueFd socket_;
  pid_t pid_ = -1;
};

// Fills a fresh shared memory object of `size_bytes` with memcpy from `from`, as a program that shares memory
// by hand would: shm_open, ftruncate, mmap, memcpy (first touch), munmap, unlink.
void put_by_hand(const std::byte* from, std::size_t size_bytes);

}  // namespace cowmgr::bench
