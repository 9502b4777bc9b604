// What one request may cost: said here for all of them, and checked before anything of a request is done.
//
// A frame has 128 KiB, but what it says may be far longer: FlatBuffers lets thousands of its entries refer to
// one long text, list or table, and its verifier counts tables alone. So entries that can share something are
// counted here as often as they are referred to.
//
// request                       | at most
// ------------------------------+-----------------------------------------------------------------------------
// Attach                        | kMaxFrameFds names and ids; all names together as long as a frame
// Evict, Pin                    | kMaxPatterns names or patterns, of kMaxPatternBytes each; kRequestSteps to
//                               | hold the patterns against all names (selection.hpp)
// ListArrays, ListResults       | one pattern of kMaxPatternBytes; a page ends after kSliceSteps
// MakeArray, MakeResults,       | a dtype of kMaxDtypeBytes; kMaxJobBytes of a job
//   AllocateSlot                |
// LeaseSlots                    | kMaxBatch slots: fewer are given to who asks for more
// CommitSlots, GiveBackSlots    | kMaxBatch slots; the values lie in the frame once
// FailSlot                      | kMaxReasonBytes of a message, the rest is left out
// Hold                          | all its entries together as long as a frame; what is kept of it until the
//                               | last one is among what there is, and the session's to claim
// `released`                    | as many ids as a frame holds, which cannot be shared
// all others                    | a few numbers, and names, of which each lies in the frame once
#pragma once

#include <cstddef>

#include "proto/errors.hpp"
#include "proto/frames.hpp"
#include "proto/glob.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxPatterns = 64;  // each may be held against every name, in the loop
inline constexpr std::size_t kMaxPatternBytes = kMaxGlobBytes;
// As long as the header that NumPy reads may be (numpy.lib.format, max_header_size).
inline constexpr std::size_t kMaxDtypeBytes = 10'000;

// Whether a request stays within its bounds. A client that shares nothing within its frames, and asks for no
// more than the table above says, never meets one. Errors: invalid_argument.
[[nodiscard]] Result<void> check_bounds(const wire::Request& request);

}  // namespace cowmgr
