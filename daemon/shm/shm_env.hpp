// The one seam to the kernel's shared memory: every system call on a segment is made here.
//
// 1. A segment is created with mode 0400 and O_EXCL: the creating open is the only way to a writable
//    descriptor, even for the same user (shm_open(3), open(2)).
// 2. Memory is backed before anybody gets a descriptor: no reader or writer ever meets SIGBUS for want of it.
// 3. Sealed means that the kernel granted a read lease, which it does only when no writable descriptor and no
//    writable mapping of the file exists in any process (fcntl(2), F_SETLEASE; fs/locks.c,
//    check_conflicting_open). The lease is kept: whoever opens the file for writing later breaks it.
// 4. What must outlive the daemon beside the data stands in the file's mode, where no writer can forge it
//    (proto/segment_file.hpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

#include "daemon/shm/cgroup.hpp"
#include "daemon/shm/descriptors.hpp"
#include "proto/errors.hpp"
#include "proto/segment.hpp"
#include "proto/segment_file.hpp"

namespace cowmgr {

// A segment as the daemon holds it. Closing the descriptors does not remove its name: remove() does.
struct Segment {
  std::string name;              // "/cowmgr.<instance>.<id>"; empty: no segment, or one without a name
  std::uint64_t size_bytes = 0;  // of the whole file
  SegmentFd writer{};            // O_RDWR, until the seal
  SegmentFd reader{};            // O_RDONLY; this one is handed to readers
  SegmentFd lease{};             // O_RDONLY; holds the lease, never leaves the daemon
};

// The same segment with a descriptor of its own for reading: for work in another thread, while the array
// goes. Errors: quota_exceeded, out_of_memory, os_failure.
[[nodiscard]] Result<Segment> reader_of(const Segment& segment);
// Whether both are open and lead to the same memory, whatever their names.
[[nodiscard]] bool is_same_file(const Segment& one, const Segment& other) noexcept;

// A process that can still write to a segment.
struct Holder {
  pid_t pid = 0;
  std::string command;
};

// Where the data of a segment lies in its file.
struct DataRange {
  std::uint64_t offset = kDataOffset;
  std::uint64_t size_bytes = 0;
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
  // and be read with a signalfd, which tells the lease's descriptor (ssi_fd). Memory is backed as long as
  // `groups` have room for it.
  ShmEnv(std::string instance, int lease_signal, MemoryGroups groups = MemoryGroups());

  [[nodiscard]] const std::string& instance() const noexcept { return instance_; }

  // Whether the kernel gives leases here; some sandboxes do not. Tried out on a segment of its own; true,
  // too, when there is no room for that.
  [[nodiscard]] bool has_leases() const noexcept { return has_leases_; }

  // ---- What a daemon that is gone left behind: only with the instance's lock held ----

  // Removes all segments of this instance that belong to this user. Returns how many. Errors: as list().
  Result<std::size_t> remove_leftovers() const;
  // The ids of all segments of this instance. Errors: out_of_memory, os_failure.
  [[nodiscard]] Result<std::vector<std::uint64_t>> list() const;
  // A segment that was found, and what its file says of itself.
  struct Found {
    std::uint64_t id = 0;
    Segment segment;  // without a writable descriptor
    SegmentFile file;
    // It lost its name to an eviction, and nobody has it open or mapped any more, nor can until `segment`,
    // which is then for nothing but to be removed, is gone.
    bool is_free = false;
  };
  // Opens a segment, for reading. Errors: not_found, permission_denied for what this user did not make,
  // out_of_memory, os_failure.
  [[nodiscard]] Result<Found> find(std::uint64_t id) const;
  // The same of the segment behind a descriptor that was kept elsewhere; it may have no name any more.
  // Errors: permission_denied, out_of_memory, os_failure.
  [[nodiscard]] Result<Found> find(std::uint64_t id, const UniqueFd& kept) const;
  // Takes the lease of a sealed segment, where the kernel gives any. Errors: still_writable, os_failure.
  [[nodiscard]] Result<void> prove_sealed(const Segment& segment) const;
  // Gives the daemon a writable descriptor again of a segment that is not sealed. Errors: os_failure.
  [[nodiscard]] Result<void> open_writer(Segment& segment) const;
  // Moves a segment aside, to a name that no daemon serves. Errors: os_failure.
  [[nodiscard]] Result<void> quarantine(std::uint64_t id) const;

  // ---- Making and sealing ----

  // Total and free bytes of the file system that holds the segments.
  struct Space {
    std::uint64_t total_bytes = 0;
    std::uint64_t free_bytes = 0;
  };
  [[nodiscard]] Space space() const noexcept;

  // Whether there is a file with the name of that segment, whoever made it.
  [[nodiscard]] bool has_name(std::uint64_t id) const noexcept;

  // Makes a segment, all of it backed by memory and zero but for `header` at its start and `trailer` (or
  // nothing) at its end. Blocks: seconds for gigabytes. Gives up soon after `stop` is set, with disconnected.
  // Nothing is left behind on failure. Errors: out_of_memory, quota_exceeded when there are no descriptors
  // for it, os_failure.
  [[nodiscard]] Result<Segment> create(std::uint64_t id, std::uint64_t size_bytes, std::string_view header,
                                       std::span<const std::byte> trailer,
                                       const std::atomic<bool>& stop) const;

  // Makes a segment longer that create() made and that is not sealed: what is new is backed by memory and
  // zero. Blocks. On failure it is as long as before. Errors: out_of_memory, os_failure.
  [[nodiscard]] Result<void> grow(const Segment& segment, std::uint64_t new_size_bytes) const;

  // Writes the trailer, gives up the daemon's own writable descriptor, asks the kernel for the lease, and
  // marks the file as sealed, and pinned if it shall be: from then on the array outlives the daemon. Returns
  // false when somebody can still write: call again later, as after any error but corrupted. Does not block.
  // Errors: corrupted when the file's size, backing, header or trailer are not as they must be;
  // out_of_memory, os_failure.
  [[nodiscard]] Result<bool> seal(Segment& segment, std::string_view header, const TrailerPage& trailer,
                                  bool is_pinned = false) const;

  // Makes a copy of a sealed segment that has lost its name, under that name: proven as for a seal, but not
  // marked as sealed, which mark_pinned() does when it is still wanted. Blocks. Nothing is left behind on
  // failure. Errors: as create() and seal(); os_failure when the name is another file's.
  [[nodiscard]] Result<Segment> rewrite(const Segment& segment, std::uint64_t id, std::string_view header,
                                        const TrailerPage& trailer, const std::atomic<bool>& stop) const;

  // The checksum of a sealed segment's data. Blocks. Errors: disconnected after `stop` is set; corrupted when
  // the file is shorter than that; os_failure.
  [[nodiscard]] Result<std::uint64_t> checksum(const Segment& segment, const DataRange& data,
                                               const std::atomic<bool>& stop) const;

  // Notes that a segment is a result set's: nobody but the daemon ever writes to it. Errors: os_failure.
  [[nodiscard]] Result<void> mark_slots(const Segment& segment) const;
  // Notes that an array is sealed, and whether it is pinned, for the next daemon to know. Errors: os_failure.
  [[nodiscard]] Result<void> mark_pinned(const Segment& segment, bool is_pinned) const;

  // Notes that a sealed array has lost its name, and stays for those who view it. Errors: os_failure.
  [[nodiscard]] Result<void> mark_draining(const Segment& segment) const;

  // ---- Segments that somebody else opens, harms or removes ----

  // A descriptor that can be read when files of the segments' directory lose their names; none when the
  // kernel has none left.
  [[nodiscard]] UniqueFd watch_names() const;
  // The segments of this instance that may have lost their names since; `all`: the kernel lost count.
  struct Removals {
    std::vector<std::uint64_t> ids;
    bool all = false;
  };
  [[nodiscard]] Removals read_removals(int watch_fd) const;
  // Whether the segment's name leads to nothing any more, or to another file.
  [[nodiscard]] static bool has_lost_name(const Segment& segment) noexcept;

  // Whether somebody waits for the lease of this descriptor, or it has none: a signal that names the number
  // of a descriptor may come when that number means another segment.
  [[nodiscard]] static bool is_lease_broken(int lease_fd) noexcept;

  // Gives up the lease, so that whoever waits to open the file for writing goes on.
  static void end_lease(int lease_fd) noexcept;

  // Takes the name away; the memory stays while descriptors or mappings do.
  void unlink(const Segment& segment) const noexcept;

  // unlink(), then closes all. Blocks while the kernel frees the memory, if nobody else holds it.
  void remove(Segment segment) const noexcept;

  // The same, but only when the kernel says that nobody else has the segment open or mapped: then its memory
  // is free. Else it keeps its name and one descriptor, and false is returned: call again later. Where the
  // kernel gives no leases nobody knows, and it is removed whoever has it. Blocks as remove() does.
  [[nodiscard]] bool try_remove(Segment& segment) const noexcept;

  // The processes that hold a writable descriptor or mapping, as far as /proc shows them to this user.
  // Blocks: reads /proc of every process.
  [[nodiscard]] std::vector<Holder> writers_of(const Segment& segment) const;

  // What memory stands behind the segment. Blocks: looks at each huge page once.
  [[nodiscard]] Result<SegmentUsage> usage(const Segment& segment) const;

 private:
  [[nodiscard]] bool probe_leases() const;
  enum class Others : std::uint8_t { none, some, unknown };  // who have the file open or mapped
  [[nodiscard]] Others others_with(Segment& segment) const noexcept;
  // The seal, but for the mark.
  [[nodiscard]] Result<bool> prove(Segment& segment, std::string_view header,
                                   const TrailerPage& trailer) const;
  [[nodiscard]] Result<void> mark(const Segment& segment, mode_t marks) const;
  template <class Open>
  [[nodiscard]] Result<Found> look_at(std::uint64_t id, const Open& open) const;
  [[nodiscard]] Result<void> take_lease(const Segment& segment) const;
  [[nodiscard]] Result<void> back(const Segment& segment, const std::atomic<bool>& stop) const;
  [[nodiscard]] bool back_huge(const Segment& segment, std::byte* base, std::uint64_t begin,
                               std::uint64_t end) const;

  std::string instance_;
  int lease_signal_;
  MemoryGroups groups_;
  bool has_leases_;
  mutable std::atomic<bool> has_told_{false};  // that there are no huge pages: once is enough
};

}  // namespace cowmgr
