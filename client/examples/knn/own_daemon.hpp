// A cowmgr of the demo's own: nothing that the machine has already is touched.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "client/examples/knn/child.hpp"
#include "client/examples/knn/interrupts.hpp"
#include "proto/errors.hpp"

namespace cowmgr::knn {

// The destructor stops the daemon, shows what it logged, and removes its memory and its directory.
class OwnDaemon {
 public:
  // Starts the cowmgr beside this program and returns when it serves. Unless it `may_outlive` us, it also
  // stops by itself if this process is killed. Errors: not_found without that program, no_daemon when it
  // ends at once, and those of `interrupts`.
  [[nodiscard]] static Result<std::unique_ptr<OwnDaemon>> start(bool may_outlive,
                                                                const Interrupts& interrupts);
  OwnDaemon(const OwnDaemon&) = delete;
  OwnDaemon& operator=(const OwnDaemon&) = delete;
  ~OwnDaemon();

  [[nodiscard]] std::string socket() const { return directory_ / "cowmgr.sock"; }
  // Where the log of a daemon goes that may outlive us; that of another one goes to standard error.
  [[nodiscard]] std::string log() const { return directory_ / "cowmgr.log"; }

  // Leaves the daemon running when this object goes.
  void keep() noexcept;

 private:
  explicit OwnDaemon(std::filesystem::path directory);
  [[nodiscard]] Result<void> launch(bool may_outlive);
  [[nodiscard]] Result<void> spawn_independent(ChildOptions options);
  [[nodiscard]] Result<void> spawn_dependent(ChildOptions options);
  [[nodiscard]] Result<void> spawn(const ChildOptions& options);
  [[nodiscard]] Result<void> await_ready(const Interrupts& interrupts);
  [[nodiscard]] std::string notify_socket() const { return directory_ / "notify.sock"; }
  void stop() noexcept;

  std::filesystem::path directory_;
  std::string instance_;
  UniqueFd notify_;    // where the daemon says that it serves: sd_notify(3)
  UniqueFd lifeline_;  // its end, by whatever cause, stops the daemon
  std::unique_ptr<Child> child_;
  bool is_kept_ = false;
};

}  // namespace cowmgr::knn
