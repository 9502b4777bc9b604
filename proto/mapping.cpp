#include "proto/mapping.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <sys/mman.h>
#include <utility>

#include <boost/interprocess/exceptions.hpp>

#include "proto/segment.hpp"

namespace cowmgr {
namespace {

namespace ipc = boost::interprocess;

// What mapped_region maps: a descriptor that it does not own.
class BorrowedFd {
 public:
  explicit BorrowedFd(int fd) : handle_{fd, false} {}
  [[nodiscard]] ipc::mapping_handle_t get_mapping_handle() const noexcept { return handle_; }

 private:
  ipc::mapping_handle_t handle_;
};

ipc::mode_t mode_of(Access access) {
  switch (access) {
    case Access::read_only:
      return ipc::read_only;
    case Access::read_write:
      return ipc::read_write;
    default:
      return ipc::copy_on_write;
  }
}

ipc::mapped_region map_at(int fd, std::uint64_t size_bytes, Access access, void* address,
                          ipc::map_options_t options = ipc::default_map_options) {
  return {BorrowedFd(fd), mode_of(access), 0, size_bytes, address, options};
}

// Where the last aligned mapping lay that this process gave up: the next one most likely fits there, which
// takes one system call instead of four. An address and the huge pages that fit there, in one word, so that a
// child forked at any moment finds it whole: aligned addresses have room for a number in their low bits.
class Hole {
 public:
  void leave(const void* address, std::uint64_t size_bytes) noexcept {
    const auto place = reinterpret_cast<std::uintptr_t>(address);
    if (place % kHugePageBytes != 0) return;
    const std::uint64_t pages = (size_bytes + kHugePageBytes - 1) / kHugePageBytes;
    place_and_pages_ = place | std::min(pages, kHugePageBytes - 1);
  }

  // An address where `size_bytes` may fit, or null. Nobody else gets it from here.
  [[nodiscard]] void* take(std::uint64_t size_bytes) noexcept {
    const std::uint64_t hole = place_and_pages_.load();
    if (hole % kHugePageBytes * kHugePageBytes < size_bytes) return nullptr;
    place_and_pages_ = 0;
    const std::uintptr_t place = hole / kHugePageBytes * kHugePageBytes;
    // Only the kernel ever looks at it: nothing lives there yet.
    return reinterpret_cast<void*>(place);  // NOLINT(performance-no-int-to-ptr)
  }

 private:
  std::atomic<std::uint64_t> place_and_pages_{0};
};

Hole last_hole;

// Address space in which nothing lives yet.
struct Reservation {
  explicit Reservation(std::uint64_t length) noexcept
      : size_bytes(length),
        start(::mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}

  // Gives back all but [first, first + kept), which is mapped to something else by now.
  void trim(std::uint64_t first, std::uint64_t kept) const noexcept {
    if (first > 0) ::munmap(start, first);
    if (first + kept < size_bytes)
      ::munmap(static_cast<std::byte*>(start) + first + kept, size_bytes - first - kept);
  }

  std::uint64_t size_bytes;
  void* start;
};

// mmap(2) knows no alignment, and an address that is only a hint is refused as soon as something lives there.
// So take a huge page more than is needed, map over the aligned part of that, and give the rest back.
ipc::mapped_region map_aligned(int fd, std::uint64_t size_bytes, Access access) {
  if (size_bytes < kHugePageBytes) return map_at(fd, size_bytes, access, nullptr);
  if (void* address = last_hole.take(size_bytes)) {
    try {
      return map_at(fd, size_bytes, access, address);  // a hint: nothing that lives there is replaced
    } catch (const ipc::interprocess_exception& error) {
      if (error.get_error_code() != ipc::busy_error) throw;  // busy: somebody took the place
    }
  }
  const std::uint64_t whole_pages = (size_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  const Reservation room(whole_pages + kHugePageBytes);
  if (room.start == MAP_FAILED)
    return map_at(fd, size_bytes, access, nullptr);  // unaligned is better than not at all
  const auto misaligned = reinterpret_cast<std::uintptr_t>(room.start) % kHugePageBytes;
  const std::uint64_t first = misaligned == 0 ? 0 : kHugePageBytes - misaligned;
  try {
    auto region = map_at(fd, size_bytes, access, static_cast<std::byte*>(room.start) + first, MAP_FIXED);
    room.trim(first, whole_pages);
    return region;
  } catch (const ipc::interprocess_exception&) {
    room.trim(0, 0);
    throw;
  }
}

}  // namespace

Mapping::~Mapping() {
  if (region_.get_size() < kHugePageBytes) return;
  const void* address = region_.get_address();
  const std::uint64_t size = region_.get_size();
  region_ = ipc::mapped_region();
  last_hole.leave(address, size);
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  const Mapping old(std::move(*this));
  region_ = std::move(other.region_);
  return *this;
}

Result<Mapping> Mapping::map(int fd, std::uint64_t size_bytes, Access access) {
  COWMGR_ASSERT(size_bytes > 0);
  try {
    auto region = map_aligned(fd, size_bytes, access);
    if (access == Access::read_write && ::madvise(region.get_address(), size_bytes, MADV_DONTFORK) != 0) {
      return tl::unexpected(os_error("madvise", "a writable mapping", errno));
    }
    return Mapping(std::move(region));
  } catch (const ipc::interprocess_exception& error) {
    return tl::unexpected(os_error("mmap", "a segment", error.get_native_error()));
  }
}

Result<void> Mapping::make_read_only(int fd) {
  // region_ goes on owning the address range; what lies there is replaced under it (mmap(2), MAP_FIXED).
  if (::mmap(data(), size_bytes(), PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
    return tl::unexpected(os_error("mmap", "a sealed segment", errno));
  }
  return {};
}

}  // namespace cowmgr
