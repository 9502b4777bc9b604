// What a reply brings: views, leases, arrays to write. It is the session's from the moment when it is
// granted, and the peer's when the reply is sent. If the reply never is, it goes back: no handler has to
// think of that, since whatever packs a view, a lease or an array into a reply notes it here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/core/session.hpp"

namespace cowmgr {

class Grants {
 public:
  Grants(Core& core, std::shared_ptr<Session> session);
  Grants(const Grants&) = delete;
  Grants& operator=(const Grants&) = delete;
  // Takes back what was not kept.
  ~Grants();

  void view(ArrayId id) { views_.push_back(id); }
  void lease(ArrayId set, const ResultSets::Lease& lease) { leases_.push_back({set, lease}); }
  // An array that the session is writing, or, for a slot of `set`, the daemon in its name.
  void array(ArrayId id) { arrays_.push_back(id); }
  // A result set that was just made.
  void set(ArrayId id) { sets_.push_back(id); }
  void allocation(ArrayId set, SlotIndex slot, ArrayId array) { allocations_.push_back({set, slot, array}); }

  // The reply was sent.
  void keep() noexcept;
  // It will not be. Nothing is left to the session of what it would have brought; if the session is gone,
  // that went with it, and if it has said since what it has (Hold), that counts.
  void take_back();

 private:
  struct Leased {
    ArrayId set = 0;
    ResultSets::Lease lease;
  };
  struct Allocated {
    ArrayId set = 0;
    SlotIndex slot = 0;
    ArrayId array = 0;
  };
  [[nodiscard]] bool is_empty() const noexcept;

  Core& core_;
  std::shared_ptr<Session> session_;
  std::uint64_t told_;  // how often the session had said what it has
  std::vector<ArrayId> views_;
  std::vector<Leased> leases_;
  std::vector<ArrayId> arrays_;
  std::vector<ArrayId> sets_;
  std::vector<Allocated> allocations_;
};

}  // namespace cowmgr
