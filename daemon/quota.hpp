// What one owner may hold at most, so that nobody exhausts what others need.
#pragma once

#include <cstdint>
#include <sys/types.h>
#include <unordered_map>

#include "proto/errors.hpp"

namespace cowmgr {

struct QuotaLimits {
  std::uint64_t owner_bytes = UINT64_MAX;  // of segments; default: no limit but the capacity
  std::uint32_t owner_arrays =
      65536;  // each takes three descriptors of the daemon until it is sealed, then two
  std::uint32_t owner_sessions = 4096;  // connections; each takes one descriptor, and one for its process
  std::uint32_t sessions = UINT32_MAX;  // of all users together
};

// Counts by uid. A charge that would pass a limit is refused with quota_exceeded and changes nothing.
class Quota {
 public:
  explicit Quota(const QuotaLimits& limits) : limits_(limits) {}

  [[nodiscard]] Result<void> charge_array(uid_t uid, std::uint64_t size_bytes);
  // An array that is there already, of before the daemon's start: no limit refuses it.
  void take_over_array(uid_t uid, std::uint64_t size_bytes);
  // An array, or what is counted as one, grows.
  [[nodiscard]] Result<void> charge_bytes(uid_t uid, std::uint64_t size_bytes);
  void release_bytes(uid_t uid, std::uint64_t size_bytes) noexcept;
  void release_array(uid_t uid, std::uint64_t size_bytes) noexcept;
  [[nodiscard]] Result<void> charge_session(uid_t uid);
  void release_session(uid_t uid) noexcept;

 private:
  struct Use {
    std::uint64_t size_bytes = 0;
    std::uint32_t arrays = 0;
    std::uint32_t sessions = 0;
  };
  void forget_if_unused(uid_t uid) noexcept;

  QuotaLimits limits_;
  std::unordered_map<uid_t, Use> uses_;
  std::uint32_t sessions_ = 0;  // of all
};

}  // namespace cowmgr
