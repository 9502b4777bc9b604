// Starts a private daemon, puts an array and reads it back.
#include <array>
#include <cowmgr/cowmgr.hpp>
#include <iostream>

int main() {
  const auto daemon = cowmgr::EmbeddedDaemon::start();
  if (!daemon) {
    std::cerr << daemon.error().message << '\n';
    return 1;
  }
  const auto client = daemon->connect();
  const std::array<double, 3> values = {1, 2, 3};
  const auto put = client->put<double>("values", values, {3});
  const auto array = client->attach("values");
  if (!put || !array) return 1;
  std::cout << (*array->as<double>())[2] << '\n';
  return 0;
}
