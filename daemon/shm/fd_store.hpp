// Descriptors of sealed arrays in the service manager's store: what is there outlives the daemon although its
// file was removed (sd_notify(3), FDSTORE=1; the unit says how many with FileDescriptorStoreMax=). Each is
// named as its file.
//
// Off unless asked for, and then of no effect where no service manager listens. What it holds is memory that
// stays: an array that is gone is taken out again.
#pragma once

#include <atomic>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "proto/unique_fd.hpp"

namespace cowmgr {

class FdStore {
 public:
  FdStore(std::string instance, bool is_on) : instance_(std::move(instance)), is_on_(is_on) {}

  struct Kept {
    std::uint64_t id = 0;
    UniqueFd fd;
  };
  // What the service manager hands back at the start, of this instance (sd_listen_fds(3)). To be called once.
  [[nodiscard]] std::vector<Kept> take_kept();

  // None of these blocks: what they ask for is a change that take_changes() hands out.
  // The store has a descriptor of what is served as `id` already.
  void note_kept(std::uint64_t id);
  // It shall have one of `fd`'s file, instead of any other of that id. Nothing the first time after
  // note_kept().
  void keep(std::uint64_t id, int fd);
  // It shall have none.
  void forget(std::uint64_t id);
  void forget_all();

  struct Change {
    std::uint64_t id = 0;
    UniqueFd fd;  // none: to be taken out
  };
  [[nodiscard]] bool has_changes() const noexcept { return !changes_.empty(); }
  [[nodiscard]] std::vector<Change> take_changes() { return std::exchange(changes_, {}); }
  // Tells the service manager of them, in their order. Blocks while that does not read. For any thread, but
  // not for two at once: the order counts.
  void tell(const std::vector<Change>& changes) const;

 private:
  const std::string instance_;
  const bool is_on_;
  std::set<std::uint64_t> known_;   // note_kept(), and not asked for yet
  std::set<std::uint64_t> stored_;  // once all changes are made
  std::vector<Change> changes_;
  bool has_run_out_ = false;                     // of descriptors; said once, until there are some again
  mutable std::atomic<bool> has_failed_{false};  // once is enough to say so
};

}  // namespace cowmgr
