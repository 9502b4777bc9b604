// `cowctl results`: the sets; one set with its slots; following one; cancelling one.

#include <algorithm>
#include <array>
#include <map>

#include <fmt/format.h>

#include "client/cowctl/commands.hpp"
#include "client/cowctl/tables.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

// All slots, or those that something is to be said of.
Result<std::vector<SlotLine>> lines_of(const Client& client, const ResultSet& set, bool is_all) {
  const auto clients = client.clients();
  if (!clients) return error_of(clients);
  std::map<std::uint64_t, const ClientInfo*> sessions;
  for (const auto& one : *clients) sessions[one.session] = &one;
  std::vector<SlotLine> lines;
  const std::uint64_t rows = set.is_ragged() ? 0 : set.spec().shape.front();
  const std::uint64_t row_bytes = rows == 0 ? 0 : data_bytes(set.spec()).value_or(0) / rows;
  for (std::uint64_t index = 0; index < set.slots(); ++index) {
    auto slot = set.slot(index);
    if (!slot) return error_of(std::move(slot));
    SlotLine line{.slot = *std::move(slot)};
    if (!set.is_ragged()) line.slot.size_bytes = row_bytes * rows_of_slot(rows, set.slots(), index).count();
    if (!is_all && line.slot.state != SlotState::leased && line.slot.state != SlotState::failed) continue;
    if (const auto at = sessions.find(line.slot.session); at != sessions.end()) {
      line.pid = at->second->pid;
      line.command = at->second->command;
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

Result<Report> show_one(const Client& client, ResultSet& set, const Options& options) {
  const auto info = set.info();
  if (!info) return error_of(info);
  const auto lines = lines_of(client, set, options.all_slots);
  if (!lines) return error_of(lines);
  Json json = to_json(*info);
  json["slot_list"] = to_json(*lines);
  std::string text = results_table({*info}, now(), options.style);
  if (!lines->empty()) text += "\n" + slots_table(*lines, now(), options.style);
  return Report{text, Json::array({json})};
}

// Until the set has ended, whichever way.
Result<Report> follow(ResultSet& set, const Options& options) {
  ProgressBar bar(set.name(), set.slots(), ProgressBar::Unit::items, !options.json);
  const auto ended =
      set.wait_settled(kForever, [&](const ResultsInfo& info) { bar.update(info.committed + info.failed); });
  if (!ended) return error_of(ended);
  bar.finish();
  const auto info = set.info();
  if (!info) return error_of(info);
  return Report{fmt::format("{} is done: {} slots\n", printable(info->name), info->slots),
                Json::array({to_json(*info)})};
}

Result<Report> cancel(const ResultSet& set) {
  if (auto ok = set.cancel(); !ok) return error_of(std::move(ok));
  Json json;
  json["cancelled"] = set.name();
  return Report{fmt::format("cancelled {}\n", printable(set.name())), json};
}

}  // namespace

Result<Report> run_results(const Options& options) {
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  if (!options.names.empty() && !options.match) {
    auto set = client->open_results(options.names.front());
    if (!set) return error_of(std::move(set));
    if (options.cancel) return cancel(*set);
    if (options.follow) return follow(*set, options);
    return show_one(*client, *set, options);
  }
  const auto sets =
      options.match ? client->list_results_matching(options.names.front()) : client->list_results();
  if (!sets) return error_of(sets);
  if (sets->empty())
    return nothing_listed(options, *client, "result set", "programs make them with create_results");
  return Report{results_table(*sets, now(), options.style), to_json(*sets)};
}

}  // namespace cowmgr::cli
