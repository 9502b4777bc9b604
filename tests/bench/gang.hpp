// Processes that stand ready, and all begin at once.
#pragma once

#include <cstdint>
#include <functional>
#include <sys/types.h>
#include <vector>

#include "proto/unique_fd.hpp"

namespace cowmgr::bench {

// Forks processes that each call `prepare` once, and then, upon each run(), what that returned. Ends with
// this object.
class Gang {
 public:
  using Task = std::function<void()>;
  using Prepare = std::function<Task(std::size_t member)>;
  Gang(std::size_t members, const Prepare& prepare);
  ~Gang();
  Gang(const Gang&) = delete;
  Gang& operator=(const Gang&) = delete;

  // Lets all members begin, and returns when all are done.
  void run() const;
  [[nodiscard]] std::size_t size() const noexcept { return members_.size(); }

 private:
  struct Member {
    pid_t pid = -1;
    UniqueFd control;
  };
  std::vector<Member> members_;
};

}  // namespace cowmgr::bench
