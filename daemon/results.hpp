// Result sets: who holds which slot, what is committed, and when the set can be sealed.
//
// Synchronous, single-threaded; the memory and its sealing are the store's.
//
// Invariants of a slot: free -> leased -> committed or failed, both final; leased -> free with attempt + 1
// when its holder gives it back or goes. A set's output array is sealed when all slots are committed and no
// session has it mapped for writing.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/peer.hpp"
#include "daemon/store.hpp"
#include "proto/errors.hpp"

namespace cowmgr {

using SlotIndex = std::uint64_t;

// The slots of one set.
class SlotTable {
 public:
  SlotTable(std::uint64_t rows, std::uint64_t slots);

  struct Lease {
    SlotIndex slot = 0;
    std::uint32_t attempt = 0;  // 1 for the first
    std::uint64_t begin = 0;    // rows [begin, end)
    std::uint64_t end = 0;
  };
  // The free slot with the lowest index, or none.
  [[nodiscard]] std::optional<Lease> lease_any(SessionId session);
  // Errors: not_found, busy, already_committed, slot_failed.
  [[nodiscard]] Result<Lease> lease(SessionId session, SlotIndex slot);
  // Errors of these three: not_found, not_holder, already_committed, slot_failed.
  [[nodiscard]] Result<void> commit(SessionId session, SlotIndex slot);
  [[nodiscard]] Result<void> fail(SessionId session, SlotIndex slot);
  [[nodiscard]] Result<void> give_back(SessionId session, SlotIndex slot);
  // The session went: its slots are free again. Returns how many.
  std::size_t give_back_all(SessionId session);

  [[nodiscard]] std::uint64_t size() const noexcept { return slots_.size(); }
  [[nodiscard]] std::uint64_t free() const noexcept { return free_.size(); }
  [[nodiscard]] std::uint64_t leased() const noexcept { return size() - free() - committed_ - failed_; }
  [[nodiscard]] std::uint64_t committed() const noexcept { return committed_; }
  [[nodiscard]] std::uint64_t failed() const noexcept { return failed_; }
  [[nodiscard]] bool is_settled() const noexcept { return committed_ + failed_ == size(); }
  [[nodiscard]] std::uint32_t leases_of(SessionId session) const;

 private:
  enum class State : std::uint8_t { free, leased, committed, failed };
  struct Slot {
    State state = State::free;
    std::uint32_t attempt = 0;
    SessionId holder = 0;
  };
  [[nodiscard]] Lease take(SessionId session, SlotIndex slot);
  [[nodiscard]] Result<void> check_holder(SessionId session, SlotIndex slot) const;
  void settle(SlotIndex slot, State state);

  std::uint64_t rows_;
  std::vector<Slot> slots_;
  std::set<SlotIndex> free_;
  std::unordered_map<SessionId, std::set<SlotIndex>> holders_;
  std::uint64_t committed_ = 0;
  std::uint64_t failed_ = 0;
};

struct ResultSetRecord {
  enum class State : std::uint8_t { running, sealing, done, failed };

  ArrayId id = 0;  // of the set, and of the array that it becomes
  std::string name;
  ArraySpec spec;
  std::uint64_t data_bytes = 0;
  Ownership owner;
  SessionId session = 0;  // that made it: the set goes with it
  pid_t owner_pid = 0;
  Time created{};
  State state = State::running;
  std::uint64_t revision = 1;
  std::string message{};
  SlotTable table;
  std::set<SessionId> mapped{};  // sessions that may have a writable mapping
};

inline constexpr std::uint64_t kMaxSlots = std::uint64_t{1} << 24;  // of one set: 16 bytes each

class ResultSets {
 public:
  ResultSets(Store& store, uid_t admin) : store_(store), admin_(admin) {}

  // Checks what concerns slots, before the store reserves memory. Errors: invalid_shape, invalid_argument.
  [[nodiscard]] static Result<void> check(const ArraySpec& spec, std::uint64_t slots);
  // Adds the set whose output array is `array`, being written by `session`.
  const ResultSetRecord& add(SessionId session, const ArrayRecord& array, std::uint64_t slots);
  // The running set of that name, or the newest that is done. Errors: not_found, permission_denied.
  [[nodiscard]] Result<const ResultSetRecord*> open(SessionId session, std::string_view name) const;
  // Errors: not_found, permission_denied.
  [[nodiscard]] Result<ResultSetRecord*> find(SessionId session, ArrayId set);
  [[nodiscard]] std::vector<const ResultSetRecord*> list(SessionId session, std::string_view pattern,
                                                         ArrayId after, std::size_t limit) const;
  [[nodiscard]] std::size_t size() const noexcept { return sets_.size(); }
  // Whether the array is a set's: only the set may seal or abort it.
  [[nodiscard]] bool contains(ArrayId array) const { return sets_.find(array) != sets_.end(); }
  [[nodiscard]] std::uint32_t leases_of(SessionId session) const;

  // A lease of `slot`, or of any free one; none when nothing is free. The session counts as having the set
  // mapped for writing from then on. Errors: as SlotTable::lease.
  [[nodiscard]] Result<std::optional<SlotTable::Lease>> lease(SessionId session, ResultSetRecord& set,
                                                              std::optional<SlotIndex> slot);
  // The end of a lease: committed, failed with a reason, or given back. Errors: as SlotTable's.
  [[nodiscard]] Result<void> commit(SessionId session, ResultSetRecord& set, SlotIndex slot);
  [[nodiscard]] Result<void> fail(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                  std::string_view reason);
  [[nodiscard]] Result<void> give_back(SessionId session, ResultSetRecord& set, SlotIndex slot);
  // The session has no writable mapping of the set any more.
  void unmapped(SessionId session, ArrayId set);
  // Gives back what the session held, and removes the sets that it made.
  void close_session(SessionId session);

  // Finishes the sets whose slots are all settled. Returns those that the kernel does not let us seal yet,
  // although no session says that it still maps them: to be tried again soon.
  [[nodiscard]] std::vector<ArrayId> finish_settled(Time now);
  // Why a set cannot be sealed, for its waiters to read.
  void explain(ArrayId set, std::string message);

  [[nodiscard]] std::vector<ArrayId> take_changed() { return std::exchange(changed_, {}); }

 private:
  [[nodiscard]] bool may(SessionId session, const ResultSetRecord& set, Right right) const;
  [[nodiscard]] bool finish(ResultSetRecord& set, Time now);
  void touch(ResultSetRecord& set);
  void end(ResultSetRecord& set, ResultSetRecord::State state, std::string message);

  Store& store_;
  uid_t admin_;
  std::map<ArrayId, ResultSetRecord> sets_;
  std::set<ArrayId> settled_;  // all slots settled, not finished yet
  std::vector<ArrayId> changed_;
};

}  // namespace cowmgr
