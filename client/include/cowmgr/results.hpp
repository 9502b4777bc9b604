// Result sets: N slots with one name, which workers lease, fill and commit.
//
// A dense set is one output array, whose rows are split over the slots as numpy.array_split does; done, it is
// an ordinary array. A ragged set has a result of any size in each slot: an array of its own, named
// "SET/SLOT", or a value of up to 64 KiB, which lies in a segment of the set that every process reads without
// asking.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cowmgr/array.hpp"
#include "cowmgr/info.hpp"
#include "cowmgr/slots.hpp"

namespace cowmgr {

namespace detail {
class ResultSetImpl;
class SlotImpl;
}  // namespace detail

// Whether a slot that failed may be tried again, where its set allows more attempts.
enum class Retry : std::uint8_t { allowed, never };

// One leased slot, which this process alone may fill. Move-only. Destroying a slot that was neither committed
// nor failed gives it back: another worker gets it, attempt + 1. The death of the process does the same, and
// so does the end of the lease, if the set has one. A slot is used by one thread at a time; several slots of
// one set may be held by several threads.
class Slot {
 public:
  Slot(Slot&&) noexcept;
  Slot& operator=(Slot&&) noexcept;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot();

  [[nodiscard]] std::uint64_t index() const noexcept;
  [[nodiscard]] std::uint32_t attempt() const noexcept;  // 1 for the first worker that gets this slot

  // ---- Of a dense set ----

  // Rows of the output array; none in a ragged set.
  [[nodiscard]] Rows rows() const noexcept;
  // The memory of rows(), to fill; it may hold what an earlier attempt left. Of a ragged set: of the array
  // that was allocated, zeroed. Valid until commit or fail.
  [[nodiscard]] std::span<std::byte> bytes() const noexcept;
  template <Scalar T>
  [[nodiscard]] Result<std::span<T>> as() const {
    return detail::items_of<T>(dtype(), bytes());
  }
  [[nodiscard]] const Dtype& dtype() const noexcept;

  // ---- Of a ragged set: one of these, or neither, which commits an empty value ----

  // Makes room for an array, to be filled through bytes() or as(). Replaces what was allocated before.
  // Errors: as Client::create; invalid_argument for a dense set.
  [[nodiscard]] Result<void> allocate(const ArraySpec& spec);
  // Copies a value, which goes to the daemon with the commit. Errors: invalid_argument for more than
  // kMaxValueBytes, or a dense set.
  [[nodiscard]] Result<void> set_value(std::span<const std::byte> value);

  // ---- The end ----

  // Says that the slot is filled; it is spent, whatever the answer. Errors: already_committed, not_holder
  // when the lease ended before, still_writable when another process can write to an allocated array,
  // cancelled, not_found when the set is gone.
  [[nodiscard]] Result<void> commit();

  // Commits, and leases any next slot in the same round trip; waits like ResultSet::lease when none is free.
  // Empty when no slot is left to do. Timed out because the daemon does not answer, the slot may be committed
  // or not.
  [[nodiscard]] Result<std::optional<Slot>> commit_and_lease(Milliseconds wait = kForever);

  // Gives the slot up, with the reason (of which 4 KiB count): for good, unless the set allows more attempts
  // and another one may help. The slot is spent.
  [[nodiscard]] Result<void> fail(NameRef message, Retry retry = Retry::allowed);

 private:
  friend class ResultSet;
  explicit Slot(std::unique_ptr<detail::SlotImpl> impl) noexcept;

  std::unique_ptr<detail::SlotImpl> impl_;
};

// What the set's segment says of a slot, at one moment. What it holds stands there once it is committed or
// failed, and does not change from then on.
struct SlotInfo {
  std::uint64_t index = 0;
  SlotState state{};
  SlotContent content{};         // none, until it is committed or failed
  std::uint32_t attempt = 0;     // of the last lease; 0: never leased
  std::uint64_t session = 0;     // that holds it; see Client::clients()
  SystemTime since;              // of the state; the epoch: never leased
  std::uint64_t size_bytes = 0;  // of the value, or of the array's data
  std::uint64_t array_id = 0;    // content: array
  std::string reason{};          // state: failed
};

// How work() goes about it.
struct WorkOptions {
  // Slots in one lease; up to 512 go in one commit. 0: the library chooses: few when a slot takes long or few
  // are left, so that no worker sits on what others could do; up to 64.
  std::uint32_t batch = 0;
  // Whether a slot whose task failed may be tried again, where the set allows more attempts.
  Retry retry = Retry::allowed;
  // How long to wait for slots that others hold, and may give back.
  Milliseconds wait = kForever;
};

// A handle to a result set. Copies are handles to the same set. Thread-safe. A forked child may go on using
// it: it has its parent's view of the set, and a session of its own.
class ResultSet {
 public:
  [[nodiscard]] const std::string& name() const noexcept;
  [[nodiscard]] bool is_ragged() const noexcept;
  [[nodiscard]] const ArraySpec& spec() const noexcept;  // of a dense set
  [[nodiscard]] std::uint64_t slots() const noexcept;
  // How long a worker may take for a slot; 0: for ever.
  [[nodiscard]] Milliseconds lease_limit() const noexcept;
  // What the maker of the set says to its workers. Valid while this handle or a copy of it lives.
  [[nodiscard]] std::span<const std::byte> job() const noexcept;

  // ---- For workers ----

  // Leases any free slot, lowest index first; when others hold all that are left, waits up to `wait` for one
  // to come back; who waits longest is served first. Empty when every slot is settled: there is nothing left
  // to do. Errors: timed_out, cancelled, not_found when the set is gone, permission_denied.
  [[nodiscard]] Result<std::optional<Slot>> lease(Milliseconds wait = kForever);
  // Up to `count` slots (at most 4096) in one round trip, at least one; none when every slot is settled.
  [[nodiscard]] Result<std::vector<Slot>> lease_batch(std::uint32_t count, Milliseconds wait = kForever);
  // Leases the slot `index`, without waiting. Errors: busy while another session holds it,
  // already_committed, slot_failed, not_found, cancelled.
  [[nodiscard]] Result<Slot> lease_slot(std::uint64_t index);

  // Calls `task` for slot after slot, in this thread, until none is left, and commits them in batches. A task
  // that returns an error, or throws, fails its slot with that message; one that returns `disconnected` gives
  // it back instead, to be tried again, unless that was the slot's tenth attempt. Returns how many were
  // committed. A slot whose lease ended meanwhile is passed over: somebody else has it. Errors: as lease(),
  // but for timed_out.
  using Task = std::function<Result<void>(Slot&)>;
  [[nodiscard]] Result<std::uint64_t> work(const Task& task, const WorkOptions& options = {});

  // ---- For who waits ----

  // State and counts now.
  [[nodiscard]] Result<ResultsInfo> info() const;

  // Waits until every slot is settled; a dense set is sealed by then. `progress`, if given, is called in this
  // thread when something changed, at most twenty times a second. Errors: timed_out (the message names who
  // still holds what), slot_failed with the first reason, cancelled, still_writable when a process keeps a
  // writable mapping of a dense set, not_found when the set is gone.
  using OnProgress = std::function<void(const ResultsInfo&)>;
  [[nodiscard]] Result<void> wait_settled(Milliseconds wait = kForever, const OnProgress& progress = {});
  // Of a dense set: waits as above, and attaches the output: an ordinary array under the set's name, its rows
  // in order. Errors: invalid_argument for a ragged set.
  [[nodiscard]] Result<Array> wait(Milliseconds wait = kForever, const OnProgress& progress = {});
  // The slot that was settled as the `rank`th, from 0; waits until it is. Empty when the set ended with
  // fewer, as a cancelled one does. Errors: timed_out, not_found when the set is gone.
  [[nodiscard]] Result<std::optional<std::uint64_t>> settled_at(std::uint64_t rank,
                                                                Milliseconds wait = kForever) const;
  // Waits until slot `index` is settled. Errors: as settled_at(), cancelled.
  [[nodiscard]] Result<SlotInfo> wait_slot(std::uint64_t index, Milliseconds wait = kForever) const;

  // ---- Reading a slot: no round trip, but for arrays ----

  // Errors: not_found for an index that the set does not have, here and below.
  [[nodiscard]] Result<SlotInfo> slot(std::uint64_t index) const;
  // The value of a committed slot. Valid while this handle or a copy of it lives. Errors: not_found when the
  // slot holds no value (yet), slot_failed with the reason.
  [[nodiscard]] Result<std::span<const std::byte>> value(std::uint64_t index) const;
  // The array of a committed slot of a ragged set. Errors: as value(), and as Client::attach.
  [[nodiscard]] Result<Array> array(std::uint64_t index) const;
  // Those of many slots, 64 in a round trip.
  [[nodiscard]] Result<std::vector<Array>> arrays(std::span<const std::uint64_t> indexes) const;
  [[nodiscard]] Result<std::vector<Array>> arrays(std::initializer_list<std::uint64_t> indexes) const {
    return arrays(std::span(indexes.begin(), indexes.size()));
  }

  // Ends a set that runs: workers learn it at their next call, what it holds is freed. One that has ended
  // already is forgotten, with what its slots hold; the array of a dense set that is done stays. Errors:
  // permission_denied, not_found.
  [[nodiscard]] Result<void> cancel() const;
  // The same, and forgets it at once: whoever still asks for it is told not_found.
  [[nodiscard]] Result<void> forget() const;

 private:
  friend class Client;
  class Work;
  [[nodiscard]] Result<void> check_index(std::uint64_t index) const;
  explicit ResultSet(std::shared_ptr<detail::ResultSetImpl> impl) noexcept : impl_(std::move(impl)) {}

  std::shared_ptr<detail::ResultSetImpl> impl_;
};

}  // namespace cowmgr
