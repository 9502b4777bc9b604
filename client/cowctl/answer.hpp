// How a program answers its command line: help, version, what is wrong with it; and its standard output.
#pragma once

#include <string>
#include <string_view>

#include "proto/errors.hpp"

namespace CLI {  // NOLINT(readability-identifier-naming): the library's name
class App;
class ParseError;
}  // namespace CLI

namespace cowmgr::cli {

// The command line is answered without a run: help, version, or what is wrong with it.
struct Answer {
  int exit_code = 0;
  std::string text;  // exit_code 0: for standard output. Else one sentence or two, for standard error
};

// What parsing ended with; `complaint` is the text where that is wrong usage: exit code 2.
[[nodiscard]] Answer answer_of(const CLI::App& app, const CLI::ParseError& error, std::string complaint);

// Writes to standard output. Errors: os_failure; that its reader wants no more is none.
[[nodiscard]] Result<void> print(std::string_view text);

}  // namespace cowmgr::cli
