#include "daemon/quota.hpp"

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {

Result<void> Quota::charge_array(uid_t uid, std::uint64_t size_bytes) {
  const auto at = uses_.find(uid);
  const std::uint32_t arrays = at == uses_.end() ? 0 : at->second.arrays;
  if (arrays >= limits_.owner_arrays) {
    return fail(
        Errc::quota_exceeded,
        fmt::format(
            "user {} holds {} arrays, as many as one user may; evict some, or raise --owner-arrays, and "
            "the daemon's limit of open files if it is that (`ulimit -n`, LimitNOFILE= of the service)",
            uid, arrays));
  }
  if (auto ok = charge_bytes(uid, size_bytes); !ok) return ok;
  ++uses_[uid].arrays;
  return {};
}

void Quota::take_over_array(uid_t uid, std::uint64_t size_bytes) {
  Use& use = uses_[uid];
  use.size_bytes += size_bytes;
  ++use.arrays;
}

Result<void> Quota::charge_bytes(uid_t uid, std::uint64_t size_bytes) {
  const auto at = uses_.find(uid);
  const std::uint64_t held_bytes = at == uses_.end() ? 0 : at->second.size_bytes;
  if (size_bytes > limits_.owner_bytes || held_bytes > limits_.owner_bytes - size_bytes) {
    return fail(
        Errc::quota_exceeded,
        fmt::format(
            "this needs {}; user {} holds {} of the {} that one user may; evict some, or raise --owner-bytes",
            format_size(size_bytes), uid, format_size(held_bytes), format_size(limits_.owner_bytes)));
  }
  uses_[uid].size_bytes += size_bytes;
  return {};
}

void Quota::release_bytes(uid_t uid, std::uint64_t size_bytes) noexcept {
  Use& use = uses_[uid];
  COWMGR_ASSERT(use.size_bytes >= size_bytes);
  use.size_bytes -= size_bytes;
  forget_if_unused(uid);
}

void Quota::release_array(uid_t uid, std::uint64_t size_bytes) noexcept {
  release_bytes(uid, size_bytes);
  Use& use = uses_[uid];
  COWMGR_ASSERT(use.arrays > 0);
  --use.arrays;
  forget_if_unused(uid);
}

Result<void> Quota::charge_session(uid_t uid) {
  const auto at = uses_.find(uid);
  const std::uint32_t sessions = at == uses_.end() ? 0 : at->second.sessions;
  if (sessions >= limits_.owner_sessions) {
    return fail(
        Errc::quota_exceeded,
        fmt::format("user {} has {} connections, as many as one user may; close some, or raise "
                    "--owner-sessions, and the "
                    "daemon's limit of open files if it is that (`ulimit -n`, LimitNOFILE= of the service)",
                    uid, sessions));
  }
  if (sessions_ >= limits_.sessions) {
    return fail(
        Errc::quota_exceeded,
        fmt::format("there are {} connections, as many as the daemon has open files for; close some, or "
                    "raise its limit of open files (`ulimit -n`, LimitNOFILE= of the service)",
                    sessions_));
  }
  ++sessions_;
  ++uses_[uid].sessions;
  return {};
}

void Quota::release_session(uid_t uid) noexcept {
  Use& use = uses_[uid];
  COWMGR_ASSERT(use.sessions > 0);
  --use.sessions;
  --sessions_;
  forget_if_unused(uid);
}

void Quota::forget_if_unused(uid_t uid) noexcept {
  const Use& use = uses_[uid];
  if (use.arrays == 0 && use.sessions == 0 && use.size_bytes == 0) uses_.erase(uid);
}

}  // namespace cowmgr
