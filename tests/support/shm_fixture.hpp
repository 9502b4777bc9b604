// A test's own corner of shared memory, and the check that the test leaves nothing of it behind.
#pragma once

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <fcntl.h>
#include <filesystem>
#include <string>
#include <sys/types.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/npy.hpp"
#include "proto/segment.hpp"

namespace cowmgr {

inline int test_lease_signal() noexcept {
  return SIGRTMIN +
         1;  // as the daemon does, one of the real-time signals: they queue, and tell the descriptor
}

// "unit-<pid>-<counter>": two runs at a time do not meet.
inline std::string unique_instance() {
  static std::atomic<int> counter{0};
  return fmt::format("unit-{}-{}", ::getpid(), ++counter);
}

// The names in /dev/shm that belong to `instance`.
inline std::vector<std::string> names_of(const std::string& instance) {
  const std::string prefix = fmt::format("cowmgr.{}.", instance);
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename();
    if (name.compare(0, prefix.size(), prefix) == 0) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

// What this process has open, as "3 -> /dev/null": a leak shows what it is.
inline std::vector<std::string> open_files() {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code ignored;  // the directory's own descriptor is gone by the time that one looks
    files.push_back(fmt::format("{} -> {}", entry.path().filename().string(),
                                std::filesystem::read_symlink(entry.path(), ignored).string()));
  }
  std::sort(files.begin(), files.end());
  return files;
}

inline std::string shm_path(const std::string& segment_name) {
  return "/dev/shm" + segment_name;
}

// `count` opaque bytes.
inline ArraySpec bytes_spec(std::uint64_t count) {
  return {Dtype::of<std::uint8_t>(), {count}, Order::c};
}

// Whoever derives from it and holds segments lets them go in TearDown() before it calls this one's.
class ShmTest : public testing::Test {
 protected:
  ShmTest() : instance_(unique_instance()) {
    sigset_t set;
    ::sigemptyset(&set);
    ::sigaddset(&set, test_lease_signal());
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    files_before_ = open_files();
  }

  void TearDown() override {
    EXPECT_THAT(names_of(instance_), testing::IsEmpty());
    EXPECT_EQ(open_files(), files_before_);
  }

  // The name of the segment with that id, in /dev/shm.
  [[nodiscard]] bool has_name(std::uint64_t id) const {
    return std::filesystem::exists(shm_path(segment_name(instance_, id)));
  }

  const std::string instance_;

 private:
  std::vector<std::string> files_before_;
};

}  // namespace cowmgr
