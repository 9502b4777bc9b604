// test_results_maker: makes a result set for a test, and does with it what it reads, a word a line: "lease"
// and "commit" (of the last slot), "fail", "end". Answers each with "done". Usage: test_results_maker NAME
// KIND, where KIND is "dense" (10 rows of int64 in 4 slots) or "ragged" (4 slots).
#include <iostream>
#include <string>

#include "cowmgr/cowmgr.hpp"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto client = cowmgr::Client::connect({.socket = {}, .command = "maker"});
  if (!client) return 1;
  const bool is_ragged = std::string(argv[2]) == "ragged";
  auto set = is_ragged ? client->create_ragged(argv[1], 4)
                       : client->create_results(argv[1], {cowmgr::Dtype::of<std::int64_t>(), {10}}, 4);
  if (!set) return 1;
  std::optional<cowmgr::Slot> slot;
  std::cout << "done" << std::endl;
  for (std::string word; std::cin >> word && word != "end";) {
    bool is_good = true;
    if (word == "lease") {
      auto leased = set->lease();
      is_good = leased && *leased;
      if (is_good) slot = std::move(**leased);
    } else if (word == "fail") {
      is_good = slot->fail("it is broken").has_value();
    } else {
      const std::string value = "seven b";
      if (is_ragged) is_good = slot->set_value(std::as_bytes(std::span(value))).has_value();
      is_good = is_good && slot->commit().has_value();
    }
    std::cout << (is_good ? "done" : "refused") << std::endl;
  }
  return 0;
}
