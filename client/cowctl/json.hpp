// What --json prints: the info structs as JSON objects. Keys are stable; sizes are bytes, as numbers; times
// are ISO 8601 in UTC; what does not apply is absent.
#pragma once

#include <string>
#include <string_view>
#include <sys/types.h>

#include <nlohmann/json.hpp>

#include "cowmgr/info.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr::cli {

using Json = nlohmann::ordered_json;

// "unknown" for what a newer daemon may say beyond the names that we know.
[[nodiscard]] std::string name_of(ArrayState state);
[[nodiscard]] std::string name_of(Protection protection);
[[nodiscard]] std::string name_of(ResultsState state);
[[nodiscard]] std::string name_of(SlotState state);
[[nodiscard]] std::string name_of(SlotContent content);

// The user's name, or the number as text when the system knows no such user. Not thread-safe.
[[nodiscard]] std::string user_name(uid_t uid);

// "2026-01-31T12:00:00.123456Z".
[[nodiscard]] std::string iso_time(SystemTime time);

// "0644".
[[nodiscard]] std::string mode_text(std::uint32_t mode);

[[nodiscard]] Json to_json(const ArrayInfo& array);
[[nodiscard]] Json to_json(const ArrayDetails& details);
[[nodiscard]] Json to_json(const ResultsInfo& results);
// A slot, and who holds it: 0 and empty when nobody does.
struct SlotLine {
  SlotInfo slot;
  pid_t pid = 0;
  std::string command{};
};
[[nodiscard]] Json to_json(const SlotLine& line);
[[nodiscard]] Json to_json(const ClientInfo& client);
[[nodiscard]] Json to_json(const DaemonInfo& daemon);
[[nodiscard]] Json to_json(const EvictReport& report);
// {"error": "not_found", "message": "..."}
[[nodiscard]] Json to_json(const Error& error);

// As `xxhsum -H3` writes it.
[[nodiscard]] std::string checksum_text(std::uint64_t checksum);

// The keys dtype, shape and order.
void add_spec(Json& object, const ArraySpec& spec);

template <class T>
[[nodiscard]] Json to_json(const std::vector<T>& items) {
  Json list = Json::array();
  for (const auto& item : items) list.push_back(to_json(item));
  return list;
}

// As text, on lines of its own. Text that is not UTF-8 (a path can be such) gets replacement characters.
[[nodiscard]] std::string dump(const Json& json);
[[nodiscard]] std::string dump_line(const Json& json);

}  // namespace cowmgr::cli
