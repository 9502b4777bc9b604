// What a daemon does with the segments that an earlier one of its instance left: it adopts arrays and result
// sets, keeps for a while what was being written, and moves aside what does not check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>

#include "daemon/shm/fd_store.hpp"
#include "daemon/shm/shm_env.hpp"
#include "daemon/store/results.hpp"
#include "daemon/store/store.hpp"

namespace cowmgr {

struct Recovery {
  std::size_t arrays = 0;  // sealed, and served again
  std::uint64_t array_bytes = 0;
  std::size_t tampered = 0;     // of them, but not served: somebody can write to them
  std::size_t sets = 0;         // of results
  std::size_t unsealed = 0;     // arrays that were being written, those of sets too
  std::size_t removed = 0;      // sets whose array is gone
  std::size_t quarantined = 0;  // damaged: see quarantine_name()
  std::size_t foreign =
      0;  // of other users or newer daemons, under the name of a segment; left where they are
  std::size_t unlinked = 0;  // of the arrays: had no file, but a kept descriptor
  // Sessions whose processes live and may come back for what they held. What processes held that are gone is
  // given back already.
  std::set<SessionId> awaited{};
};

// Takes over what has a file, and those sealed arrays that have none but are among the descriptors that
// `kept` hands back. Reads two pages of each array, and the slots of each set, whatever their sizes. Call it
// once, with the instance's lock held, before anybody is served. Tells in the log of what is moved aside.
// Errors: out_of_memory, os_failure, when a segment cannot be looked at; then nobody must be served: an older
// version might stand in for the one that is missing, and a name that looks free would be given away.
[[nodiscard]] Result<Recovery> recover(const ShmEnv& env, Store& store, ResultSets& results, FdStore& kept,
                                       const Moment& now);

}  // namespace cowmgr
