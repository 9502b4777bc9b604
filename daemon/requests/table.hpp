// The table of requests: which there are, what each may cost, what becomes of one that is sent once more.
//
// A frame has 128 KiB, but what it says may be far longer: FlatBuffers lets thousands of its entries refer to
// one long text, list or table, and its verifier counts tables alone. So entries that can share something are
// counted as often as they are referred to, before anything of a request is done.
//
// request       | costs at most                           | once more, after a daemon that may have done it
// --------------+-----------------------------------------+--------------------------------------------------
// MakeArray     | a dtype of kMaxDtypeBytes               | makes another: nobody was told of the first
// SealArray     | a trailer and a lease                   | not_holder: the client looks whether it is sealed
// AbortArray    | one array                               | is not sent: Hold does not name the array
// Attach        | kMaxFrameFds names and ids, the names   | what Hold did not name is not viewed any more
//               | together as long as a frame             |
// Release       | nothing                                 | is not sent; has no reply
// Evict, Pin    | kMaxPatterns names or patterns, of      | what is gone is done; evict --lru is refused
//               | kMaxPatternBytes each; kRequestSteps to |
//               | hold these against all names            |
// StatArray     | a look at each session, and at the file | the same
// ListArrays,   | a pattern of kMaxPatternBytes; a page   | the same
//   ListResults | ends after kSliceSteps                  |
// ListClients   | a page                                  | the same
// MakeResults   | a dtype of kMaxDtypeBytes, a job of     | is found by its token
//               | kMaxJobBytes                            |
// OpenResults   | one set                                 | the same
// LeaseSlots    | kMaxBatch slots: fewer than are asked   | what Hold did not name is free again
//               | for, if need be                         |
// AllocateSlot  | a dtype of kMaxDtypeBytes               | makes another in its place
// CommitSlots   | kMaxBatch slots; values as in the frame | a slot of that attempt is found committed
// FailSlot      | kMaxReasonBytes of a message, which is  | is found done
//               | cut                                     |
// GiveBackSlots | kMaxBatch slots                         | is not sent: Hold does not name them
// Unmapped      | one set                                 | is not sent; has no reply
// WaitResults   | a look at one set, and a wait           | the same, without its wait
// CancelResults | what the set holds                      | not_found: it is done
// Ping          | some totals                             | the same
// Hold          | its entries together as long as a       | the same
//               | frame; of them only what there is to    |
//               | claim is kept                           |
// Shutdown      | nothing                                 | is not sent
// `released`    | the ids that a frame holds              | Hold does not name them
#pragma once

#include "daemon/requests/call.hpp"

namespace cowmgr {

// Whether a request stays within its bounds. A client that shares nothing within its frames, and asks for no
// more than the table above says, never meets one. Errors: invalid_argument.
[[nodiscard]] Result<void> check_bounds(const wire::Request& request);

// Carries out `request`, which has been verified. The frame that it lies in must outlive the coroutine.
[[nodiscard]] Answer answer(Call& call, const wire::Request& request);

}  // namespace cowmgr
