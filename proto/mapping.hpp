// A segment mapped into this process.
#pragma once

#include <cstddef>
#include <cstdint>

#include <boost/interprocess/mapped_region.hpp>

#include "proto/errors.hpp"

namespace cowmgr {

enum class Access : std::uint8_t {
  read_only,      // MAP_SHARED, PROT_READ
  read_write,     // MAP_SHARED, PROT_READ | PROT_WRITE: needs a writable descriptor
  copy_on_write,  // MAP_PRIVATE, PROT_READ | PROT_WRITE: writes stay in this process
};

// Owns one mapping of a whole segment, from its first byte; unmaps it when it goes. Move-only. The
// descriptor may be closed once map() has returned (mmap(2)).
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&&) noexcept = default;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // Maps the first `size_bytes` (not 0) of `fd`. Segments of a huge page or more start at a multiple of the
  // huge page size where the address space allows it: only then can the kernel map them with huge pages.
  // A read_write mapping is kept from forked children (MADV_DONTFORK): a child must not be a second writer.
  // Takes a constant time, whatever the size. Errors: out_of_memory, os_failure.
  [[nodiscard]] static Result<Mapping> map(int fd, std::uint64_t size_bytes, Access access);

  // Replaces a read_write mapping by a read-only one of `fd` at the same address, in one step: pointers into
  // it stay valid, and the kernel no longer counts this process as a writer of the file. mprotect(2) would
  // not do: the mapping could be made writable again, so the kernel keeps counting it.
  [[nodiscard]] Result<void> make_read_only(int fd);

  [[nodiscard]] std::byte* data() const noexcept { return static_cast<std::byte*>(region_.get_address()); }
  [[nodiscard]] std::uint64_t size_bytes() const noexcept { return region_.get_size(); }

 private:
  explicit Mapping(boost::interprocess::mapped_region region) : region_(std::move(region)) {}

  boost::interprocess::mapped_region region_;
};

}  // namespace cowmgr
