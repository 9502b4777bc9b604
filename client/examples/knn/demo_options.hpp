// What a command line of knn-demo asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>

#include "client/cowctl/answer.hpp"

namespace cowmgr::knn {

// What is done, and by how many.
struct DemoTask {
  std::size_t workers = 0;    // at least 1
  std::size_t k = 5;          // at least 1
  std::uint64_t slots = 0;    // 0: slots_for() chooses
  std::size_t test_rows = 0;  // the first so many; 0: all
};

struct DemoOptions {
  DemoTask task;
  std::string data = "/usr/share/datasets/fashion-mnist";
  std::string json_file;         // empty: none
  std::string predictions_file;  // empty: none
  std::string socket;            // of the daemon to use; empty: start one
  bool keep = false;             // leave the daemon running that was started
};

[[nodiscard]] std::variant<DemoOptions, cli::Answer> parse_demo_options(int argc, const char* const* argv);

// A number of slots that keeps all workers busy to the end, and each slot large enough for fast products.
[[nodiscard]] std::uint64_t slots_for(std::size_t workers, std::size_t test_rows);

}  // namespace cowmgr::knn
