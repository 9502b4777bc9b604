// Everything of the client library, but for the pool: cowmgr/pool.hpp, of the component cowmgr::pool.
#pragma once

#include "cowmgr/array.hpp"      // IWYU pragma: export
#include "cowmgr/client.hpp"     // IWYU pragma: export
#include "cowmgr/embedded.hpp"   // IWYU pragma: export
#include "cowmgr/exception.hpp"  // IWYU pragma: export
#include "cowmgr/info.hpp"       // IWYU pragma: export
#include "cowmgr/results.hpp"    // IWYU pragma: export
