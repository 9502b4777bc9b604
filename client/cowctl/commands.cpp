#include "client/cowctl/commands.hpp"

#include <algorithm>
#include <array>
#include <chrono>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "client/cowctl/tables.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

constexpr std::size_t kPings = 9;  // odd, so that the median is one of them

std::string quoted(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& name : names) out += (out.empty() ? "" : ", ") + printable(name);
  return out;
}

std::string evict_text(const EvictReport& report) {
  if (report.names.empty())
    return "nothing evicted: every array is pinned, viewed, being written, or of another user\n";
  if (report.freed_bytes == 0)
    return fmt::format("evicted {}; the memory goes with the last view\n", quoted(report.names));
  return fmt::format("evicted {}; {} freed at once\n", quoted(report.names), format_size(report.freed_bytes));
}

// What no array of a list shows, and takes room all the same.
std::string outside_text(const DaemonInfo& daemon) {
  if (daemon.memory.outside_bytes == 0) return {};
  return fmt::format("and {} of arrays and sets that are gone: processes have it mapped without a view\n",
                     format_size(daemon.memory.outside_bytes));
}

Result<Report> set_pinned(const Options& options, bool is_pinned) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  const auto names = client->pin(options.patterns, is_pinned);
  if (!names) return error_of(names);
  Json json;
  json["names"] = *names;
  json["pinned"] = is_pinned;
  return Report{fmt::format("{} {}\n", is_pinned ? "pinned" : "unpinned", quoted(*names)), json};
}

}  // namespace

SystemTime now() {
  return std::chrono::floor<std::chrono::microseconds>(std::chrono::system_clock::now());
}

std::string nothing_text(const Options& options, std::string_view what, std::string_view how_to_get_one) {
  const auto& pattern = options.patterns;
  if (pattern.empty()) return fmt::format("no {}; {}\n", what, how_to_get_one);
  return fmt::format("no {} with a name like {}; leave the pattern out to see all\n", what,
                     printable(pattern.front()));
}

std::string_view pattern_of(const Options& options) {
  return options.patterns.empty() ? std::string_view("*") : options.patterns.front();
}

Result<Client> connect(const Options& options) {
  return Client::connect(
      {.socket = options.socket, .command = options.command_name, .reconnect = Milliseconds(0)});
}

std::string literal_pattern(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (std::string_view("*?[\\").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

Result<Report> run_ls(const Options& options) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  const auto arrays = client->list(pattern_of(options));
  if (!arrays) return error_of(arrays);
  const auto daemon = client->ping();
  if (!daemon) return error_of(daemon);
  const std::string text = arrays->empty()
                               ? nothing_text(options, "arrays", "put one with `cowctl put FILE.npy`")
                               : arrays_table(*arrays, now(), options.style);
  return Report{text + outside_text(*daemon), to_json(*arrays)};
}

Result<Report> run_stat(const Options& options) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  if (!options.has_name) {
    const auto daemon = client->ping();
    if (!daemon) return error_of(daemon);
    return Report{daemon_page(*daemon, now(), options.style), to_json(*daemon)};
  }
  const auto details = client->stat(options.name);
  if (!details) return error_of(details);
  return Report{array_page(*details, now(), options.style), to_json(*details)};
}

Result<Report> run_evict(const Options& options) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  const auto report =
      options.lru_bytes > 0 ? client->evict_lru(options.lru_bytes) : client->evict(options.patterns);
  if (!report) return error_of(report);
  return Report{evict_text(*report), to_json(*report)};
}

Result<Report> run_pin(const Options& options) {
  return set_pinned(options, true);
}

Result<Report> run_unpin(const Options& options) {
  return set_pinned(options, false);
}

Result<Report> run_clients(const Options& options) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  const auto clients = client->clients();
  if (!clients) return error_of(clients);
  return Report{clients_table(*clients, now(), options.style), to_json(*clients)};
}

Result<Report> run_ping(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const auto client = connect(options);
  if (!client) return error_of(client);
  DaemonInfo daemon;
  std::array<double, kPings> micros{};
  for (auto& time : micros) {
    const auto start = Clock::now();
    auto pong = client->ping();
    time = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
    if (!pong) return error_of(std::move(pong));
    daemon = *std::move(pong);
  }
  std::sort(micros.begin(), micros.end());
  const double median = micros[kPings / 2];
  Json json;
  json["round_trip_us"] = median;
  json["version"] = daemon.version;
  json["instance"] = daemon.instance;
  json["socket"] = daemon.socket;
  json["pid"] = daemon.pid;
  json["outside_bytes"] = daemon.memory.outside_bytes;
  return Report{fmt::format("{:.0f} us to cowmgr {}, instance {}, pid {}, at {}\n", median, daemon.version,
                            daemon.instance, daemon.pid, visible(daemon.socket)) +
                    outside_text(daemon),
                json};
}

Result<Report> run_shutdown(const Options& options) {
  const auto client = connect(options);
  if (!client) return error_of(client);
  const auto stopped = client->shutdown(options.purge);
  if (!stopped) return error_of(stopped);
  Json json;
  json["socket"] = client->socket();
  json["stopping"] = true;
  json["purged"] = options.purge;
  return Report{
      fmt::format("the daemon at {} is stopping; its arrays {}\n", visible(client->socket()),
                  options.purge ? "go with it" : "stay for the next one, unless it was started with --purge"),
      json};
}

}  // namespace cowmgr::cli
