// Result sets: N slots with one name, which workers lease, fill in place and commit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cowmgr/array.hpp"
#include "cowmgr/info.hpp"

namespace cowmgr {

namespace detail {
class ResultSetImpl;
class SlotImpl;
}  // namespace detail

// Rows [begin, end) along the first axis.
struct Rows {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  [[nodiscard]] std::uint64_t count() const noexcept { return end - begin; }
  friend bool operator==(const Rows&, const Rows&) = default;
};

// One leased slot: a range of rows of the output array that this process alone may fill. Move-only.
// Destroying a slot that was neither committed nor failed gives it back: another worker gets it, attempt + 1.
// The death of the process does the same. A slot is used by one thread at a time; several slots of one set
// may be held by several threads.
class Slot {
 public:
  Slot(Slot&&) noexcept;
  Slot& operator=(Slot&&) noexcept;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot();

  [[nodiscard]] std::uint64_t index() const noexcept;
  [[nodiscard]] std::uint32_t attempt() const noexcept;  // 1 for the first worker that gets this slot
  [[nodiscard]] Rows rows() const noexcept;

  // The memory of rows(), to fill; it may hold what an earlier attempt left. Valid until commit or fail.
  [[nodiscard]] std::span<std::byte> bytes() const noexcept;
  template <Scalar T>
  [[nodiscard]] Result<std::span<T>> as() const {
    return detail::items_of<T>(dtype(), bytes());
  }
  [[nodiscard]] const Dtype& dtype() const noexcept;

  // Says that the rows are filled; the slot is spent. Errors: already_committed, not_holder, not_found when
  // the set is gone.
  [[nodiscard]] Result<void> commit();

  // Commits, and leases any next slot in the same round trip; waits like ResultSet::lease when none is free.
  // Empty when no slot is left to do.
  [[nodiscard]] Result<std::optional<Slot>> commit_and_lease(Milliseconds wait = kForever);

  // Gives the slot up for good, with the reason; the waiters get it as slot_failed. The slot is spent.
  [[nodiscard]] Result<void> fail(std::string_view message);

 private:
  friend class ResultSet;
  explicit Slot(std::unique_ptr<detail::SlotImpl> impl) noexcept;

  std::unique_ptr<detail::SlotImpl> impl_;
};

// A handle to a dense result set: its slots are row ranges of one output array, split as evenly as
// numpy.array_split does. Copies are handles to the same set. Thread-safe.
class ResultSet {
 public:
  [[nodiscard]] const std::string& name() const noexcept;
  [[nodiscard]] const ArraySpec& spec() const noexcept;
  [[nodiscard]] std::uint64_t slots() const noexcept;

  // Leases any free slot, lowest index first; when others hold all that are left, waits up to `wait` for one
  // to come back. Empty when every slot is settled: there is nothing left to do. Errors: timed_out,
  // not_found when the set is gone, permission_denied.
  [[nodiscard]] Result<std::optional<Slot>> lease(Milliseconds wait = kForever);

  // Leases the slot `index`, without waiting. Errors: busy while another session holds it,
  // already_committed, slot_failed, not_found.
  [[nodiscard]] Result<Slot> lease_slot(std::uint64_t index);

  // State and counts now.
  [[nodiscard]] Result<ResultsInfo> info() const;

  // Waits until every slot is settled and the set is sealed, and attaches it: an ordinary array under the
  // set's name, its rows in order. `progress`, if given, is called in this thread at every change. Errors:
  // timed_out (the message names who still holds what), slot_failed with the worker's message, still_writable
  // when a process keeps a writable mapping, not_found when the set is gone.
  [[nodiscard]] Result<Array> wait(Milliseconds wait = kForever,
                                   const std::function<void(const ResultsInfo&)>& progress = {});

 private:
  friend class Client;
  explicit ResultSet(std::shared_ptr<detail::ResultSetImpl> impl) noexcept : impl_(std::move(impl)) {}

  std::shared_ptr<detail::ResultSetImpl> impl_;
};

}  // namespace cowmgr
