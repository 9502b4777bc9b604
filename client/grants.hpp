// What a reply grants to this process. Whoever cannot keep it, for whatever reason, gives it back: the daemon
// counts it from the reply on, and nobody else gets it.
//
//   Attach, SealArray          a view of each array          -> `released` of any request
//   MakeArray, AllocateSlot    an array to be written        -> AbortArray
//   MakeResults                a set                         -> CancelResults, and forget it
//   LeaseSlots, CommitSlots    slots                         -> GiveBackSlots
//
// All other replies only tell something, OpenResults too.
#pragma once

#include <cstdint>
#include <vector>

#include "client/channel.hpp"

namespace cowmgr::detail {

struct Grants {
  std::vector<std::uint64_t> views{};  // ids of arrays, one for each view
  std::uint64_t array = 0;             // to be written; 0: none
  std::uint64_t made_set = 0;          // 0: none
  std::uint64_t set = 0;               // whose slots these are
  std::vector<std::uint64_t> slots{};
  std::vector<std::uint32_t> attempts{};
  bool keeps_mapping = false;  // of `set`, for other slots
  bool is_unmapped = false;    // `set`, beside its slots: nobody has said so yet

  // What `reply` grants whoever asked `request`.
  [[nodiscard]] static Grants of(const wire::Request& request, const wire::Reply& reply);
  // The same of a reply that nobody waited for. Who ended a slot looks after the reply whether the set is
  // mapped still, and could not do so here; of a process that holds other slots the daemon knows better.
  [[nodiscard]] static Grants of_late(const wire::Request& request, const wire::Reply& reply);

  [[nodiscard]] bool is_empty() const noexcept {
    return views.empty() && array == 0 && made_set == 0 && slots.empty() && !is_unmapped;
  }
  // Views apart, which go with any request: finishes on `channel` the request that gives the next part back,
  // which is not among this any more then. False when there is none left.
  [[nodiscard]] bool finish_next(Channel& channel);
};

// What is to go back, one after the other, on one channel.
using Unkept = std::vector<Grants>;

}  // namespace cowmgr::detail
