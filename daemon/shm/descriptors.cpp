#include "daemon/shm/descriptors.hpp"

#include <algorithm>
#include <atomic>
#include <sys/resource.h>

#include <fmt/format.h>

namespace cowmgr {
namespace {

// Standard streams, locks, the listener, epoll, the signalfd, inotify, what the pool's threads read in /proc:
// some 20. The rest is for threads that open at the same moment.
constexpr std::uint64_t kOwn = 48;
constexpr std::uint64_t kConnectionShare = 3;      // one in so many of the rest
constexpr std::uint64_t kPerConnection = 3;        // socket, process, and one for what it asks for
constexpr std::uint64_t kMostPlanned = 1U << 30U;  // no kernel gives more (fs.nr_open)

// The kernel counts for the whole process, and so do we.
std::atomic<std::uint64_t> open_files{0};
std::atomic<std::uint64_t> for_segments{UINT64_MAX};
std::atomic<std::uint64_t> in_segments{0};

}  // namespace

DescriptorPlan plan_descriptors(std::uint64_t limit) noexcept {
  const std::uint64_t rest = limit > kOwn ? std::min(limit, kMostPlanned) - kOwn : 0;
  const std::uint64_t connections = std::max<std::uint64_t>(1, rest / kConnectionShare / kPerConnection);
  const std::uint64_t taken = connections * kPerConnection;
  return {.open_files = limit,
          .segments = rest > taken ? rest - taken : 0,
          .connections = static_cast<std::uint32_t>(connections)};
}

DescriptorPlan claim_descriptors() noexcept {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return plan_descriptors(kMostPlanned);
  rlimit raised{limit.rlim_max, limit.rlim_max};
  if (::setrlimit(RLIMIT_NOFILE, &raised) != 0) raised = limit;
  const DescriptorPlan plan = plan_descriptors(raised.rlim_cur);
  open_files = plan.open_files;
  for_segments = plan.segments;
  return plan;
}

Result<void> check_descriptors(std::uint64_t count) {
  const std::uint64_t held = in_segments;
  const std::uint64_t most = for_segments;
  if (held + count <= most) return {};
  return fail(
      Errc::quota_exceeded,
      fmt::format("the arrays of all users have {} open files of the daemon, of the {} that its limit of {} "
                  "leaves for them; evict some, or raise that limit (`ulimit -n`, LimitNOFILE= of the "
                  "service) and start the daemon again",
                  held, most, open_files.load()));
}

void SegmentFd::count() const noexcept {
  if (fd_) ++in_segments;
}

void SegmentFd::reset() noexcept {
  if (fd_) --in_segments;
  fd_.reset();
}

}  // namespace cowmgr
