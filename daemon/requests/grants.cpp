#include "daemon/requests/grants.hpp"

#include <exception>
#include <utility>

#include <spdlog/spdlog.h>

namespace cowmgr {

Grants::Grants(Core& core, std::shared_ptr<Session> session)
    : core_(core), session_(std::move(session)), told_(session_->times_told()) {}

Grants::~Grants() {
  if (is_empty()) return;
  try {
    take_back();
  } catch (const std::exception& error) {
    // For want of memory alone. It stays with the session, and goes with that.
    spdlog::error("what a reply did not bring stays with process {}: {}", session_->peer().pid, error.what());
  }
}

bool Grants::is_empty() const noexcept {
  return views_.empty() && leases_.empty() && arrays_.empty() && sets_.empty() && allocations_.empty();
}

void Grants::keep() noexcept {
  views_.clear();
  leases_.clear();
  arrays_.clear();
  sets_.clear();
  allocations_.clear();
}

void Grants::take_back() {
  const auto views = std::exchange(views_, {});
  const auto leases = std::exchange(leases_, {});
  const auto arrays = std::exchange(arrays_, {});
  const auto sets = std::exchange(sets_, {});
  const auto allocations = std::exchange(allocations_, {});
  if (session_->gone() || session_->times_told() != told_) return;
  const SessionId session = session_->id();
  const Time now = Core::now();
  for (const ArrayId id : views) core_.store.release(session, id, now);
  for (const ArrayId id : arrays) {
    if (core_.store.is_writing(session, id)) core_.store.abort(id);
  }
  for (const ArrayId id : sets) {
    if (ResultSetRecord* set = core_.results.get(id)) (void)core_.results.cancel(session, *set, true);
  }
  for (const auto& [set, slot, array] : allocations) core_.results.drop_allocated(set, slot, array);
  for (const auto& [set, lease] : leases) {
    if (core_.results.holds(session, set, lease.slot, lease.attempt))
      (void)core_.results.give_back(session, *core_.results.get(set), lease.slot, now);
  }
}

}  // namespace cowmgr
