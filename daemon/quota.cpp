#include "daemon/quota.hpp"

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {

Result<void> Quota::charge_array(uid_t uid, std::uint64_t size_bytes) {
  const auto at = uses_.find(uid);
  const Use use = at == uses_.end() ? Use{} : at->second;
  if (use.arrays >= limits_.owner_arrays) {
    return fail(
        Errc::quota_exceeded,
        fmt::format("user {} holds {} arrays, as many as one user may; evict some, or raise --owner-arrays",
                    uid, use.arrays));
  }
  if (size_bytes > limits_.owner_bytes || use.size_bytes > limits_.owner_bytes - size_bytes) {
    return fail(
        Errc::quota_exceeded,
        fmt::format(
            "this needs {}; user {} holds {} of the {} that one user may; evict some, or raise --owner-bytes",
            format_size(size_bytes), uid, format_size(use.size_bytes), format_size(limits_.owner_bytes)));
  }
  Use& charged = uses_[uid];
  charged.size_bytes += size_bytes;
  ++charged.arrays;
  return {};
}

void Quota::release_array(uid_t uid, std::uint64_t size_bytes) noexcept {
  Use& use = uses_[uid];
  COWMGR_ASSERT(use.arrays > 0 && use.size_bytes >= size_bytes);
  use.size_bytes -= size_bytes;
  --use.arrays;
  forget_if_unused(uid);
}

Result<void> Quota::charge_session(uid_t uid) {
  const auto at = uses_.find(uid);
  const std::uint32_t sessions = at == uses_.end() ? 0 : at->second.sessions;
  if (sessions >= limits_.owner_sessions) {
    return fail(
        Errc::quota_exceeded,
        fmt::format(
            "user {} has {} connections, as many as one user may; close some, or raise --owner-sessions", uid,
            sessions));
  }
  ++uses_[uid].sessions;
  return {};
}

void Quota::release_session(uid_t uid) noexcept {
  Use& use = uses_[uid];
  COWMGR_ASSERT(use.sessions > 0);
  --use.sessions;
  forget_if_unused(uid);
}

void Quota::forget_if_unused(uid_t uid) noexcept {
  const Use& use = uses_[uid];
  if (use.arrays == 0 && use.sessions == 0) uses_.erase(uid);
}

}  // namespace cowmgr
