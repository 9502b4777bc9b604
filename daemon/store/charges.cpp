#include "daemon/store/charges.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::uint64_t kPerArray = 3;             // descriptors, while it is written
constexpr std::uint32_t kMostOwnerArrays = 65536;  // where descriptors are plenty
constexpr std::uint32_t kMostOwnerSessions = 4096;
constexpr std::uint32_t kShareOfOthers = 4;  // one connection in so many is not for the first user

}  // namespace

QuotaLimits limits_within(const DescriptorPlan& plan, QuotaLimits limits) noexcept {
  const auto arrays = static_cast<std::uint32_t>(std::max<std::uint64_t>(1, plan.segments / kPerArray));
  limits.sessions = plan.connections;
  if (limits.owner_arrays == 0) limits.owner_arrays = std::min(arrays, kMostOwnerArrays);
  if (limits.owner_sessions == 0)
    limits.owner_sessions =
        std::min(std::max(1U, plan.connections - plan.connections / kShareOfOthers), kMostOwnerSessions);
  return limits;
}

// ---- Charge ----

Charge& Charge::operator=(Charge&& other) noexcept {
  give_back();
  charges_ = std::exchange(other.charges_, nullptr);
  user_ = other.user_;
  size_bytes_ = std::exchange(other.size_bytes_, 0);
  arrays_ = std::exchange(other.arrays_, 0);
  connections_ = std::exchange(other.connections_, 0);
  return *this;
}

Result<void> Charge::grow(std::uint64_t more_bytes) {
  if (charges_ == nullptr) return {};
  if (auto ok = charges_->check_bytes(user_, more_bytes); !ok) return ok;
  charges_->uses_.at(user_).size_bytes += more_bytes;
  size_bytes_ += more_bytes;
  return {};
}

void Charge::shrink(std::uint64_t less_bytes) noexcept {
  if (charges_ == nullptr) return;
  COWMGR_ASSERT(size_bytes_ >= less_bytes);
  size_bytes_ -= less_bytes;
  charges_->uses_.find(user_)->second.size_bytes -= less_bytes;
}

void Charge::give_back() noexcept {
  if (charges_ == nullptr) return;
  const auto use = charges_->uses_.find(user_);
  use->second.size_bytes -= std::exchange(size_bytes_, 0);
  use->second.arrays -= std::exchange(arrays_, 0);
  use->second.connections -= connections_;
  charges_->connections_ -= std::exchange(connections_, 0);
  if (use->second.arrays == 0 && use->second.connections == 0) charges_->uses_.erase(use);
  charges_ = nullptr;
}

// ---- Charges ----

Charges::Use Charges::use_of(uid_t user) const {
  const auto at = uses_.find(user);
  return at == uses_.end() ? Use() : at->second;
}

Charge Charges::take(uid_t user, std::uint64_t size_bytes, std::uint32_t arrays, std::uint32_t connections) {
  Use& use = uses_[user];
  use.size_bytes += size_bytes;
  use.arrays += arrays;
  use.connections += connections;
  connections_ += connections;
  Charge charge;
  charge.charges_ = this;
  charge.user_ = user;
  charge.size_bytes_ = size_bytes;
  charge.arrays_ = arrays;
  charge.connections_ = connections;
  return charge;
}

Result<void> Charges::check_bytes(uid_t user, std::uint64_t more_bytes) const {
  const std::uint64_t held_bytes = use_of(user).size_bytes;
  if (more_bytes <= limits_.owner_bytes && held_bytes <= limits_.owner_bytes - more_bytes) return {};
  return fail(
      Errc::quota_exceeded,
      fmt::format(
          "this needs {}; user {} holds {} of the {} that one user may; evict some, or raise --owner-bytes",
          format_size(more_bytes), user, format_size(held_bytes), format_size(limits_.owner_bytes)));
}

Result<Charge> Charges::array(uid_t user, std::uint64_t size_bytes) {
  const std::uint32_t arrays = use_of(user).arrays;
  if (arrays >= limits_.owner_arrays) {
    return fail(
        Errc::quota_exceeded,
        fmt::format(
            "user {} holds {} arrays, as many as one user may; evict some, or raise --owner-arrays, and "
            "the daemon's limit of open files if it is that (`ulimit -n`, LimitNOFILE= of the service)",
            user, arrays));
  }
  if (auto ok = check_bytes(user, size_bytes); !ok) return error_of(std::move(ok));
  return take(user, size_bytes, 1, 0);
}

Charge Charges::array_there_is(uid_t user, std::uint64_t size_bytes) {
  return take(user, size_bytes, 1, 0);
}

Result<Charge> Charges::connection(uid_t user) {
  const std::uint32_t connections = use_of(user).connections;
  if (connections >= limits_.owner_sessions) {
    return fail(
        Errc::quota_exceeded,
        fmt::format("user {} has {} connections, as many as one user may; close some, or raise "
                    "--owner-sessions, and the "
                    "daemon's limit of open files if it is that (`ulimit -n`, LimitNOFILE= of the service)",
                    user, connections));
  }
  if (connections_ >= limits_.sessions) {
    return fail(
        Errc::quota_exceeded,
        fmt::format("there are {} connections, as many as the daemon has open files for; close some, or "
                    "raise its limit of open files (`ulimit -n`, LimitNOFILE= of the service)",
                    connections_));
  }
  return take(user, 0, 0, 1);
}

}  // namespace cowmgr
