#include "client/cowctl/answer.hpp"

#include <cerrno>
#include <cstdio>
#include <sstream>

#include <CLI/CLI.hpp>

namespace cowmgr::cli {

Answer answer_of(const CLI::App& app, const CLI::ParseError& error, std::string complaint) {
  constexpr int kWrongUsage = 2;
  if (error.get_exit_code() != 0) return {kWrongUsage, std::move(complaint)};
  std::ostringstream out;
  app.exit(error, out, out);
  return {0, out.str()};
}

// Who closed the other end, as `head` does, has read what it wanted: that is no error.
Result<void> print(std::string_view text) {
  const bool is_written =
      std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (is_written || errno == EPIPE) return {};
  // A full disk is no want of room for arrays, whatever the number says.
  return fail(Errc::os_failure, os_error("write", "standard output", errno).message);
}

}  // namespace cowmgr::cli
