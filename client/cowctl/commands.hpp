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

// The daemon, by the global options.
[[nodiscard]] Result<Client> connect(const Options& options);

// A pattern that matches the name `name` alone, whatever characters it has.
[[nodiscard]] std::string literal_pattern(std::string_view name);

// For the commands' own use.
[[nodiscard]] SystemTime now();
// What to say when nothing matches the glob that the user gave, or there is nothing at all.
[[nodiscard]] std::string nothing_text(const Options& options, std::string_view what,
                                       std::string_view how_to_get_one);
[[nodiscard]] std::string_view pattern_of(const Options& options);

}  // namespace cowmgr::cli
