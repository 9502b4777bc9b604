// A program that this process starts, watches, and does not leave behind.
#pragma once

#include <csignal>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::knn {

struct ChildOptions {
  struct Descriptor {
    int ours;
    int its;  // the number that the child sees
  };
  std::vector<std::string> arguments;    // the path of the program first
  std::vector<std::string> environment;  // NAME=VALUE: added to ours, or in the place of ours
  // Handed over in this order: no `ours` may be an earlier `its`. What is not named is inherited unless it
  // is closed at exec.
  std::vector<Descriptor> descriptors;
  bool own_session = false;  // away from our terminal: neither its Ctrl-C nor its end reaches the child
};

// Move-only. The destructor kills the program if it still runs.
class Child {
 public:
  // Errors: not_found when there is no such program, os_failure.
  [[nodiscard]] static Result<Child> start(const ChildOptions& options);
  Child(Child&& other) noexcept;
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

  void send(int signal) noexcept;
  // From now on the program goes on without us.
  void let_go() noexcept { pid_ = -1; }

 private:
  Child(pid_t pid, UniqueFd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

  pid_t pid_;  // -1: not ours any more
  UniqueFd pidfd_;
  int status_ = 0;
  std::optional<std::string> end_;
};

// Where this program lies: the others that were built with it lie beside it.
[[nodiscard]] std::string path_of_sibling(const std::string& program);

}  // namespace cowmgr::knn
