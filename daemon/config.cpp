#include "daemon/config.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

constexpr const char* kDescription =
    "Holds large arrays in shared memory and hands them to any number of processes, without copies.\n"
    "Runs in the foreground until SIGTERM, SIGINT or SIGHUP. Its arrays stay in memory, and the next daemon "
    "of the\n"
    "same instance serves them again, as it does after a crash.";

constexpr const char* kFooter =
    "Precedence: flag, environment, configuration file, default. The file holds lines such as\n"
    "  capacity=\"4GiB\"\n"
    "Clients find the daemon by COWMGR_SOCKET, else at $XDG_RUNTIME_DIR/cowmgr/cowmgr.sock, else at\n"
    "/run/cowmgr/cowmgr.sock. `cowctl ls` lists what the daemon holds.";

// Where clients look first: the user's own runtime directory, or the system's.
std::string default_socket() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  const bool is_user = ::geteuid() != 0 && runtime != nullptr && *runtime != '\0';
  return std::string(is_user ? runtime : "/run") + "/cowmgr/cowmgr.sock";
}

// A CLI11 check that also translates "1.5GiB" into bytes.
CLI::Validator size_text() {
  return {[](std::string& text) -> std::string {
            const auto size = parse_size(text);
            if (!size) return size.error().message;
            text = std::to_string(*size);
            return {};
          },
          "SIZE"};
}

CLI::Validator instance_text() {
  return {[](std::string& text) -> std::string {
            const auto ok = check_instance(text);
            return ok ? std::string() : ok.error().message;
          },
          "NAME"};
}

CLI::Validator mode_text() {
  return {[](std::string& text) -> std::string {
            if (text.empty() || text.size() > 4 || text.find_first_not_of("01234567") != std::string::npos) {
              return "use an octal mode such as 0660";
            }
            text = std::to_string(std::stoi(text, nullptr, 8));
            return {};
          },
          "MODE"};
}

void add_options(CLI::App& app, Config& config, std::string& protection, unsigned& grace_seconds) {
  app.add_option("--socket", config.socket, "Path of the socket to serve at")
      ->envname("COWMGR_SOCKET")
      ->type_name("PATH")
      ->capture_default_str();
  app.add_option("--instance", config.instance, "Name of this daemon's segments in /dev/shm; one daemon each")
      ->envname("COWMGR_INSTANCE")
      ->transform(instance_text())
      ->capture_default_str();
  app.add_option("--capacity", config.capacity_bytes,
                 "Memory for all arrays together, as 4GiB; 0: the default [80 % of /dev/shm, or of what the "
                 "process's control groups may use]")
      ->envname("COWMGR_CAPACITY")
      ->transform(size_text());
  app.add_option("--log-level", config.log_level,
                 "What is logged to standard error, at most 20 lines a second of what one user does")
      ->envname("COWMGR_LOG_LEVEL")
      ->check(CLI::IsMember({"trace", "debug", "info", "warning", "error", "off"}))
      ->capture_default_str();
  app.add_option("--protection", protection,
                 "`verified` refuses to start where the kernel cannot prove that a seal holds")
      ->check(CLI::IsMember({"auto", "verified"}))
      ->capture_default_str();
  app.add_option("--socket-mode", config.socket_mode,
                 "Who may connect; arrays have modes of their own [0666]")
      ->transform(mode_text());
  app.add_option("--owner-bytes", config.quota.owner_bytes, "Memory that one user may hold [no limit]")
      ->transform(size_text());
  app.add_option("--owner-arrays", config.quota.owner_arrays,
                 "Arrays that one user may hold [65536, or fewer: two ninths of the limit of open files]");
  app.add_option("--owner-sessions", config.quota.owner_sessions,
                 "Connections that one user may have [4096, or fewer: a twelfth of the limit of open files]");
  app.add_option("--grace", grace_seconds,
                 "Seconds that clients of an earlier daemon have to come back to what they were writing")
      ->check(CLI::Range(0U, 3600U))
      ->capture_default_str();
  app.add_flag("--purge", config.purge,
               "Take all arrays away at the end, and what an earlier daemon left at the start");
  app.add_flag(
      "--fd-store", config.fd_store,
      "Under systemd: have it keep a descriptor of each array, so that a restart does not lose even those "
      "whose files somebody removed; the unit needs FileDescriptorStoreMax=");
  app.add_option("--cgroup-root", config.cgroup_root)->group("");  // for tests
  app.add_option("--parent-fd", config.parent_fd)
      ->group("");  // for whoever starts a daemon of its own: it ends with its parent
}

// What the environment says, as flags before the command line's own, of which the last counts. CLI11 itself
// would let the configuration file go before the environment.
std::vector<std::string> with_environment(CLI::App& app, int argc, char** argv) {
  std::vector<std::string> arguments;
  for (auto* option : app.get_options()) {
    option->take_last();
    const char* value = option->get_envname().empty() ? nullptr : std::getenv(option->get_envname().c_str());
    if (value != nullptr && *value != '\0')
      arguments.push_back(fmt::format("{}={}", option->get_name(), value));
  }
  arguments.insert(arguments.end(), argv + 1, argv + argc);
  std::reverse(arguments.begin(), arguments.end());  // as App::parse() takes them
  return arguments;
}

// What is wrong with one line of a configuration file, or nothing.
std::optional<std::string> complaint_about(const std::string& line) {
  Config config;
  std::string protection;
  unsigned grace_seconds = 0;
  CLI::App app;
  app.allow_config_extras(CLI::config_extras_mode::error);
  add_options(app, config, protection, grace_seconds);
  std::istringstream in(line);
  try {
    app.parse_from_stream(in);
  } catch (const CLI::Error& error) {
    return error.what();
  }
  return std::nullopt;
}

// "FILE:LINE: what is wrong" of the first bad line of the file that was given, if there is one: CLI11 does
// not say where it found what it refuses.
std::optional<std::string> bad_line(const CLI::Option& option) {
  if (option.count() == 0) return std::nullopt;
  const std::string& file = option.results().back();
  std::ifstream in(file);
  std::string line;
  for (int number = 1; std::getline(in, line); ++number) {
    if (const auto complaint = complaint_about(line))
      return fmt::format("{}:{}: {}", file, number, *complaint);
  }
  return std::nullopt;
}

// Says what is wrong. Returns the exit status.
int refuse(const CLI::App& app, const CLI::ParseError& error) {
  const bool is_asked = error.get_exit_code() == 0;  // --help, --version
  const auto line = is_asked ? std::nullopt : bad_line(*app.get_config_ptr());
  if (line)
    std::cerr << *line << "\nRun with --help for more information.\n";
  else
    app.exit(error);
  return is_asked ? 0 : 2;
}

}  // namespace

std::optional<int> parse_config(int argc, char** argv, Config& config) {
  CLI::App app(kDescription, "cowmgr");
  std::string protection = "auto";
  config.socket = default_socket();
  app.set_version_flag("--version", fmt::format("cowmgr {}", kVersion));
  app.set_config("--config", "", "Read options from FILE; a bad line is told as FILE:LINE")
      ->type_name("FILE");
  app.allow_config_extras(CLI::config_extras_mode::error);
  app.footer(kFooter);
  auto grace_seconds = static_cast<unsigned>(config.grace.count());
  add_options(app, config, protection, grace_seconds);
  try {
    app.parse(with_environment(app, argc, argv));
  } catch (const CLI::ParseError& error) {
    return refuse(app, error);
  }
  config.grace = std::chrono::seconds(grace_seconds);
  config.needs_verified = protection == "verified";
  config.purge = config.purge || config.parent_fd >= 0;  // nobody else knows the instance
  return std::nullopt;
}

}  // namespace cowmgr
