// The slots of one result set: who holds which, how often each was tried, in which order they were settled.
//
// The state lies in the set's own segment (proto/result_segment.hpp), which clients read without asking.
// Beside it are only indexes that can be made again from it, and what concerns a lease under way.
//
// A slot is free -> leased -> committed or failed, both final. A lease that is lost (its holder died, took
// too long, or gave up) makes the slot free again, or failed when its attempts are used up.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/store/peer.hpp"
#include "daemon/store/time.hpp"
#include "proto/errors.hpp"
#include "proto/result_segment.hpp"

namespace cowmgr {

using SlotIndex = std::uint64_t;

struct SlotLimits {
  std::uint32_t attempts = 0;          // a slot whose lease was lost so often has failed; 0: no limit
  std::chrono::milliseconds lease{0};  // a lease ends after that; 0: never
};

class SlotTable {
 public:
  // `memory`: writable, of a result segment of `slots` slots, whose header is written and whose bytes up to
  // `backed_bytes` may be touched. Borrowed. For a new one, all of whose slots are free, or adopt() follows.
  SlotTable(std::byte* memory, std::uint64_t slots, std::uint64_t backed_bytes, const SlotLimits& limits);
  // Takes over what an earlier daemon wrote, whichever store was its last. The time of leases begins again.
  // Errors: corrupted, when the slots contradict each other as no daemon leaves them.
  [[nodiscard]] Result<void> adopt(Tick now);

  struct Lease {
    SlotIndex slot = 0;
    std::uint32_t attempt = 0;  // 1 for the first
  };
  // The free slot with the lowest index, or none.
  [[nodiscard]] std::optional<Lease> lease_any(SessionId session, const Moment& now);
  // Whether that slot may have killed who held it, and must not take others down with it: attempts are
  // limited, and it was leased before, or has but one.
  [[nodiscard]] bool is_next_to_go_alone() const noexcept {
    return limits_.attempts == 1 || (limits_.attempts > 1 && !returned_.empty());
  }
  // Errors: not_found, busy, already_committed, slot_failed.
  [[nodiscard]] Result<Lease> lease(SessionId session, SlotIndex slot, const Moment& now);

  // Whether `session` holds `slot`. Errors: not_found, not_holder, already_committed, slot_failed; those of
  // the ends below too.
  [[nodiscard]] Result<void> check_holder(SessionId session, SlotIndex slot) const;
  // The same, and that it is still lease `attempt` (0: whichever): the slot may have come back to this
  // session.
  [[nodiscard]] Result<void> check_holder(SessionId session, SlotIndex slot, std::uint32_t attempt) const;
  // The same, without a reason.
  [[nodiscard]] bool is_held(SessionId session, SlotIndex slot, std::uint32_t attempt) const noexcept;
  // Whether that lease of the slot ended with its commit. No other worker was ever told of that attempt.
  [[nodiscard]] bool was_committed(SlotIndex slot, std::uint32_t attempt) const noexcept;
  // Notes which array the holder of `slot` is writing; 0: none any more.
  void note_array(SlotIndex slot, std::uint64_t id);
  // What was noted of a leased slot, by this daemon or an earlier one; 0: nothing.
  [[nodiscard]] std::uint64_t noted_array(SlotIndex slot) const noexcept;
  // From here on the lease does not run out: its holder was in time, and the daemon is at work.
  void hold(SlotIndex slot) { forget_deadline(slot); }
  // The daemon is done, and the slot is still leased: its time begins again.
  void resume(SlotIndex slot, Tick now);
  // The set is over: all leases end. Only the counts may be asked for afterwards; the memory may go.
  void abandon();
  // The rows are filled; or the array `id` of `size_bytes` bytes is sealed.
  [[nodiscard]] Result<void> commit_rows(SessionId session, SlotIndex slot, Time now);
  [[nodiscard]] Result<void> commit_array(SessionId session, SlotIndex slot, std::uint64_t id,
                                          std::uint64_t size_bytes, Time now);
  // `value` is copied; room_bytes() must suffice.
  [[nodiscard]] Result<void> commit_value(SessionId session, SlotIndex slot, std::span<const std::byte> value,
                                          Time now);
  // The holder's word that it cannot be done. Whether the slot failed for good: at once if `is_final` or with
  // no limit of attempts, else at the last.
  [[nodiscard]] Result<bool> fail(SessionId session, SlotIndex slot, std::string_view reason, bool is_final,
                                  Time now);
  // Back without having been tried.
  [[nodiscard]] Result<void> give_back(SessionId session, SlotIndex slot, Time now);

  // Leases that were lost, and the slots among them that failed for good.
  struct Lost {
    std::vector<SlotIndex> slots;
    std::optional<SlotIndex> first_failed;
  };
  // What `session` holds.
  [[nodiscard]] std::vector<SlotIndex> held_by(SessionId session) const;
  // Who holds something.
  [[nodiscard]] std::vector<SessionId> holders() const;
  // The session went.
  Lost lose_all(SessionId session, std::string_view reason, Time now);
  // The leases whose time is over.
  Lost expire(const Moment& now);
  [[nodiscard]] std::optional<Tick> next_deadline() const;

  [[nodiscard]] std::uint64_t size() const noexcept { return slots_; }
  [[nodiscard]] std::uint64_t free() const noexcept { return slots_ - leased_ - committed_ - failed_; }
  [[nodiscard]] std::uint64_t leased() const noexcept { return leased_; }
  [[nodiscard]] std::uint64_t committed() const noexcept { return committed_; }
  [[nodiscard]] std::uint64_t failed() const noexcept { return failed_; }
  [[nodiscard]] std::uint64_t settled() const noexcept { return committed_ + failed_; }
  [[nodiscard]] bool is_settled() const noexcept { return settled() == slots_; }
  [[nodiscard]] std::uint32_t leases_of(SessionId session) const;
  [[nodiscard]] SlotSnapshot slot(SlotIndex slot) const noexcept;
  // The failed slot that was settled first, or none, and its reason.
  [[nodiscard]] std::optional<std::pair<SlotIndex, std::string>> first_failed() const;

  // Bytes of values that the segment can still take, and what it gained when it was made longer.
  [[nodiscard]] std::uint64_t room_bytes() const noexcept { return backed_bytes_ - used_bytes_; }
  [[nodiscard]] std::uint64_t backed_bytes() const noexcept { return backed_bytes_; }
  [[nodiscard]] std::uint64_t max_bytes() const noexcept { return max_bytes_; }
  void extend(std::uint64_t backed_bytes) noexcept { backed_bytes_ = backed_bytes; }
  [[nodiscard]] std::uint64_t value_bytes() const noexcept { return used_bytes_ - values_offset_; }

 private:
  [[nodiscard]] SlotEntry& entry(SlotIndex slot) const noexcept;
  [[nodiscard]] SlotState state(SlotIndex slot) const noexcept;
  void write(SlotIndex slot, SlotState state, SlotContent content, std::uint32_t attempt, Time now) noexcept;
  [[nodiscard]] tl::unexpected<Error> not_leased(SlotIndex slot) const;
  [[nodiscard]] Lease take(SessionId session, SlotIndex slot, const Moment& now);
  void let_go(SessionId session, SlotIndex slot);
  void settle(SessionId session, SlotIndex slot, SlotState state, SlotContent content, Time now);
  void store(SlotIndex slot, std::span<const std::byte> bytes);
  void make_free(SlotIndex slot, Time now);
  [[nodiscard]] bool is_whole(SlotIndex slot) const noexcept;
  void adopt_order();
  void fail_for_good(SessionId session, SlotIndex slot, std::string_view reason, Time now);
  void lose(SessionId session, SlotIndex slot, std::string_view reason, Time now, Lost& lost);
  void forget_deadline(SlotIndex slot);

  std::byte* memory_;
  std::uint64_t slots_;
  SlotLimits limits_;
  std::uint64_t order_offset_;
  std::uint64_t values_offset_;
  std::uint64_t max_bytes_;
  std::uint64_t used_bytes_;
  std::uint64_t backed_bytes_;

  // Free are: all of returned_, and the free ones from next_ on.
  SlotIndex next_ = 0;
  std::set<SlotIndex> returned_;
  std::unordered_map<SessionId, std::set<SlotIndex>> held_;
  std::map<SlotIndex, Tick> ends_;  // of leases that run out
  std::set<std::pair<Tick, SlotIndex>> deadlines_;
  std::uint64_t leased_ = 0;
  std::uint64_t committed_ = 0;
  std::uint64_t failed_ = 0;
};

}  // namespace cowmgr
