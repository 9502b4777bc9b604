// How the daemon's descriptors are shared out, so that arrays never take those that connections need: whoever
// connects is answered, whatever the others have put.
#pragma once

#include <cstdint>
#include <utility>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

// What follows from the limit of open files (RLIMIT_NOFILE): some for the daemon's own use, a third of the
// rest for connections, and what is left for segments.
struct DescriptorPlan {
  std::uint64_t open_files = 0;   // the limit
  std::uint64_t segments = 0;     // descriptors of all segments together; an array has three, once sealed two
  std::uint32_t connections = 0;  // of all users together; each takes three at most
};
[[nodiscard]] DescriptorPlan plan_descriptors(std::uint64_t open_files) noexcept;

// Raises this process's limit as far as it may, and plans for it: from then on has_descriptors_for_segments()
// refuses. To be called once, before there are other threads.
[[nodiscard]] DescriptorPlan claim_descriptors() noexcept;

// Whether `count` more descriptors may be opened for segments. Errors: quota_exceeded, with the limit and the
// cure. Threads that ask at the same moment may each be told yes: the daemon's own share has room for these.
[[nodiscard]] Result<void> check_descriptors(std::uint64_t count = 1);

// A descriptor that counts among those of segments. Move-only.
class SegmentFd {
 public:
  SegmentFd() noexcept = default;
  SegmentFd(UniqueFd fd) noexcept : fd_(std::move(fd)) { count(); }  // NOLINT(google-explicit-constructor)
  SegmentFd(SegmentFd&& other) noexcept = default;
  SegmentFd& operator=(SegmentFd&& other) noexcept {
    reset();
    fd_ = std::move(other.fd_);
    return *this;
  }
  SegmentFd(const SegmentFd&) = delete;
  SegmentFd& operator=(const SegmentFd&) = delete;
  ~SegmentFd() { reset(); }

  [[nodiscard]] int get() const noexcept { return fd_.get(); }
  [[nodiscard]] explicit operator bool() const noexcept { return static_cast<bool>(fd_); }
  void reset() noexcept;

 private:
  void count() const noexcept;

  UniqueFd fd_;
};

}  // namespace cowmgr
