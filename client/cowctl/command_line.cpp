// The command line's grammar, its help, and the table of subcommands. See options.hpp.

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <functional>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "client/cowctl/commands.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr::cli {
namespace {

constexpr Milliseconds kAnswer = std::chrono::minutes(1);
constexpr std::uint32_t kAllModeBits = 0777;

// CLI11 would read some arguments its own way: "[a,b]" as a list, so that the glob [ab] lost its brackets,
// and what follows "--" as options again, after an optional argument. This byte in front hides them; plain()
// takes it away. No name has it, and where a user typed it, it is hidden too.
constexpr char kGuard = '\x01';

struct Duration {
  std::string_view unit;
  double ms;
};

constexpr std::array<Duration, 5> kDurations = {
    {{"", 1e3}, {"s", 1e3}, {"ms", 1}, {"min", 60e3}, {"h", 3600e3}}};

std::string guarded(std::string_view argument) {
  return kGuard + std::string(argument);
}

std::string plain(std::string argument) {
  if (argument.starts_with(kGuard)) argument.erase(0, 1);
  return argument;
}

bool needs_guard(std::string_view argument) {
  return (argument.starts_with('[') && argument.ends_with(']')) || argument.starts_with(kGuard);
}

// As CLI11 takes them: without the program's name, last one first.
std::vector<std::string> reversed_arguments(int argc, const char* const* argv) {
  std::vector<std::string> arguments;
  bool is_rest_plain = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--" && !is_rest_plain)
      is_rest_plain = true;
    else
      arguments.push_back(is_rest_plain || needs_guard(argument) ? guarded(argument) : std::string(argument));
  }
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

// A value that is text, to be taken as it is.
template <class Target>
CLI::Option* add_text(CLI::App& app, const std::string& name, Target& target, const std::string& help) {
  return app.add_option(name, target, help)->transform(&plain);
}

std::uint64_t size_of(const std::string& text) {
  const auto size = parse_size(text);
  if (!size) throw CLI::ValidationError("--lru", size.error().message);
  if (*size == 0) throw CLI::ValidationError("--lru", "the size must be over 0");
  return *size;
}

// "500ms", "1.5s", "10", "2min", "1h".
Milliseconds duration_of(const std::string& option, const std::string& text) {
  double count = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, count, std::chars_format::fixed);
  const std::string_view unit(stop, static_cast<std::size_t>(end - stop));
  const auto* known = std::ranges::find(kDurations, unit, &Duration::unit);
  const double ms = known == kDurations.end() ? -1 : count * known->ms;
  constexpr double kMostMs = 1e12;  // 31 years
  if (error != std::errc() || ms < 0 || ms > kMostMs) {
    throw CLI::ValidationError(
        option, fmt::format("{} is not a duration; write it as 500ms, 10s, 2min or 1h", printable(text)));
  }
  return Milliseconds(std::llround(ms));
}

std::uint32_t mode_of(const std::string& text) {
  std::uint32_t mode = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, mode, 8);
  if (error != std::errc() || stop != end || mode > kAllModeBits) {
    throw CLI::ValidationError(
        "--mode",
        fmt::format("{} is not a mode; write octal digits up to 0777, as in chmod", printable(text)));
  }
  return mode;
}

void declare_nothing(CLI::App& /*app*/, Options& /*options*/) {}

CLI::Option* add_match(CLI::App& app, Options& options) {
  return app.add_flag(
      "--match", options.match,
      "Take NAME for a pattern: * is any text, ? one character, \\ takes their meaning away; quote it");
}

void declare_one_name(CLI::App& app, Options& options) {
  auto* name = add_text(app, "NAME", options.names, "This array alone; without it, all")->expected(0, 1);
  add_match(app, options)->needs(name);
}

void declare_stat(CLI::App& app, Options& options) {
  auto* name = add_text(app, "NAME", options.name, "The array; without it, the daemon");
  app.callback([&options, name] { options.has_name = name->count() > 0; });
}

void declare_put(CLI::App& app, Options& options) {
  add_text(app, "FILE", options.file, "The .npy file to read; - for standard input")->required();
  auto* name =
      add_text(app, "--name", options.name,
               "The array's name. Default: the file's, without .npy; of standard input there is none");
  app.add_flag("--replace", options.create.replace, "Put a new version when the name exists");
  app.add_flag("--evictable", options.create.evictable,
               "Let it go, least recently used first, when room is needed");
  app.add_option_function<std::string>(
         "--mode", [&options](const std::string& text) { options.create.mode = mode_of(text); },
         "Who may read it (attach) and write it (replace, evict, pin), in octal. Default: 0600")
      ->transform(&plain)
      ->type_name("MODE");
  app.add_flag("--pin", options.pin, "Pin it: never evict it");
  app.add_flag("--checksum", options.create.checksum, "Take a checksum of the data, for `cowctl verify`");
  app.callback([&options, name] {
    options.has_name = name->count() > 0;
    if (options.file == kStandardStream && !options.has_name)
      throw CLI::RequiredError("--name for what comes from standard input");
  });
}

void declare_get(CLI::App& app, Options& options) {
  add_text(app, "NAME", options.name, "The array")->required();
  add_text(app, "FILE", options.file, "The .npy file to write; - for standard output")->required();
  app.add_flag("--force", options.force, "Overwrite the file if it exists; its mode stays");
}

void declare_results(CLI::App& app, Options& options) {
  auto* name = add_text(app, "NAME", options.names, "One set, shown with its slots; without it, all sets")
                   ->expected(0, 1);
  auto* match = add_match(app, options)->needs(name);
  auto* slots = app.add_flag("--slots", options.all_slots,
                             "Show every slot of NAME; otherwise those that are leased or failed");
  auto* follow = app.add_flag("--follow", options.follow, "Wait until NAME has ended, with a progress bar");
  auto* cancel =
      app.add_flag("--cancel", options.cancel,
                   "End NAME: its workers are told, its memory is freed. One that has ended is forgotten");
  for (auto* option : {slots, follow, cancel}) option->needs(name)->excludes(match);
  follow->excludes(slots);
  cancel->excludes(slots)->excludes(follow);
}

void declare_shutdown(CLI::App& app, Options& options) {
  app.add_flag("--purge", options.purge,
               "Take its arrays away too; otherwise the next daemon serves them again");
}

void declare_fsck(CLI::App& app, Options& options) {
  add_text(app, "INSTANCE", options.names, "Of this instance alone; otherwise of all")->expected(0, 1);
  app.add_flag("--repair", options.repair,
               "Remove what nobody can use: half made, or damaged. Not while a daemon of the instance runs");
}

void declare_names(CLI::App& app, Options& options) {
  add_text(app, "NAME", options.names, "The arrays")->required();
  add_match(app, options);
}

void declare_evict(CLI::App& app, Options& options) {
  auto* names = add_text(app, "NAME", options.names, "The arrays");
  add_match(app, options)->needs(names);
  auto* lru = app.add_option_function<std::string>(
      "--lru", [&options](const std::string& text) { options.lru_bytes = size_of(text); },
      "Evict what was least recently used, evictable or not, until that much more is free, as in 1.5GiB");
  lru->transform(&plain)->type_name("SIZE")->excludes(names);
  app.callback([names, lru] {
    if (names->count() + lru->count() == 0) throw CLI::RequiredError("NAME or --lru SIZE");
  });
}

struct Subcommand {
  const char* name;
  const char* help;
  const char* example;
  void (*declare)(CLI::App& app, Options& options);
  Command run;
};

constexpr std::array<Subcommand, 13> kSubcommands = {{
    {"ls", "List arrays", "cowctl ls   or   cowctl ls --match 'train*'", declare_one_name, run_ls},
    {"stat", "Show all about an array, or about the daemon", "cowctl stat train", declare_stat, run_stat},
    {"put", "Put a .npy file as an array", "cowctl put train.npy --name train --pin", declare_put, run_put},
    {"get", "Write an array to a .npy file", "cowctl get train copy.npy", declare_get, run_get},
    {"verify", "Read arrays that have a checksum, and compare", "cowctl verify --match 'train*'",
     declare_one_name, run_verify},
    {"evict", "Take names away now, their memory with the last view",
     "cowctl evict old   or   cowctl evict --match 'old-*'   or   cowctl evict --lru 1.5GiB", declare_evict,
     run_evict},
    {"pin", "Never evict these arrays", "cowctl pin train test", declare_names, run_pin},
    {"unpin", "Undo pin", "cowctl unpin --match 't*'", declare_names, run_unpin},
    {"clients", "List who is connected, and what they hold", "cowctl clients", declare_nothing, run_clients},
    {"results", "List result sets, or show, follow or cancel one", "cowctl results predictions --follow",
     declare_results, run_results},
    {"ping", "Measure the round trip to the daemon", "cowctl ping", declare_nothing, run_ping},
    {"shutdown", "Stop the daemon", "cowctl shutdown", declare_shutdown, run_shutdown},
    {"fsck", "List what there is in shared memory, without a daemon", "cowctl fsck default --repair",
     declare_fsck, run_fsck},
}};

std::string examples() {
  std::string out = "Examples:\n";
  for (const auto& subcommand : kSubcommands) out += fmt::format("  {}\n", subcommand.example);
  return out + "\nExit codes: 0 done, 1 refused, 2 wrong usage, 3 no daemon.";
}

void add_duration(CLI::App& app, const std::string& name, const std::function<void(Milliseconds)>& set,
                  const std::string& help) {
  app.add_option_function<std::string>(
         name, [name, set](const std::string& text) { set(duration_of(name, text)); }, help)
      ->transform(&plain)
      ->type_name("DURATION");
}

void declare_globals(CLI::App& app, Options& options) {
  app.set_version_flag("--version", fmt::format("cowctl {}", kVersion));
  add_text(app, "--socket", options.daemon.socket,
           "The daemon's socket. Default: $XDG_RUNTIME_DIR/cowmgr/cowmgr.sock if it is there, else "
           "/run/cowmgr/cowmgr.sock")
      ->envname("COWMGR_SOCKET")
      ->type_name("PATH");
  add_duration(
      app, "--wait", [&options](Milliseconds time) { options.daemon.wait = options.daemon.reconnect = time; },
      "How long to wait for a daemon that is not there, as in 10s. Default: not at all, or 30s for the "
      "next one when it goes away under way");
  add_duration(
      app, "--timeout", [&options](Milliseconds time) { options.daemon.answer = time; },
      "How long a daemon that is there may take to answer, as in 5s. Default: 20s to greet and 1min for "
      "what follows; put and evict, whose work depends on the size, as long as it takes");
  add_text(app, "--daemon-user", options.daemon.daemon_user,
           "Trust a daemon of this user, too. Default: one of your own, root's, or the owner's of a "
           "directory that "
           "only root can have made")
      ->envname("COWMGR_DAEMON_USER")
      ->type_name("USER");
  app.add_flag("--json", options.json, "Print JSON, sizes in bytes; errors too, on standard error");
  app.require_subcommand(1);
  app.fallthrough();  // of the subcommands that are made from here on: global options may follow them
}

// As the help of every command shows them too.
std::string globals_help(const CLI::App& app) {
  const auto formatter = std::dynamic_pointer_cast<CLI::Formatter>(app.get_formatter());
  COWMGR_ASSERT(formatter != nullptr);
  const auto is_global = [](const CLI::Option* option) {
    return option->get_name() != "--help" && option->get_name() != "--version";
  };
  return formatter->make_group("Options of all commands", false, app.get_options(is_global));
}

void declare_subcommands(CLI::App& app, Options& options) {
  const std::string globals = globals_help(app);
  for (const auto& subcommand : kSubcommands) {
    auto* child = app.add_subcommand(subcommand.name, subcommand.help);
    child->footer(fmt::format("{}\nExample:\n  {}", globals, subcommand.example));
    subcommand.declare(*child, options);
  }
  app.footer(examples());
}

void choose_command(Options& options, const CLI::App& app) {
  const std::string& name = app.get_subcommands().front()->get_name();
  const auto* chosen = std::find_if(kSubcommands.begin(), kSubcommands.end(),
                                    [&](const auto& subcommand) { return subcommand.name == name; });
  COWMGR_ASSERT(chosen != kSubcommands.end());
  options.command = chosen->run;
  options.daemon.command = "cowctl " + name;
  const bool takes_long = chosen->run == &run_put || chosen->run == &run_evict;
  if (app.count("--timeout") == 0) options.daemon.answer = takes_long ? kForever : kAnswer;
}

std::string wrong_usage_text(const CLI::App& app, const CLI::ParseError& error) {
  std::string text = error.what();
  const auto unknown = app.remaining();
  if (app.get_subcommands().empty() && !unknown.empty()) {
    text = fmt::format("there is no command {}", printable(plain(unknown.front())));
  }
  std::erase(text, kGuard);
  const auto chosen = app.get_subcommands();
  return text + (chosen.empty() ? "; see `cowctl --help`"
                                : fmt::format("; see `cowctl {} --help`", chosen.front()->get_name()));
}

}  // namespace

std::variant<Options, Answer> parse_command_line(int argc, const char* const* argv) {
  Options options;
  CLI::App app("Look after the arrays that a cowmgr daemon holds.", "cowctl");
  declare_globals(app, options);
  declare_subcommands(app, options);
  try {
    app.parse(reversed_arguments(argc, argv));
  } catch (const CLI::ParseError& error) {
    return answer_of(app, error, wrong_usage_text(app, error));
  }
  choose_command(options, app);
  options.style = Style::of(stdout);
  return options;
}

bool asks_for_json(int argc, const char* const* argv) noexcept {
  const auto is = [](std::string_view text) {
    return [text](const char* argument) { return argument == text; };
  };
  const auto* end = std::find_if(argv, argv + argc, is("--"));
  return std::find_if(argv, end, is("--json")) != end;
}

}  // namespace cowmgr::cli
