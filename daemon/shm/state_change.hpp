// The instants that count when the daemon is killed.
#pragma once

namespace cowmgr {

// To be called where a change has just taken effect of what outlives the daemon: after a system call on a
// segment, after the store of a slot's word. Does nothing: the fault tests link a daemon that has another one
// of these, and ends itself at the k-th call (tests/support/dying.cpp).
void note_state_change() noexcept;

}  // namespace cowmgr
