// The subcommands: each asks the daemon and says what it answered. None prints, but for progress.
#pragma once

#include "client/cowctl/options.hpp"

namespace cowmgr::cli {

[[nodiscard]] Result<Report> run_ls(const Options& options);
[[nodiscard]] Result<Report> run_stat(const Options& options);
[[nodiscard]] Result<Report> run_put(const Options& options);
[[nodiscard]] Result<Report> run_get(const Options& options);
[[nodiscard]] Result<Report> run_verify(const Options& options);
[[nodiscard]] Result<Report> run_evict(const Options& options);
[[nodiscard]] Result<Report> run_pin(const Options& options);
[[nodiscard]] Result<Report> run_unpin(const Options& options);
[[nodiscard]] Result<Report> run_clients(const Options& options);
[[nodiscard]] Result<Report> run_results(const Options& options);
[[nodiscard]] Result<Report> run_ping(const Options& options);
[[nodiscard]] Result<Report> run_shutdown(const Options& options);
[[nodiscard]] Result<Report> run_fsck(const Options& options);

// For the commands' own use.
[[nodiscard]] SystemTime now();

// All arrays, those of the name, or those that match the pattern.
[[nodiscard]] Result<std::vector<ArrayInfo>> listed(const Client& client, const Options& options);

// The report of a listing without an entry: refused where it was of a name or a pattern, else it says how to
// get an entry. `what` is one of them, as in "array".
[[nodiscard]] Report nothing_listed(const Options& options, const Client& client, std::string_view what,
                                    std::string_view how_to_get_one);

}  // namespace cowmgr::cli
