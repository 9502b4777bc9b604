// What the daemon tells, laid out for people.
#pragma once

#include <string>
#include <vector>

#include "client/cowctl/json.hpp"
#include "client/cowctl/terminal.hpp"
#include "cowmgr/info.hpp"

namespace cowmgr::cli {

// "now", "3 min ago", "2 days ago".
[[nodiscard]] std::string age_text(SystemTime time, SystemTime now);

[[nodiscard]] std::string arrays_table(const std::vector<ArrayInfo>& arrays, SystemTime now, Style style);
[[nodiscard]] std::string clients_table(const std::vector<ClientInfo>& clients, SystemTime now, Style style);
[[nodiscard]] std::string results_table(const std::vector<ResultsInfo>& sets, SystemTime now, Style style);

[[nodiscard]] std::string slots_table(const std::vector<SlotLine>& slots, SystemTime now, Style style);

// One property a line.
[[nodiscard]] std::string array_page(const ArrayDetails& details, SystemTime now, Style style);
[[nodiscard]] std::string daemon_page(const DaemonInfo& daemon, SystemTime now, Style style);

}  // namespace cowmgr::cli
