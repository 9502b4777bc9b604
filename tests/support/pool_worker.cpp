// test_pool_worker: a program whose processes are a pool's workers.
#include <algorithm>
#include <cmath>

#include "tests/support/pool_tasks.hpp"

int main() {
  using cowmgr::test::kPower;
  using cowmgr::test::kTwice;
  return cowmgr::serve_pool({kPower.is([](double base, int exponent) { return std::pow(base, exponent); }),
                             kTwice.is([](std::span<const std::int64_t> in, std::span<std::int64_t> out) {
                               std::transform(in.begin(), in.end(), out.begin(),
                                              [](std::int64_t item) { return 2 * item; });
                             })});
}
