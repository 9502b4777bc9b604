// A program that this process starts, watches, and does not leave behind.
#pragma once

#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::knn {

// Move-only. The destructor kills the program if it still runs.
class Child {
 public:
  // Starts `arguments`, the path of the program first, with our environment and these standard streams.
  // Errors: not_found when there is no such program, os_failure.
  [[nodiscard]] static Result<Child> start(std::vector<std::string> arguments, const UniqueFd& input,
                                           const UniqueFd& output);
  Child(Child&&) noexcept = default;
  Child& operator=(Child&&) = delete;
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child();

  [[nodiscard]] pid_t pid() const noexcept { return pid_; }
  // A descriptor that can be read once the program has ended.
  [[nodiscard]] int pidfd() const noexcept { return pidfd_.get(); }

  // How the program ended: "ended with exit status 1", "was killed by signal 9 (Killed)". Empty while it
  // runs. Does not block.
  [[nodiscard]] const std::optional<std::string>& ended();
  [[nodiscard]] bool has_succeeded() const noexcept { return end_ && status_ == 0; }

 private:
  Child(pid_t pid, UniqueFd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

  pid_t pid_;
  UniqueFd pidfd_;  // none: moved from
  int status_ = 0;
  std::optional<std::string> end_;
};

// Where this program lies: the others that were built with it lie beside it.
[[nodiscard]] std::string path_of_sibling(const std::string& program);

}  // namespace cowmgr::knn
