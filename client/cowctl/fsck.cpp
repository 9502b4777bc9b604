// `cowctl fsck`: what instances have in shared memory, read from the segments themselves. Needs no daemon.

#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <sys/stat.h>
#include <tuple>

#include <fmt/format.h>

#include "client/cowctl/commands.hpp"
#include "client/cowctl/tables.hpp"
#include "proto/instance_lock.hpp"
#include "proto/segment_file.hpp"
#include "proto/session.hpp"
#include "proto/text.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::cli {
namespace {

namespace fs = std::filesystem;

using Kind = SegmentFile::Kind;

// One file of an instance.
struct Entry {
  std::string file;
  std::uint64_t id = 0;
  bool is_readable = false;  // else `segment` says nothing
  SegmentFile segment{};
  std::string problem{};
  bool is_useless = false;  // nobody can use it any more
  bool is_removed = false;

  [[nodiscard]] bool is(Kind kind) const noexcept { return is_readable && segment.kind == kind; }
};

struct Instance {
  std::string name;
  std::optional<pid_t> daemon{};  // that runs; 0: its process cannot be seen from here
  std::vector<Entry> entries{};
};

std::string state_of(const Entry& entry) {
  constexpr std::array<const char*, 5> kStates = {"unsealed", "sealed", "results", "damaged", "newer"};
  return entry.is_readable ? kStates.at(static_cast<std::size_t>(entry.segment.kind)) : "unreadable";
}

std::string path_of(const std::string& file) {
  return fmt::format("{}/{}", kShmDirectory, file);
}

Entry look_at(const std::string& file, std::uint64_t id) {
  Entry entry{.file = file, .id = id};
  const UniqueFd fd(::open(path_of(file).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) {
    entry.problem = os_error("open", file, errno).message;
    return entry;
  }
  auto segment = read_segment_file(fd.get(), id);
  if (!segment) {
    entry.problem = segment.error().message;
    return entry;
  }
  entry.is_readable = true;
  entry.problem = segment->problem;
  // What is evicted is useful to those who have it mapped, and they do not need the file.
  entry.is_useless = segment->kind == Kind::damaged || segment->is_draining;
  entry.segment = *std::move(segment);
  return entry;
}

// A set goes with its maker, unless it is detached; what was being written goes with its set, or its writer.
void judge(Instance& instance) {
  std::set<std::uint64_t> sets;
  for (Entry& entry : instance.entries) {
    if (!entry.is(Kind::slots)) continue;
    const ResultRecord& results = entry.segment.results;
    entry.is_useless = !results.is_detached && !has_process(results.maker);
    if (!entry.is_useless) sets.insert(results.set);
  }
  for (Entry& entry : instance.entries) {
    if (entry.is(Kind::unsealed))
      entry.is_useless = !sets.contains(entry.id) && !has_process(entry.segment.trailer.writer);
  }
}

std::map<std::string, Instance> find_instances(const std::string& wanted) {
  std::map<std::string, Instance> instances;
  std::error_code ignored;
  for (const auto& file : fs::directory_iterator(kShmDirectory, ignored)) {
    const std::string name = file.path().filename();
    const auto belonging = parse_segment_file_name(name);
    if (!belonging || (!wanted.empty() && belonging->instance != wanted)) continue;
    Instance& instance =
        instances.try_emplace(belonging->instance, Instance{belonging->instance}).first->second;
    Entry entry = look_at(name, belonging->id);
    if (belonging->is_quarantined) {
      entry.is_readable = true;
      entry.segment.kind = Kind::damaged;
      entry.is_useless = true;
      if (entry.problem.empty()) entry.problem = "moved aside by a daemon";
    }
    instance.entries.push_back(std::move(entry));
  }
  for (auto& [name, instance] : instances) {
    std::ranges::sort(instance.entries, {}, &Entry::file);
    judge(instance);
  }
  return instances;
}

// Removes what nobody can use, unless a daemon runs: it still uses what looks useless to us.
Result<void> repair(Instance& instance) {
  const auto lock = InstanceLock::acquire(instance.name);
  if (!lock && lock.error().code == Errc::busy)
    return fail(Errc::busy, fmt::format("instance {} has a daemon: {}; stop it first", instance.name,
                                        lock.error().message));
  if (!lock) return error_of(lock);
  for (Entry& entry : instance.entries) {
    std::error_code error;
    if (!entry.is_useless) continue;
    entry.is_removed = fs::remove(path_of(entry.file), error);
    if (error) entry.problem = fmt::format("it cannot be removed: {}", error.message());
  }
  return {};
}

Json to_json(const Entry& entry) {
  Json out;
  out["file"] = entry.file;
  out["state"] = state_of(entry);
  out["bytes"] = entry.segment.size_bytes;
  if (entry.is(Kind::sealed)) {
    out["name"] = entry.segment.trailer.name;
    out["version"] = entry.segment.trailer.version;
    out["owner"] = user_name(entry.segment.trailer.owner_uid);
    out["pinned"] = entry.segment.is_pinned;
    out["evicted"] = entry.segment.is_draining;
    out["sealed"] = iso_time(SystemTime(std::chrono::microseconds(entry.segment.trailer.sealed_us)));
  }
  if (entry.is(Kind::slots)) {
    out["name"] = entry.segment.results.name;
    out["owner"] = user_name(entry.segment.results.owner_uid);
    out["slots"] = entry.segment.results.slots;
    out["maker_pid"] = pid_of(entry.segment.results.maker);
  }
  if (entry.is(Kind::unsealed) && entry.segment.trailer.writer != 0)
    out["writer_pid"] = pid_of(entry.segment.trailer.writer);
  if (!entry.problem.empty()) out["problem"] = entry.problem;
  out["removed"] = entry.is_removed;
  return out;
}

Json to_json(const Instance& instance) {
  Json out;
  out["instance"] = instance.name;
  if (instance.daemon) out["daemon_pid"] = *instance.daemon == 0 ? Json() : Json(*instance.daemon);
  out["files"] = Json::array();
  for (const Entry& entry : instance.entries) out["files"].push_back(to_json(entry));
  return out;
}

std::string note_of(const Entry& entry) {
  if (entry.is_removed) return "removed";
  if (!entry.problem.empty()) return entry.problem;
  if (entry.is(Kind::sealed) && entry.segment.is_draining) return "evicted";
  if (entry.is(Kind::sealed)) return entry.segment.is_pinned ? "pinned" : "";
  if (entry.is(Kind::slots)) {
    const ResultRecord& results = entry.segment.results;
    return fmt::format("{} slots{}", results.slots,
                       results.is_detached ? "" : fmt::format(", of process {}", pid_of(results.maker)));
  }
  const std::uint64_t writer = entry.segment.trailer.writer;
  return writer == 0 ? "" : fmt::format("of process {}", pid_of(writer));
}

std::string daemon_in_words(const Instance& instance) {
  if (!instance.daemon) return "no daemon";
  if (*instance.daemon == 0) return "a daemon runs, which cannot be seen from here";
  return fmt::format("daemon {} runs", *instance.daemon);
}

// What `--repair` would remove, in words; empty when there is nothing.
std::string note_of(const Instance& instance) {
  const auto useless = std::ranges::count_if(
      instance.entries, [](const Entry& entry) { return entry.is_useless && !entry.is_removed; });
  if (useless == 0 || instance.daemon) return "";
  return fmt::format("{} of no use to anybody; `cowctl fsck {} --repair` removes what is\n", useless,
                     instance.name);
}

std::string to_text(const Instance& instance, Style style) {
  std::vector<Row> rows;
  for (const Entry& entry : instance.entries) {
    const auto& [segment, trailer, results] =
        std::tie(entry.segment, entry.segment.trailer, entry.segment.results);
    const bool is_sealed = entry.is(Kind::sealed);
    const bool is_results = entry.is(Kind::slots);
    uid_t owner = segment.file_owner;
    if (is_sealed) owner = trailer.owner_uid;
    if (is_results) owner = results.owner_uid;
    rows.push_back({{entry.file, state_of(entry), format_size(segment.size_bytes),
                     is_sealed ? trailer.name : results.name,
                     is_sealed ? std::to_string(trailer.version) : "", user_name(owner), note_of(entry)},
                    bold_if(entry.is(Kind::damaged))});
  }
  return fmt::format(
      "instance {}: {}\n{}", instance.name, daemon_in_words(instance),
      table({"FILE", "STATE", ">SIZE", "NAME", ">VERSION", "OWNER", "NOTE"}, std::move(rows), style));
}

}  // namespace

Result<Report> run_fsck(const Options& options) {
  const std::string wanted = options.names.empty() ? std::string() : options.names.front();
  if (!wanted.empty()) {
    if (auto ok = check_instance(wanted); !ok) return error_of(ok);
  }
  auto instances = find_instances(wanted);
  Report report{{}, Json::array()};
  for (auto& [name, instance] : instances) {
    instance.daemon = InstanceLock::holder_of(name);
    if (options.repair) {
      if (const auto ok = repair(instance); !ok) return error_of(ok);
    }
    report.text += (report.text.empty() ? "" : "\n") + to_text(instance, options.style);
    report.note += note_of(instance);
    report.json.push_back(to_json(instance));
  }
  if (instances.empty())
    report.note = wanted.empty() ? "no instance has anything in shared memory\n"
                                 : fmt::format("instance {} has nothing in shared memory\n", wanted);
  return report;
}

}  // namespace cowmgr::cli
