// Starts a private daemon and a pool, and lets a worker multiply.
#include <cowmgr/cowmgr.hpp>
#include <cowmgr/pool.hpp>
#include <iostream>

int main() {
  try {
    const auto daemon = cowmgr::or_throw(cowmgr::EmbeddedDaemon::start());
    const auto client = cowmgr::or_throw(daemon.connect());
    const auto pool = cowmgr::or_throw(cowmgr::Pool::start(client));
    std::cout << cowmgr::or_throw(pool.apply([](int a, int b) { return a * b; }, 6, 7)) << '\n';
    return 0;
  } catch (const cowmgr::Exception& refused) {
    std::cerr << refused.what() << '\n';
    return 1;
  }
}
