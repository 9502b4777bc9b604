// What each request of the schema is, for both sides: whether it has a reply, and what a client does with it
// when its daemon dies before that comes.
#pragma once

#include "proto/cowmgr_generated.h"

namespace cowmgr {

struct RequestRule {
  bool has_reply = true;
  // Whether it is sent to the next daemon too, marked as `again`: that one does not do twice what the last
  // has done. What ends something is not: it is left out of what the next daemon is told that the client has
  // (Hold).
  bool is_sent_again = true;
};

[[nodiscard]] constexpr RequestRule rule_of(wire::RequestBody request) noexcept {
  switch (request) {
    case wire::RequestBody::AbortArray:
    case wire::RequestBody::GiveBackSlots:
    case wire::RequestBody::Shutdown:
      return {.is_sent_again = false};
    case wire::RequestBody::Release:
    case wire::RequestBody::Unmapped:
      return {.has_reply = false, .is_sent_again = false};
    default:
      return {};
  }
}

}  // namespace cowmgr
