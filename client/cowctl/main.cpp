// cowctl: the administrator's view of a cowmgr daemon. Exit codes: 0 done, 1 refused, 2 wrong usage, 3 no
// daemon.

#include <csignal>
#include <cstdio>
#include <exception>
#include <string>

#include <fmt/format.h>

#include "client/cowctl/commands.hpp"
#include "client/cowctl/json.hpp"
#include "proto/errors.hpp"
#include "proto/standard_streams.hpp"

namespace cowmgr::cli {
namespace {

constexpr int kDone = 0;
constexpr int kRefused = 1;
constexpr int kNoDaemon = 3;

// What to do about an error whose message leaves that open. By convention a message says it after a
// semicolon.
std::string_view advice_for(const Error& error) {
  if (error.message.find(';') != std::string::npos) return {};
  switch (error.code) {
    case Errc::invalid_file:
      return "write it with numpy.save";
    case Errc::invalid_shape:
      return "use fewer or shorter axes";
    case Errc::not_found:
      return "check the spelling";
    case Errc::permission_denied:
      return "ask its owner, or work as that user";
    case Errc::out_of_memory:
    case Errc::quota_exceeded:
      return "make room with `cowctl evict`";
    case Errc::busy:
    case Errc::still_writable:
      return "try again when that is over";
    case Errc::disconnected:
    case Errc::shutting_down:
      return "try again when the daemon is back; its log says why it went";
    case Errc::no_daemon:
      return "start one with `cowmgr`, or name its socket with --socket";
    case Errc::protocol_mismatch:
    case Errc::protocol_error:
      return "use the cowctl of the daemon's version";
    default:
      return {};
  }
}

Error with_advice(Error error) {
  const auto advice = advice_for(error);
  if (!advice.empty()) error.message += fmt::format("; {}", advice);
  return error;
}

void print_error(const Error& error, bool as_json) {
  const std::string text = as_json ? dump_line(to_json(error)) : "cowctl: " + visible(error.message) + '\n';
  static_cast<void>(std::fwrite(text.data(), 1, text.size(), stderr));
}

int refuse(const Error& error, bool as_json) {
  print_error(with_advice(error), as_json);
  return error.code == Errc::no_daemon ? kNoDaemon : kRefused;
}

int give(const Answer& answer, bool as_json) {
  if (answer.exit_code == kDone) {
    const auto printed = print(answer.text);
    return printed ? kDone : refuse(printed.error(), as_json);
  }
  print_error({Errc::invalid_argument, answer.text}, as_json);
  return answer.exit_code;
}

std::string text_of(const Report& report, bool as_json) {
  if (!as_json) return report.text;
  return report.json.is_null() ? "" : dump(report.json);
}

int run(int argc, const char* const* argv) {
  const bool as_json = asks_for_json(argc, argv);
  const auto parsed = parse_command_line(argc, argv);
  if (const auto* answer = std::get_if<Answer>(&parsed)) return give(*answer, as_json);
  const auto& options = std::get<Options>(parsed);
  const auto report = options.command(options);
  if (!report) return refuse(report.error(), options.json);
  const auto printed = print(text_of(*report, options.json));
  if (!printed) return refuse(printed.error(), options.json);
  if (!options.json) static_cast<void>(std::fputs(report->note.c_str(), stderr));
  if (report->refusal) return refuse(*report->refusal, options.json);
  return report->is_bad_news ? kRefused : kDone;
}

// Both signals would kill; the calls then fail with EPIPE and EFBIG, which have their messages.
void ignore_signals_that_calls_report() {
  static_cast<void>(std::signal(SIGPIPE, SIG_IGN));
  static_cast<void>(std::signal(SIGXFSZ, SIG_IGN));
}

}  // namespace
}  // namespace cowmgr::cli

int main(int argc, char** argv) {
  cowmgr::occupy_standard_streams();
  cowmgr::cli::ignore_signals_that_calls_report();
  try {
    return cowmgr::cli::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cowctl: internal error: %s\n", error.what());
    return cowmgr::cli::kRefused;
  }
}
