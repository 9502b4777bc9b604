#include "client/cowctl/commands.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <unistd.h>

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
  if (report.names.empty()) return "";
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
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  const auto names =
      options.match ? client->pin_matching(options.names, is_pinned) : client->pin(options.names, is_pinned);
  if (!names) return error_of(names);
  Json json;
  json["names"] = *names;
  json["pinned"] = is_pinned;
  return Report{fmt::format("{} {}\n", is_pinned ? "pinned" : "unpinned", quoted(*names)), json};
}

Result<Report> evict_lru(const Client& client, std::uint64_t size_bytes) {
  const auto done = client.evict_lru(size_bytes);
  if (!done) return error_of(done);
  Report report{evict_text(*done), to_json(*done)};
  if (done->freed_bytes < size_bytes) {
    report.refusal = Error{Errc::busy, fmt::format("freed {} of the {} that were asked for; all else is "
                                                   "pinned, viewed, being written, or of another user",
                                                   format_size(done->freed_bytes), format_size(size_bytes))};
  }
  return report;
}

}  // namespace

SystemTime now() {
  return std::chrono::floor<std::chrono::microseconds>(std::chrono::system_clock::now());
}

Result<std::vector<ArrayInfo>> listed(const Client& client, const Options& options) {
  if (options.names.empty()) return client.list();
  const auto& text = options.names.front();
  return options.match ? client.list_matching(text) : client.list(text);
}

Report nothing_listed(const Options& options, const Client& client, std::string_view what,
                      std::string_view how_to_get_one) {
  Report report{.text = "", .json = Json::array()};
  if (!options.names.empty()) {
    const auto name = printable(options.names.front());
    report.refusal =
        Error{Errc::not_found, options.match ? fmt::format("no {} has a name that matches {}", what, name)
                                             : fmt::format("there is no {} {}", what, name)};
    return report;
  }
  const auto daemon = client.ping();
  const bool sees_all = ::geteuid() == 0 || !daemon || daemon->uid == ::geteuid();
  const auto whose = sees_all ? "" : fmt::format(" that user {} may read", user_name(::geteuid()));
  report.note = fmt::format("no {}s{}; {}\n", what, whose, how_to_get_one);
  return report;
}

Result<Report> run_ls(const Options& options) {
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  const auto arrays = listed(*client, options);
  if (!arrays) return error_of(arrays);
  const auto daemon = client->ping();
  if (!daemon) return error_of(daemon);
  Report report = arrays->empty()
                      ? nothing_listed(options, *client, "array", "put one with `cowctl put FILE.npy`")
                      : Report{arrays_table(*arrays, now(), options.style), to_json(*arrays)};
  report.note += outside_text(*daemon);
  return report;
}

Result<Report> run_stat(const Options& options) {
  const auto client = Client::connect(options.daemon);
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
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  if (options.lru_bytes > 0) return evict_lru(*client, options.lru_bytes);
  const auto done = options.match ? client->evict_matching(options.names) : client->evict(options.names);
  if (!done) return error_of(done);
  Report report{evict_text(*done), to_json(*done)};
  if (!done->passed_over.empty())
    report.note = fmt::format("passed over what is pinned: {}\n", quoted(done->passed_over));
  return report;
}

Result<Report> run_pin(const Options& options) {
  return set_pinned(options, true);
}

Result<Report> run_unpin(const Options& options) {
  return set_pinned(options, false);
}

Result<Report> run_clients(const Options& options) {
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  const auto clients = client->clients();
  if (!clients) return error_of(clients);
  return Report{clients_table(*clients, now(), options.style), to_json(*clients)};
}

Result<Report> run_ping(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const auto client = Client::connect(options.daemon);
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
  const auto client = Client::connect(options.daemon);
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
