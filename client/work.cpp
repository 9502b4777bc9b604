// ResultSet::work(): slot after slot, as many at once as it pays.
#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "client/handles.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr {
namespace {

constexpr std::uint32_t kMostAtOnce = 64;                      // slots that work() takes at once
constexpr auto kBatchTime = std::chrono::milliseconds(1);      // that they may take together
constexpr std::size_t kMaxBatchBytes = std::size_t{48} << 10;  // of values, before they are committed early
constexpr std::size_t kMaxCommit = 512;    // slots at once: earlier daemons cannot tell of more refusals
constexpr std::uint32_t kMostLosses = 10;  // attempts of a slot that may lose their daemon

using Batch = detail::ResultSetImpl::Batch;

Result<void> call(const ResultSet::Task& task, Slot& slot) {
  try {
    return task(slot);
  } catch (const std::exception& error) {
    return fail(Errc::slot_failed, error.what());
  } catch (...) {
    return fail(Errc::slot_failed, "the task threw something that is no std::exception");
  }
}

// Whether a task that ended with `error` has not failed: the daemon that it needed went away.
bool may_be_tried_again(const Error& error, const Slot& slot) {
  return error.code == Errc::disconnected && slot.attempt() < kMostLosses;
}

// Slots that were not taken although they are still held, as when their memory cannot be sealed.
void fail_refused(detail::Slots& done, const detail::ResultSetImpl::Committed& committed) {
  for (const auto& refusal : committed.refused) {
    const auto at = std::find_if(done.begin(), done.end(),
                                 [&](const auto& slot) { return slot->index() == refusal.slot; });
    if (at != done.end() && (*at)->check_usable())
      (void)(*at)->set()->fail(**at, refusal.error.message, Retry::allowed);
  }
}

// How many slots to take at once, from how long the last ones took.
class BatchSize {
 public:
  explicit BatchSize(const WorkOptions& options) : fixed_(options.batch) {}
  [[nodiscard]] Batch next() const {
    return {.count = fixed_ > 0 ? fixed_ : count_, .is_shared = fixed_ == 0};
  }
  void learn(std::size_t slots, std::chrono::nanoseconds took) {
    const auto each = std::max<std::int64_t>(took.count() / static_cast<std::int64_t>(slots), 1);
    const auto fitting =
        std::min<std::int64_t>(std::chrono::nanoseconds(kBatchTime).count() / each, kMostAtOnce);
    count_ = std::clamp<std::uint32_t>(static_cast<std::uint32_t>(fitting), 1, count_ * 2);
  }

 private:
  std::uint32_t fixed_;
  std::uint32_t count_ = 1;
};

}  // namespace

// One call of work().
class ResultSet::Work {
 public:
  Work(std::shared_ptr<detail::ResultSetImpl> set, const Task& task, const WorkOptions& options)
      : set_(std::move(set)), task_(task), options_(options), size_(options) {}

  Result<std::uint64_t> run() {
    auto todo = lease();
    while (todo && !todo->empty()) {
      const auto start = std::chrono::steady_clock::now();
      for (auto& slot : *todo) {
        if (auto ok = work_on(std::move(slot)); !ok) return error_of(std::move(ok));
      }
      size_.learn(todo->size(), std::chrono::steady_clock::now() - start);
      todo = commit(size_.next());
      if (todo && todo->empty()) todo = lease();
    }
    if (!todo) return error_of(std::move(todo));
    return committed_;
  }

 private:
  // None, when every slot is settled, or others hold all that are left for as long as the wait.
  Result<detail::Slots> lease() {
    auto slots = set_->lease(-1, size_.next(), options_.wait);
    if (!slots && slots.error().code == Errc::timed_out) return detail::Slots();
    return slots;
  }

  // Commits what is done, and leases the next.
  Result<detail::Slots> commit(const Batch& next) {
    auto committed = set_->commit(done_, next);
    if (committed) {
      committed_ += done_.size() - committed->refused.size();
      fail_refused(done_, *committed);
    }
    done_.clear();
    done_bytes_ = 0;
    if (!committed) return error_of(std::move(committed));
    return std::move(committed->next);
  }

  Result<void> work_on(std::unique_ptr<detail::SlotImpl> impl) {
    Slot slot(std::move(impl));
    if (const auto ok = call(task_, slot); !ok) return end_failed(slot, ok.error());
    if (!slot.impl_->check_usable()) return {};  // the task has ended it itself
    const std::size_t bytes = slot.impl_->value().size();
    const bool is_full = done_.size() == kMaxCommit || done_bytes_ + bytes > kMaxBatchBytes;
    if (is_full && !done_.empty()) {
      if (auto ok = commit({.count = 0}); !ok) return error_of(std::move(ok));
    }
    done_bytes_ += bytes;
    done_.push_back(std::move(slot.impl_));
    return {};
  }

  Result<void> end_failed(Slot& slot, const Error& error) const {
    if (!slot.impl_->check_usable()) return {};      // the task has ended it itself
    if (may_be_tried_again(error, slot)) return {};  // the end of its handle gives it back
    auto failed = slot.fail(error.message, options_.retry);
    if (!failed && detail::is_lost(failed.error().code)) return {};  // somebody else has it, or had it
    return failed;
  }

  std::shared_ptr<detail::ResultSetImpl> set_;
  const Task& task_;
  const WorkOptions& options_;
  BatchSize size_;
  detail::Slots done_;  // not committed yet
  std::size_t done_bytes_ = 0;
  std::uint64_t committed_ = 0;
};

Result<std::uint64_t> ResultSet::work(const Task& task, const WorkOptions& options) {
  return Work(impl_, task, options).run();
}

}  // namespace cowmgr
