// What nobody asks for: after each turn of the loop it takes the notes that requests have left (what became
// free, ended, was served, was dropped), wakes whom that serves, and has the rest done in the background.
//
// It stands above all else, and nothing calls it but the loop and the watchers of signals and files.
#pragma once

#include <atomic>
#include <chrono>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/steady_timer.hpp>

#include "daemon/core/core.hpp"

namespace cowmgr {

class Housekeeping {
 public:
  explicit Housekeeping(Core& core);
  ~Housekeeping() = default;
  Housekeeping(const Housekeeping&) = delete;
  Housekeeping& operator=(const Housekeeping&) = delete;

  // To be called after every turn of the loop. Whether there was anything to do.
  bool tend() noexcept;

  // Sessions of an earlier daemon that may come back: those that have not when the grace period is over end.
  void await_sessions(const std::set<SessionId>& sessions);
  // Of what an earlier daemon left: has what lost its file written anew, and checksums checked, in the
  // background.
  void look_after_arrays();

  // Somebody opened a sealed segment for writing.
  [[nodiscard]] asio::awaitable<void> report_tampering(int lease_fd);
  // Files of segments have lost their names. Arrays that are served, and should have one, get a new one.
  void report_removals(const ShmEnv::Removals& removals);

  // Nothing begins anew, and nothing keeps the loop running any more.
  void stop() noexcept;

 private:
  [[nodiscard]] bool take_notes();
  void note_served_and_dropped();
  void wake_for(ArrayId set, const ResultSets::Change& change);
  void wake_next(const WaitKey& key);
  [[nodiscard]] asio::awaitable<void> tell_service_manager();
  void start_rewriting();
  [[nodiscard]] asio::awaitable<void> rewrite_unlinked();
  [[nodiscard]] asio::awaitable<void> rewrite(ArrayId id);
  [[nodiscard]] asio::awaitable<void> check_contents(std::vector<ArrayId> arrays);
  [[nodiscard]] asio::awaitable<bool> is_as_sealed(ArrayId id);
  void start_retrying_seals();
  [[nodiscard]] asio::awaitable<void> retry_seals();
  [[nodiscard]] asio::awaitable<void> explain(ResultSets::Refused refused);
  void watch_lease_ends();
  void end_grace();

  Core& core_;
  bool is_retrying_seals_ = false;
  bool is_rewriting_ = false;
  std::set<ArrayId> rewritten_in_vain_;  // since memory was given back last
  std::uint64_t reclaimed_ = 0;          // Reclaimer::times() when that was looked at
  bool is_telling_ = false;
  std::atomic<bool> stops_work_{false};  // in the background
  asio::steady_timer grace_end_;
  asio::steady_timer lease_end_;      // of the slot's lease that ends first
  std::optional<Tick> lease_end_at_;  // what it is set to
};

}  // namespace cowmgr
