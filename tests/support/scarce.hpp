// A process that has run out of something, for as long as an object lives. To be used in a child of the test.
#pragma once

#include <cstdint>
#include <fstream>
#include <sys/resource.h>
#include <unistd.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::test {

// The soft limit of `resource`, lowered.
class Lowered {
 public:
  Lowered(__rlimit_resource resource, std::uint64_t most) : resource_(resource) {
    COWMGR_ASSERT(::getrlimit(resource, &before_) == 0);
    const rlimit lowered{most, before_.rlim_max};
    COWMGR_ASSERT(::setrlimit(resource, &lowered) == 0);
  }
  Lowered(const Lowered&) = delete;
  Lowered& operator=(const Lowered&) = delete;
  ~Lowered() { (void)::setrlimit(resource_, &before_); }

 private:
  __rlimit_resource resource_;
  rlimit before_{};
};

// No more than `left` descriptors can be opened.
class FewDescriptors : public Lowered {
 public:
  explicit FewDescriptors(unsigned left) : Lowered(RLIMIT_NOFILE, lowest_free() + left) {}

 private:
  static std::uint64_t lowest_free() { return static_cast<std::uint64_t>(UniqueFd(::dup(0)).get()); }
};

// No more than `left_bytes` can be mapped.
class LittleAddressSpace : public Lowered {
 public:
  explicit LittleAddressSpace(std::uint64_t left_bytes) : Lowered(RLIMIT_AS, mapped_bytes() + left_bytes) {}

 private:
  static std::uint64_t mapped_bytes() {
    std::uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  }
};

}  // namespace cowmgr::test
