// The one seam to the kernel's shared memory: every system call on a segment is made here.
//
// 1. A segment is created with mode 0400 and O_EXCL: the creating open is the only way to a writable
//    descriptor, even for the same user (shm_open(3), open(2)).
// 2. Memory is backed before anybody gets a descriptor: no reader or writer ever meets SIGBUS for want of it.
// 3. Sealed means that the kernel granted a read lease, which it does only when no writable descriptor and no
//    writable mapping of the file exists in any process (fcntl(2), F_SETLEASE; fs/locks.c,
//    check_conflicting_open). The lease is kept: whoever opens the file for writing later breaks it.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

#include "proto/errors.hpp"
#include "proto/segment.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// A segment as the daemon holds it. Closing the descriptors does not remove its name: remove() does.
struct Segment {
  std::string name;              // "/cowmgr.<instance>.<id>"; empty: no segment
  std::uint64_t size_bytes = 0;  // of the whole file
  UniqueFd writer{};             // O_RDWR, until the seal
  UniqueFd reader{};             // O_RDONLY; this one is handed to readers
  UniqueFd lease{};              // O_RDONLY; holds the lease, never leaves the daemon
};

// A process that can still write to a segment.
struct Holder {
  pid_t pid = 0;
  std::string command;
};

struct SegmentUsage {
  std::uint64_t resident_bytes = 0;
  std::uint64_t huge_bytes = 0;
};

// An id that nobody can foresee: names in /dev/shm can be taken by anybody. 0 if the kernel has none.
[[nodiscard]] std::uint64_t random_id() noexcept;

// Thread-safe: no state changes after the constructor, but for what was said about huge pages.
class ShmEnv {
 public:
  // `lease_signal` is delivered to this process when a lease is broken; it must be blocked in every thread
  // and be read with a signalfd, which tells the lease's descriptor (ssi_fd).
  ShmEnv(std::string instance, int lease_signal);

  // Whether the kernel gives leases here; some sandboxes do not. Tried out on a segment of its own.
  [[nodiscard]] bool has_leases() const noexcept { return has_leases_; }

  // Removes segments of this instance that a daemon which is gone left behind. Returns how many. Call it
  // only with the instance's lock held.
  std::size_t remove_leftovers() const;

  // Total and free bytes of the file system that holds the segments.
  struct Space {
    std::uint64_t total_bytes = 0;
    std::uint64_t free_bytes = 0;
  };
  [[nodiscard]] Space space() const noexcept;

  // Makes a segment, all of it backed by memory and zero but for `header` at its start. Blocks: seconds for
  // gigabytes. Gives up soon after `stop` is set, with disconnected. Nothing is left behind on failure.
  // Errors: out_of_memory, os_failure.
  [[nodiscard]] Result<Segment> create(std::uint64_t id, std::uint64_t size_bytes, std::string_view header,
                                       const std::atomic<bool>& stop) const;

  // Makes a segment longer that create() made and that is not sealed: what is new is backed by memory and
  // zero. Blocks. On failure it is as long as before. Errors: out_of_memory, os_failure.
  [[nodiscard]] Result<void> grow(const Segment& segment, std::uint64_t new_size_bytes) const;

  // Writes the trailer, gives up the daemon's own writable descriptor, and asks the kernel for the lease.
  // Returns false when somebody can still write: call again later. Does not block. Errors: corrupted when
  // the file's size, backing, header or trailer are not as they must be.
  [[nodiscard]] Result<bool> seal(Segment& segment, std::string_view header,
                                  const TrailerPage& trailer) const;

  // Whether somebody waits for the lease of this descriptor, or it has none: a signal that names the number
  // of a descriptor may come when that number means another segment.
  [[nodiscard]] static bool is_lease_broken(int lease_fd) noexcept;

  // Gives up the lease, so that whoever waits to open the file for writing goes on.
  void end_lease(const Segment& segment) const noexcept;

  // Takes the name away; the memory stays while descriptors or mappings do.
  void unlink(const Segment& segment) const noexcept;

  // unlink(), then closes all. Blocks while the kernel frees the memory, if nobody else holds it.
  void remove(Segment segment) const noexcept;

  // The processes that hold a writable descriptor or mapping, as far as /proc shows them to this user.
  // Blocks: reads /proc of every process.
  [[nodiscard]] std::vector<Holder> writers_of(const Segment& segment) const;

  // What memory stands behind the segment. Blocks: looks at each huge page once.
  [[nodiscard]] Result<SegmentUsage> usage(const Segment& segment) const;

 private:
  [[nodiscard]] bool probe_leases() const;
  [[nodiscard]] Result<void> take_lease(const Segment& segment) const;
  [[nodiscard]] Result<void> back(const Segment& segment, const std::atomic<bool>& stop) const;
  [[nodiscard]] bool back_huge(const Segment& segment, std::byte* base, std::uint64_t begin,
                               std::uint64_t end) const;

  std::string instance_;
  int lease_signal_;
  bool has_leases_;
  mutable std::atomic<bool> has_told_{false};  // that there are no huge pages: once is enough
};

}  // namespace cowmgr
