#include "client/cowctl/tables.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "client/cowctl/json.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

using Properties = std::vector<std::pair<std::string, std::string>>;

std::string yes_no(bool is_yes) {
  return is_yes ? "yes" : "no";
}

fmt::text_style emphasis_of(ArrayState state) {
  if (state == ArrayState::tampered || state == ArrayState::unlinked) return fmt::emphasis::bold;
  return state == ArrayState::sealed ? fmt::text_style() : fmt::emphasis::faint;
}

std::string properties_text(const Properties& properties, Style style) {
  std::vector<Row> rows;
  for (const auto& [key, value] : properties) rows.push_back({{key, value}});
  return table({"", ""}, std::move(rows), style);
}

// "1.2 GiB (15 %)".
std::string share_text(std::uint64_t part, std::uint64_t whole) {
  if (whole == 0) return format_size(part);
  const double percent = 100 * static_cast<double>(part) / static_cast<double>(whole);
  return fmt::format("{} ({:.0f} %)", format_size(part), percent);
}

std::string time_text(SystemTime time, SystemTime now) {
  return fmt::format("{} ({})", iso_time(time), age_text(time, now));
}

Properties properties_of(const ArrayInfo& array, SystemTime now) {
  Properties out = {{"name", array.name},
                    {"version", std::to_string(array.version)},
                    {"dtype", array.spec.dtype.str()},
                    {"shape", to_string(array.spec.shape)},
                    {"order", array.spec.order == Order::fortran ? "F" : "C"},
                    {"size", format_size(array.data_bytes)},
                    {"segment", fmt::format("{}, {}", array.segment, format_size(array.segment_bytes))},
                    {"state", name_of(array.state)},
                    {"protection", name_of(array.protection)},
                    {"views", std::to_string(array.views)},
                    {"pinned", yes_no(array.pinned)},
                    {"evictable", yes_no(array.evictable)},
                    {"owner", user_name(array.owner_uid)},
                    {"mode", mode_text(array.mode)},
                    {"created", time_text(array.created, now)}};
  if (array.sealed != SystemTime{}) out.emplace_back("sealed", time_text(array.sealed, now));
  out.emplace_back("last used", time_text(array.last_used, now));
  if (array.checksum != 0) out.emplace_back("checksum", checksum_text(array.checksum));
  if (array.state == ArrayState::writing) out.emplace_back("writer", fmt::format("pid {}", array.writer_pid));
  return out;
}

}  // namespace

std::string age_text(SystemTime time, SystemTime now) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now - time).count();
  constexpr std::int64_t kMinute = 60;
  constexpr std::int64_t kHour = 60 * kMinute;
  constexpr std::int64_t kDay = 24 * kHour;
  if (seconds < 1) return "now";
  if (seconds < kMinute) return fmt::format("{} s ago", seconds);
  if (seconds < kHour) return fmt::format("{} min ago", seconds / kMinute);
  if (seconds < kDay) return fmt::format("{} h ago", seconds / kHour);
  return fmt::format("{} day{} ago", seconds / kDay, seconds < 2 * kDay ? "" : "s");
}

std::string arrays_table(const std::vector<ArrayInfo>& arrays, SystemTime now, Style style) {
  std::vector<Row> rows;
  for (const auto& array : arrays) {
    rows.push_back({{array.name, std::to_string(array.version), array.spec.dtype.str(),
                     to_string(array.spec.shape), format_size(array.data_bytes), name_of(array.state),
                     name_of(array.protection), std::to_string(array.views), yes_no(array.pinned),
                     user_name(array.owner_uid), age_text(array.created, now)},
                    emphasis_of(array.state)});
  }
  return table({"NAME", ">VERSION", "DTYPE", "SHAPE", ">SIZE", "STATE", "PROTECTION", ">VIEWS", "PINNED",
                "OWNER", "CREATED"},
               std::move(rows), style);
}

std::string clients_table(const std::vector<ClientInfo>& clients, SystemTime now, Style style) {
  std::vector<Row> rows;
  for (const auto& client : clients) {
    rows.push_back(
        {{std::to_string(client.session), std::to_string(client.pid), user_name(client.uid), client.command,
          std::to_string(client.channels), std::to_string(client.views), format_size(client.view_bytes),
          std::to_string(client.writing), std::to_string(client.leases), age_text(client.connected, now)}});
  }
  return table({">SESSION", ">PID", "USER", "COMMAND", ">CHANNELS", ">VIEWS", ">SIZE", ">WRITING", ">LEASES",
                "CONNECTED"},
               std::move(rows), style);
}

std::string results_table(const std::vector<ResultsInfo>& sets, SystemTime now, Style style) {
  std::vector<Row> rows;
  for (const auto& set : sets) {
    rows.push_back(
        {{set.name, name_of(set.state), std::to_string(set.slots), std::to_string(set.committed),
          std::to_string(set.leased), std::to_string(set.free), std::to_string(set.failed),
          set.is_ragged ? "any" : set.spec.dtype.str(), set.is_ragged ? "ragged" : to_string(set.spec.shape),
          format_size(set.is_ragged ? set.value_bytes : set.data_bytes), user_name(set.owner_uid),
          age_text(set.created, now), set.message},
         bold_if(set.state == ResultsState::failed)});
  }
  return table({"NAME", "STATE", ">SLOTS", ">COMMITTED", ">LEASED", ">FREE", ">FAILED", "DTYPE", "SHAPE",
                ">SIZE", "OWNER", "CREATED", "MESSAGE"},
               std::move(rows), style);
}

std::string slots_table(const std::vector<SlotLine>& slots, SystemTime now, Style style) {
  std::vector<Row> rows;
  for (const auto& [slot, pid, command] : slots) {
    const bool has_failed = slot.state == SlotState::failed;
    const bool has_size = !has_failed && (slot.size_bytes > 0 || slot.content != SlotContent::none);
    rows.push_back({{std::to_string(slot.index), name_of(slot.state),
                     pid == 0 ? "" : fmt::format("{} ({})", pid, command), std::to_string(slot.attempt),
                     slot.attempt == 0 ? "" : age_text(slot.since, now),
                     has_size ? format_size(slot.size_bytes) : "", slot.reason},
                    bold_if(has_failed)});
  }
  return table({">SLOT", "STATE", "HOLDER", ">ATTEMPT", "SINCE", ">SIZE", "REASON"}, std::move(rows), style);
}

std::string array_page(const ArrayDetails& details, SystemTime now, Style style) {
  Properties properties = properties_of(details.array, now);
  properties.emplace_back("memory", format_size(details.resident_bytes));
  properties.emplace_back("huge pages", share_text(details.huge_bytes, details.resident_bytes));
  std::string out = properties_text(properties, style);
  if (!details.holders.empty()) out += "\n" + clients_table(details.holders, now, style);
  return out;
}

std::string daemon_page(const DaemonInfo& daemon, SystemTime now, Style style) {
  const DaemonMemory& memory = daemon.memory;
  return properties_text({{"version", daemon.version},
                          {"instance", daemon.instance},
                          {"socket", daemon.socket},
                          {"pid", std::to_string(daemon.pid)},
                          {"user", user_name(daemon.uid)},
                          {"started", time_text(daemon.started, now)},
                          {"protection", name_of(daemon.protection)},
                          {"capacity", format_size(daemon.capacity_bytes)},
                          {"used", share_text(daemon.used_bytes, daemon.capacity_bytes)},
                          {"free", format_size(memory.free_bytes)},
                          {"pinned", format_size(memory.pinned_bytes)},
                          {"evictable", format_size(memory.evictable_bytes)},
                          {"viewed", format_size(memory.viewed_bytes)},
                          {"kept", format_size(memory.kept_bytes)},
                          {"being written", format_size(memory.writing_bytes)},
                          {"draining", format_size(memory.draining_bytes)},
                          {"in results", format_size(memory.results_bytes)},
                          {"given back", format_size(memory.reclaiming_bytes)},
                          {"held outside", format_size(memory.outside_bytes)},
                          {"arrays", std::to_string(daemon.arrays)},
                          {"sessions", std::to_string(daemon.sessions)},
                          {"result sets", std::to_string(daemon.result_sets)}},
                         style);
}

}  // namespace cowmgr::cli
