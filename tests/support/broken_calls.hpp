// A daemon whose n-th system call on shared memory fails: what its test and it tell each other.
//
// The program `cowmgr-broken` is the daemon's own code; the linker puts functions of broken_calls.cpp between
// it and the system calls. Those on segments, and on the directory that holds them, are counted; one of them
// is not made, but fails. Which one, the test says at any time, in a page that both have mapped.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::test {

// The number of the descriptor that holds the page; without it no call fails.
inline constexpr const char* kBreakVariable = "COWMGR_BREAK_FD";

// With this the daemon runs as on a kernel that lets nobody refuse descriptors (Linux before 6.16), which is
// no fault of any call.
inline constexpr const char* kPassesRightsVariable = "COWMGR_PASSES_RIGHTS";

// Written by one side while the other one waits for it, but for the counter.
struct BreakPage {
  std::atomic<std::uint64_t> calls;        // since the test set it to 0
  std::atomic<std::uint64_t> broken_call;  // the one that fails, from 1; 0: none
  std::atomic<int> error;                  // what errno is then
  // Whether all of its kind fail from then on; but for shm_unlink, without which nothing can be removed.
  std::atomic<bool> lasts;
  std::atomic<bool> has_failed;   // it came to that call
  std::array<char, 40> name;      // of that call
  std::array<char, 64> segments;  // what the names of the daemon's segments begin with
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "two processes share it");

// The test's side of it.
class BrokenCall {
 public:
  // Of a daemon of `instance`.
  explicit BrokenCall(std::string_view instance)
      : fd_(::memfd_create("broken calls", 0)) {  // not closed in the daemon, which inherits it
    COWMGR_ASSERT(fd_ && ::ftruncate(fd_.get(), sizeof(BreakPage)) == 0);
    void* page = ::mmap(nullptr, sizeof(BreakPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    COWMGR_ASSERT(page != MAP_FAILED);
    page_ = static_cast<BreakPage*>(page);  // zeros are what it begins with
    const std::string segments = fmt::format("/cowmgr.{}.", instance);
    COWMGR_ASSERT(segments.size() < page_->segments.size());
    std::copy(segments.begin(), segments.end(), page_->segments.begin());
  }
  ~BrokenCall() { ::munmap(page_, sizeof(BreakPage)); }
  BrokenCall(const BrokenCall&) = delete;
  BrokenCall& operator=(const BrokenCall&) = delete;

  // For the environment of the daemon.
  [[nodiscard]] std::string variable() const { return fmt::format("{}={}", kBreakVariable, fd_.get()); }

  // From now on the `call`th call fails with `error`, once, or it and all of its kind.
  void expect(std::uint64_t call, int error, bool lasts = false) {
    mend();
    page_->calls = 0;
    page_->error = error;
    page_->lasts = lasts;
    page_->has_failed = false;
    page_->broken_call = call;
  }
  // No call fails any more.
  void mend() { page_->broken_call = 0; }

  [[nodiscard]] bool has_failed() const { return page_->has_failed; }
  // Of the call that failed: "fcntl(F_SETLEASE)".
  [[nodiscard]] std::string name() const { return has_failed() ? page_->name.data() : ""; }

 private:
  UniqueFd fd_;
  BreakPage* page_ = nullptr;
};

}  // namespace cowmgr::test
