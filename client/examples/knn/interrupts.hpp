// Ctrl-C, as something to ask for instead of something that happens.
#pragma once

#include <csignal>
#include <initializer_list>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::knn {

// Holds back SIGINT, SIGTERM and SIGHUP while it lives, so that whoever is told to stop can clean up first.
// Its end lets them through: one that came meanwhile then ends the process, as its parent expects. Make it
// before any thread.
class Interrupts {
 public:
  Interrupts();
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;
  ~Interrupts();

  // An error once one of the signals has come.
  [[nodiscard]] Result<void> check() const;

  // Blocks until one of `fds` can be read, or has come to its end. Errors: as check().
  [[nodiscard]] Result<void> wait_for(std::initializer_list<int> fds) const;

 private:
  sigset_t before_{};  // the mask that the destructor brings back
  UniqueFd fd_;        // readable while a signal is pending; never read, so that it stays pending
};

}  // namespace cowmgr::knn
