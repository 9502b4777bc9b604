// What a command line asks for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "client/cowctl/answer.hpp"
#include "client/cowctl/json.hpp"
#include "client/cowctl/terminal.hpp"
#include "cowmgr/client.hpp"

namespace cowmgr::cli {

// What a command answers. One of the first two goes to standard output: tables and values; sentences about
// them go to standard error.
struct Report {
  std::string text;  // for people: whole lines
  Json json;
  std::string note{};              // for people: whole lines
  std::optional<Error> refusal{};  // not all that was asked for: exit code 1
  bool is_bad_news = false;        // something was found that ought not to be: exit code 1
};

struct Options;
using Command = Result<Report> (*)(const Options& options);

// Every field that the chosen command does not take keeps its default.
struct Options {
  Command command = nullptr;  // what was chosen
  ConnectOptions daemon;      // how to reach it
  bool json = false;          // print JSON instead of tables
  Style style{};              // of standard output

  std::string name;                // an array's. put: empty unless --name is given
  bool has_name = false;           // stat, put: `name` is given, an empty one too
  std::string file;                // put: to read; get: to write; kStandardStream
  std::vector<std::string> names;  // of arrays, sets, or an instance
  bool match = false;              // they are patterns
  std::uint64_t lru_bytes = 0;     // evict: how much to free; 0 when names are given
  CreateOptions create;            // put
  bool pin = false;                // put: pin it too
  bool force = false;              // get: overwrite
  bool all_slots = false;          // results: those too of which nothing is to be said
  bool follow = false;             // results: until the set has ended
  bool cancel = false;             // results
  bool purge = false;              // shutdown
  bool repair = false;             // fsck
};

inline constexpr const char* kStandardStream = "-";  // for a file: standard input, or output

[[nodiscard]] std::variant<Options, Answer> parse_command_line(int argc, const char* const* argv);

// Whether the command line asks for JSON, as far as one can tell when it is wrong.
[[nodiscard]] bool asks_for_json(int argc, const char* const* argv) noexcept;

}  // namespace cowmgr::cli
