// A directory for locks, and the proof that a lock has one holder at a time.
#pragma once

#include <fcntl.h>
#include <filesystem>
#include <string>
#include <unistd.h>

#include <gtest/gtest.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

class LockTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "/cowmgr-lock-XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // Takes the lock `wanted` times, with `acquire`; each time, nobody else may be in the same place.
  template <class Acquire>
  [[nodiscard]] std::string take_turns(int wanted, const Acquire& acquire) const {
    const std::string inside = directory_ + "/inside";
    for (int taken = 0; taken < wanted;) {
      const auto lock = acquire();
      if (!lock && lock.error().code == Errc::busy) continue;
      if (!lock) return lock.error().message;
      ++taken;
      const UniqueFd alone(::open(inside.c_str(), O_CREAT | O_EXCL | O_CLOEXEC, 0600));
      if (!alone) return "two holders";
      ::unlink(inside.c_str());
    }
    return "one holder at a time";
  }

  std::string directory_;
};

}  // namespace cowmgr
