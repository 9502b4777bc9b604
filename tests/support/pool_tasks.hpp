// Tasks that a pool's workers know by name: of test_pool_worker, and of the tests that use it.
#pragma once

#include <cstdint>
#include <span>

#include "cowmgr/pool.hpp"

namespace cowmgr::test {

inline constexpr NamedTask<double(double, int)> kPower{"power"};
inline constexpr NamedTask<void(std::span<const std::int64_t>, std::span<std::int64_t>)> kTwice{"twice"};

}  // namespace cowmgr::test
