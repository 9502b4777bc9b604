#include "client/cowctl/json.hpp"

#include <array>
#include <map>
#include <pwd.h>

#include <fmt/format.h>

#include "proto/frames.hpp"

namespace cowmgr::cli {
namespace {

std::string look_up_user(uid_t uid) {
  std::array<char, 16384> buffer{};  // sysconf(_SC_GETPW_R_SIZE_MAX) says 1024, which directory services pass
  passwd entry{};
  passwd* found = nullptr;
  const int error = ::getpwuid_r(uid, &entry, buffer.data(), buffer.size(), &found);
  return error == 0 && found != nullptr ? std::string(found->pw_name) : std::to_string(uid);
}

// As flatc gives the names of what stands in frames: "" for a number without one.
std::string known(std::string_view name) {
  return std::string(name.empty() ? "unknown" : name);
}

template <class Enum, std::size_t Count>
std::string name_in(const std::array<std::string_view, Count>& names, Enum value) {
  const auto at = static_cast<std::size_t>(value);
  return known(at < Count ? names[at] : "");
}

}  // namespace

std::string name_of(ArrayState state) {
  return known(wire::EnumNameArrayState(static_cast<wire::ArrayState>(state)));
}

std::string name_of(Protection protection) {
  return known(wire::EnumNameProtection(static_cast<wire::Protection>(protection)));
}

std::string name_of(ResultsState state) {
  return known(wire::EnumNameResultsState(static_cast<wire::ResultsState>(state)));
}

std::string name_of(SlotState state) {
  return name_in(std::array<std::string_view, 4>{"free", "leased", "committed", "failed"}, state);
}

std::string name_of(SlotContent content) {
  return name_in(std::array<std::string_view, 5>{"none", "rows", "value", "array", "reason"}, content);
}

std::string user_name(uid_t uid) {
  static std::map<uid_t, std::string>
      known;  // a list has many arrays of few users, and each look-up reads a file
  const auto [entry, is_new] = known.try_emplace(uid);
  if (is_new) entry->second = look_up_user(uid);
  return entry->second;
}

std::string iso_time(SystemTime time) {
  const auto day = std::chrono::floor<std::chrono::days>(time);
  const std::chrono::year_month_day date(day);
  const std::chrono::hh_mm_ss clock(time - day);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z", static_cast<int>(date.year()),
                     static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()),
                     clock.hours().count(), clock.minutes().count(), clock.seconds().count(),
                     clock.subseconds().count());
}

std::string mode_text(std::uint32_t mode) {
  return fmt::format("{:04o}", mode);
}

std::string checksum_text(std::uint64_t checksum) {
  return fmt::format("{:016x}", checksum);
}

void add_spec(Json& object, const ArraySpec& spec) {
  object["dtype"] = spec.dtype.str();
  object["shape"] = spec.shape;
  object["order"] = spec.order == Order::fortran ? "F" : "C";
}

Json to_json(const ArrayInfo& array) {
  Json out;
  out["id"] = array.id;
  out["name"] = array.name;
  out["version"] = array.version;
  add_spec(out, array.spec);
  out["bytes"] = array.data_bytes;
  out["segment_bytes"] = array.segment_bytes;
  out["segment"] = array.segment;
  out["state"] = name_of(array.state);
  out["protection"] = name_of(array.protection);
  out["views"] = array.views;
  out["pinned"] = array.pinned;
  out["evictable"] = array.evictable;
  out["owner"] = user_name(array.owner_uid);
  out["mode"] = mode_text(array.mode);
  out["created"] = iso_time(array.created);
  if (array.sealed != SystemTime{}) out["sealed"] = iso_time(array.sealed);
  out["last_used"] = iso_time(array.last_used);
  if (array.state == ArrayState::writing) out["writer_pid"] = array.writer_pid;
  if (array.checksum != 0) out["checksum"] = checksum_text(array.checksum);
  return out;
}

Json to_json(const ArrayDetails& details) {
  Json out = to_json(details.array);
  out["resident_bytes"] = details.resident_bytes;
  out["huge_bytes"] = details.huge_bytes;
  out["holders"] = to_json(details.holders);
  return out;
}

Json to_json(const SlotLine& line) {
  const SlotInfo& slot = line.slot;
  Json out;
  out["slot"] = slot.index;
  out["state"] = name_of(slot.state);
  out["attempt"] = slot.attempt;
  if (slot.state == SlotState::leased) {
    out["pid"] = line.pid;
    out["command"] = line.command;
  }
  if (slot.attempt > 0) out["since"] = iso_time(slot.since);
  if (slot.state == SlotState::committed) {
    out["content"] = name_of(slot.content);
    out["bytes"] = slot.size_bytes;
  }
  if (slot.content == SlotContent::array) out["array_id"] = slot.array_id;
  if (slot.state == SlotState::failed) out["reason"] = slot.reason;
  return out;
}

Json to_json(const ResultsInfo& results) {
  Json out;
  out["id"] = results.id;
  out["name"] = results.name;
  out["state"] = name_of(results.state);
  out["kind"] = results.is_ragged ? "ragged" : "dense";
  if (!results.is_ragged) add_spec(out, results.spec);
  out["bytes"] = results.is_ragged ? results.value_bytes : results.data_bytes;
  out["slots"] = results.slots;
  out["free"] = results.free;
  out["leased"] = results.leased;
  out["committed"] = results.committed;
  out["failed"] = results.failed;
  if (!results.message.empty()) out["message"] = results.message;
  out["owner"] = user_name(results.owner_uid);
  out["owner_pid"] = results.owner_pid;
  out["holders"] = results.holders;
  out["attempts"] = results.attempts;
  out["lease_ms"] = results.lease.count();
  out["detached"] = results.is_detached;
  out["segment"] = results.segment;
  out["created"] = iso_time(results.created);
  out["revision"] = results.revision;
  return out;
}

Json to_json(const ClientInfo& client) {
  Json out;
  out["session"] = client.session;
  out["pid"] = client.pid;
  out["user"] = user_name(client.uid);
  out["command"] = client.command;
  out["channels"] = client.channels;
  out["views"] = client.views;
  out["view_bytes"] = client.view_bytes;
  out["writing"] = client.writing;
  out["leases"] = client.leases;
  out["connected"] = iso_time(client.connected);
  return out;
}

Json to_json(const DaemonMemory& memory) {
  Json out;
  out["free_bytes"] = memory.free_bytes;
  out["writing_bytes"] = memory.writing_bytes;
  out["draining_bytes"] = memory.draining_bytes;
  out["pinned_bytes"] = memory.pinned_bytes;
  out["viewed_bytes"] = memory.viewed_bytes;
  out["evictable_bytes"] = memory.evictable_bytes;
  out["kept_bytes"] = memory.kept_bytes;
  out["results_bytes"] = memory.results_bytes;
  out["reclaiming_bytes"] = memory.reclaiming_bytes;
  out["outside_bytes"] = memory.outside_bytes;
  return out;
}

Json to_json(const DaemonInfo& daemon) {
  Json out;
  out["version"] = daemon.version;
  out["instance"] = daemon.instance;
  out["socket"] = daemon.socket;
  out["pid"] = daemon.pid;
  out["user"] = user_name(daemon.uid);
  out["started"] = iso_time(daemon.started);
  out["protection"] = name_of(daemon.protection);
  out["capacity_bytes"] = daemon.capacity_bytes;
  out["used_bytes"] = daemon.used_bytes;
  out["pinned_bytes"] = daemon.pinned_bytes;
  out["evictable_bytes"] = daemon.evictable_bytes;
  out["viewed_bytes"] = daemon.viewed_bytes;
  out["arrays"] = daemon.arrays;
  out["sessions"] = daemon.sessions;
  out["result_sets"] = daemon.result_sets;
  out["memory"] = to_json(daemon.memory);
  return out;
}

Json to_json(const EvictReport& report) {
  Json out;
  out["names"] = report.names;
  out["freed_bytes"] = report.freed_bytes;
  if (!report.passed_over.empty()) out["passed_over"] = report.passed_over;
  return out;
}

Json to_json(const Error& error) {
  Json out;
  out["error"] = to_string(error.code);
  out["message"] = error.message;
  return out;
}

std::string dump(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + '\n';
}

std::string dump_line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n';
}

}  // namespace cowmgr::cli
