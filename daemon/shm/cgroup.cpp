#include "daemon/shm/cgroup.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <string_view>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

// Stays free: the daemon's own heap, page tables, what others of the group take between two looks, and the
// pages that each processor charges ahead (MEMCG_CHARGE_BATCH, 64 of them).
constexpr std::uint64_t kMarginBytes = std::uint64_t{16} << 20U;
constexpr std::uint64_t kMostWithoutALook = std::uint64_t{64} << 20U;
// Version 1 writes "no limit" as the greatest multiple of a page.
constexpr std::uint64_t kNoLimitFrom = std::uint64_t{1} << 62U;

// The number in a file; none if there is none, as in "max".
std::uint64_t number_in(const fs::path& file, std::uint64_t none) {
  std::ifstream in(file);
  std::uint64_t number = 0;
  return in >> number && number < kNoLimitFrom ? number : none;
}

// Clean pages of files count as used, and are dropped before anybody is killed. Pages of shared memory are
// not among them: they are on the lists of anonymous memory.
std::uint64_t droppable_bytes(const fs::path& group, bool is_v2) {
  const std::string_view prefix = is_v2 ? "" : "total_";
  const std::string_view dirty = is_v2 ? "file_dirty" : "dirty";
  const std::string_view writeback = is_v2 ? "file_writeback" : "writeback";
  std::uint64_t cached_bytes = 0;
  std::uint64_t busy_bytes = 0;
  std::ifstream in(group / "memory.stat");
  std::string key;
  for (std::uint64_t number = 0; in >> key >> number;) {
    std::string_view name = key;
    if (!name.starts_with(prefix)) continue;
    name.remove_prefix(prefix.size());
    if (name == "inactive_file" || name == "active_file") cached_bytes += number;
    if (name == dirty || name == writeback) busy_bytes += number;
  }
  return cached_bytes - std::min(cached_bytes, busy_bytes);
}

// The path of this process's group in one hierarchy: a line of /proc/self/cgroup is "4:memory:/path" in
// version 1, "0::/path" in version 2 (cgroups(7)). Outside the namespace's root it begins with "/..", which
// leads nowhere.
fs::path own_group(const fs::path& own, bool is_v2) {
  std::ifstream in(own);
  for (std::string line; std::getline(in, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool is_ours = is_v2 ? controllers == ",," : controllers.find(",memory,") != std::string::npos;
    if (!is_ours) continue;
    const fs::path path = fs::path(line.substr(second + 1)).lexically_normal().relative_path();
    return path.empty() || *path.begin() == ".." ? fs::path() : path;
  }
  return {};
}

}  // namespace

MemoryGroups::MemoryGroups(const fs::path& root, const fs::path& own) {
  std::error_code error;
  is_v2_ = fs::exists(root / "cgroup.controllers", error);
  const fs::path top = is_v2_ ? root : root / "memory";
  if (!fs::exists(top, error)) return;
  for (fs::path path = own_group(own, is_v2_);; path = path.parent_path()) {
    if (fs::exists(top / path, error)) groups_.push_back(path.empty() ? top : top / path);
    if (path.empty()) break;
  }
}

std::vector<MemoryGroups::Room> MemoryGroups::rooms() const {
  std::vector<Room> rooms;
  for (const fs::path& group : groups_) {
    Room room{.group = group};
    if (is_v2_)  // above memory.high every allocation is made to wait, the loop's too
      room.limit_bytes =
          std::min(number_in(group / "memory.max", UINT64_MAX), number_in(group / "memory.high", UINT64_MAX));
    else
      room.limit_bytes = number_in(group / "memory.limit_in_bytes", UINT64_MAX);
    if (room.limit_bytes != UINT64_MAX) rooms.push_back(std::move(room));
  }
  return rooms;
}

MemoryGroups::Room MemoryGroups::lowest_limit() const {
  const auto all = rooms();
  const auto lowest = std::ranges::min_element(all, {}, &Room::limit_bytes);
  return lowest == all.end() ? Room() : *lowest;
}

MemoryGroups::Room MemoryGroups::least_left() const {
  auto all = rooms();
  for (Room& room : all) {
    const fs::path group = room.group;
    const std::uint64_t used_bytes =
        number_in(group / (is_v2_ ? "memory.current" : "memory.usage_in_bytes"), 0);
    const std::uint64_t needed_bytes = used_bytes - std::min(used_bytes, droppable_bytes(group, is_v2_));
    room.left_bytes = room.limit_bytes - std::min(room.limit_bytes, needed_bytes);
  }
  const auto least = std::ranges::min_element(all, {}, &Room::left_bytes);
  return least == all.end() ? Room() : *least;
}

Result<void> GroupBudget::take(std::uint64_t size_bytes) {
  if (size_bytes > granted_bytes_) {
    const auto room = groups_.least_left();
    const std::uint64_t left_bytes = room.left_bytes - std::min(room.left_bytes, kMarginBytes);
    if (left_bytes < needed_bytes_)
      return fail(
          Errc::out_of_memory,
          fmt::format("this needs {}, but the control group {} of the daemon, with its limit of {}, has room "
                      "for {} only; evict arrays, or raise that limit",
                      format_size(needed_bytes_), room.group, format_size(room.limit_bytes),
                      format_size(left_bytes)));
    granted_bytes_ = std::max(size_bytes, std::min(left_bytes / 4, kMostWithoutALook));
  }
  granted_bytes_ -= size_bytes;
  needed_bytes_ -= std::min(needed_bytes_, size_bytes);
  return {};
}

}  // namespace cowmgr
