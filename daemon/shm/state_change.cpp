#include "daemon/shm/state_change.hpp"

namespace cowmgr {

void note_state_change() noexcept {}

}  // namespace cowmgr
