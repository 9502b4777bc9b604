// Gives back what was taken for something that is still in the making, when it goes out of scope, unless that
// came about: however its coroutine ends, by a refusal or an exception.
#pragma once

#include <exception>
#include <utility>

#include <spdlog/spdlog.h>

namespace cowmgr {

template <class Work>
class Undo {
 public:
  explicit Undo(Work work) : work_(std::move(work)) {}
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;
  ~Undo() {
    if (is_kept_) return;
    try {
      work_();
    } catch (const std::exception& error) {
      spdlog::error("something cannot be given back: {}", error.what());  // for want of memory alone
    }
  }
  void keep() noexcept { is_kept_ = true; }

 private:
  Work work_;
  bool is_kept_ = false;
};

}  // namespace cowmgr
