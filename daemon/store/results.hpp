// Result sets: what their workers hold, and when a set is done.
//
// Synchronous, single-threaded; the memory and its sealing are the store's.
//
// A dense set is one output array, sealed when every slot is committed and no worker has it mapped for
// writing. A ragged set has an array or a small value for each slot, and is done when every slot is settled.
// A set goes with the session that made it, unless it is detached; the array of a dense set that is done
// stays.
#pragma once

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
#include "daemon/store/slot_table.hpp"
#include "daemon/store/store.hpp"
#include "proto/errors.hpp"
#include "proto/mapping.hpp"

namespace cowmgr {

inline constexpr std::uint64_t kMaxSlots = std::uint64_t{1}
                                           << 24;  // of one set: 44 bytes of its segment each

// What a set is to be.
struct ResultTerms {
  std::uint64_t slots = 1;
  bool is_ragged = false;
  bool is_detached = false;  // outlives the session that made it
  SlotLimits limits{};
  std::string queue{};           // workers find the set through it; empty: by its name alone
  std::uint64_t token = 0;       // the maker's number of its request
  std::vector<std::byte> job{};  // what the maker says to the workers; in the set's segment
};

// The memory of a set's slots: its own segment, mapped for writing, with its header written.
struct SlotMemory {
  Segment segment{};
  Room room{};
  Mapping mapping{};
};

struct ResultSetRecord {
  enum class State : std::uint8_t { running, sealing, done, failed, cancelled };

  ArrayId id = 0;  // of the set; of a dense one, of the array that it becomes too
  std::string name;
  ResultTerms terms;
  ArraySpec spec{Dtype::of<std::uint8_t>(), {0}};  // of a dense set
  std::uint64_t data_bytes = 0;                    // of a dense set
  std::uint64_t data_offset = kDataOffset;         // of a dense set: in the segment of its array
  Ownership owner;
  SessionId session = 0;  // that made it; 0: it is gone, and the set is detached
  pid_t owner_pid = 0;
  Time created{};
  State state = State::running;
  std::uint64_t revision = 1;
  std::string message{};
  SlotMemory memory{};
  SlotTable table;
  std::set<SessionId> workers{};   // that had a slot; of a dense set: and may have it mapped for writing
  std::uint64_t invited = 0;       // workers that found the set through its queue, and have not asked yet
  std::optional<Tick> deadline{};  // of the lease that ends first
  std::unordered_map<SlotIndex, ArrayId> allocated{};  // arrays that are being written for slots
  bool is_growing = false;                             // its segment, just now

  [[nodiscard]] bool is_open() const noexcept { return state == State::running || state == State::sealing; }
};

class ResultSets {
 public:
  using Lease = SlotTable::Lease;

  ResultSets(Store& store, uid_t admin) : store_(store), admin_(admin) {}

  // ---- Making and finding ----

  // Checks what concerns slots, before memory is taken. Errors: invalid_shape, invalid_argument,
  // invalid_name.
  [[nodiscard]] static Result<void> check(const CreateRequest& request, const ResultTerms& terms);
  // Whether a set of that name may be made. Errors: already_exists, permission_denied.
  [[nodiscard]] Result<void> check_name_is_free(SessionId session, const std::string& name,
                                                bool replace) const;
  // What the segment for the slots says of a set: a dense one whose output is `array`, or a ragged one.
  [[nodiscard]] static ResultRecord record_of(SessionId session, const ResultTerms& terms,
                                              const ArrayRecord& array);
  [[nodiscard]] ResultRecord record_of(SessionId session, const ResultTerms& terms, ArrayId id,
                                       const CreateRequest& request, Time now) const;

  // Adds a set that is described so: a dense one, whose output array is being written and is the set's from
  // here on, or a ragged one in the place of those of its name. Takes `memory` over if it succeeds. Errors:
  // not_found when the output array was given up meanwhile.
  [[nodiscard]] Result<const ResultSetRecord*> add(const ResultRecord& record, SlotMemory& memory);
  // The set that this session asked for with that request before, or null.
  [[nodiscard]] const ResultSetRecord* find_made(SessionId session, std::uint64_t token) const;

  // ---- What an earlier daemon left ----

  // Takes over a set, in the place of older ones of its name, whose segment says `record`, with all that its
  // slots hold. The store has adopted what is sealed, and keeps the rest unclaimed. Errors: corrupted;
  // not_found, when the output array is gone: nobody needs the set any more.
  [[nodiscard]] Result<void> adopt(const ResultRecord& record, const ArraySpec& spec, SlotMemory& memory,
                                   const Moment& now);
  // The sessions that have something: their processes may come back to it. Those that do not come are closed.
  [[nodiscard]] std::set<SessionId> sessions() const;
  // Whether the session has that lease.
  [[nodiscard]] bool holds(SessionId session, ArrayId set, SlotIndex slot, std::uint32_t attempt) const;
  // Takes back what the session has leased beyond `known`: it never heard of it.
  using Slots = std::set<std::pair<ArrayId, SlotIndex>>;
  void keep_only(SessionId session, const Slots& known, Time now);

  // The running set of that name, or the newest other. Errors: not_found, permission_denied.
  [[nodiscard]] Result<const ResultSetRecord*> open(SessionId session, std::string_view name) const;
  // The oldest set of the queue that has a free slot, or null: first of those whose slots nobody else was
  // sent for. Only sets of the same user count: to take work from a queue is to do what the set's maker says.
  // The session is expected to lease one soon; if it does not, others are sent.
  [[nodiscard]] const ResultSetRecord* open_queued(SessionId session, std::string_view queue,
                                                   const Moment& now);
  // For how many workers that queue has a slot; some thousands at most.
  [[nodiscard]] std::uint64_t free_in_queue(uid_t user, std::string_view queue) const;
  // Errors: not_found, permission_denied.
  [[nodiscard]] Result<ResultSetRecord*> find(SessionId session, ArrayId set);
  // The same, whoever asks; null if there is none.
  [[nodiscard]] ResultSetRecord* get(ArrayId set);
  // The same, for whoever wants to work on it. Errors: cancelled too.
  [[nodiscard]] Result<ResultSetRecord*> find_to_work(SessionId session, ArrayId set);
  // As Store::list().
  [[nodiscard]] Listing<ResultSetRecord> list(SessionId session, const NameFilter& filter, ArrayId after,
                                              std::size_t limit) const;
  [[nodiscard]] std::size_t size() const noexcept { return sets_.size(); }
  // Whether the array is a set's: only the set may seal or abort it.
  [[nodiscard]] bool contains(ArrayId array) const;
  [[nodiscard]] std::uint32_t leases_of(SessionId session) const;

  // ---- Working ----

  // Up to `count` free slots, lowest index first; with `is_shared` fewer, so that every worker finds work
  // until the end. The session counts as having a dense set mapped from then on.
  [[nodiscard]] std::vector<Lease> lease(SessionId session, ResultSetRecord& set, std::uint64_t count,
                                         bool is_shared, const Moment& now);
  // The slot `slot`. Errors: as SlotTable::lease.
  [[nodiscard]] Result<Lease> lease(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                    const Moment& now);
  // `array` is being written for a slot of a ragged set, in the place of one that was before. False when
  // nobody is writing it any more.
  [[nodiscard]] bool allocated(ResultSetRecord& set, SlotIndex slot, ArrayId array);
  void drop_allocated(ResultSetRecord& set, SlotIndex slot);
  // The same, if the set is there and it is that array.
  void drop_allocated(ArrayId set, SlotIndex slot, ArrayId array);
  // The holder of a slot gives up the array that it allocated for it; false if this is none.
  bool abort_allocated(SessionId session, ArrayId array);
  // Ends of a lease. Errors: as SlotTable's.
  [[nodiscard]] Result<void> commit_rows(SessionId session, ResultSetRecord& set, SlotIndex slot, Time now);
  [[nodiscard]] Result<void> commit_value(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                          std::span<const std::byte> value, Time now);
  // An array takes a while to be sealed, and meanwhile the slot may be lost, or get another one: what was
  // begun is ended only if it is still that slot's.
  struct Sealing {
    ArrayId set = 0;
    SlotIndex slot = 0;
    std::uint32_t attempt = 0;
    ArrayId array = 0;
  };
  // From here on the lease does not run out. Errors: invalid_argument when the slot has no array.
  [[nodiscard]] Result<Sealing> begin_sealing(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                              std::uint32_t attempt);
  // It could not be sealed: the lease goes on.
  void give_up_sealing(SessionId session, const Sealing& sealing, Tick now);
  // It is sealed. If it is not the slot's any more, it goes. Errors: as find_to_work() too.
  [[nodiscard]] Result<void> commit_array(SessionId session, const Sealing& sealing, Time now);
  [[nodiscard]] Result<void> fail(SessionId session, ResultSetRecord& set, SlotIndex slot,
                                  std::string_view reason, bool is_final, Time now);
  [[nodiscard]] Result<void> give_back(SessionId session, ResultSetRecord& set, SlotIndex slot, Time now);
  // The session has no writable mapping of the set any more.
  void unmapped(SessionId session, ArrayId set);

  // ---- Ending ----

  // A running set: leases are taken back, memory is given back, and everybody who asks is told. Of its table
  // only the counts are left. One that has ended, and with `forget` one that runs: it is forgotten, with what
  // it holds. Errors: permission_denied.
  [[nodiscard]] Result<void> cancel(SessionId session, ResultSetRecord& set, bool forget);
  // Gives back what the session held, for that reason, and removes the sets that it made.
  void close_session(SessionId session, std::string_view reason, Time now);
  // Takes the slots back whose time is over.
  void expire(const Moment& now);
  [[nodiscard]] std::optional<Tick> next_deadline() const noexcept;
  // The array is gone: so is the record of the dense set that it was.
  void forget_array(ArrayId array);
  struct Refused {
    ArrayId set = 0;
    std::string why;  // empty: somebody can still write to it, although no session says that it has it mapped
  };
  // Finishes the sets whose slots are all settled, of those that changed since the last call.
  void finish_settled(Time now);
  // Those that could not be sealed although all workers have let go: to be tried again soon, one by one.
  [[nodiscard]] const std::set<ArrayId>& unsealed() const noexcept { return unsealed_; }
  // None when it is not one of these any more.
  [[nodiscard]] std::optional<Refused> seal_again(ArrayId set, Time now);
  // Why a set cannot be sealed, for its waiters to read.
  void explain(ArrayId set, std::string message);

  // What changed since the last call, for the caller to wake who waits for it.
  struct Change {
    bool is_new = false;
    bool has_free = false;    // a slot became free
    bool is_settled = false;  // a slot was committed, or failed
    bool has_ended = false;   // the set is done, failed, cancelled or gone, or tells why it is not
  };
  [[nodiscard]] std::map<ArrayId, Change> take_changed() { return std::exchange(changed_, {}); }
  // Whether there is anything to finish or to tell, or another lease ends first.
  [[nodiscard]] bool has_notes() const noexcept {
    return !settled_.empty() || !changed_.empty() || next_deadline() != told_deadline_;
  }
  // The end of the lease that ends first, as told before it changes again.
  [[nodiscard]] std::optional<Tick> take_next_deadline() { return told_deadline_ = next_deadline(); }

 private:
  using Sets = std::map<ArrayId, ResultSetRecord>;
  using QueueKey = std::pair<uid_t, std::string>;
  // A worker that was told of a set: until it asks for a slot, or its time is over, the slot is meant for it.
  struct Invitation {
    ArrayId set = 0;
    Tick end{};
  };
  struct Place {
    ArrayId set = 0;
    SlotIndex slot = 0;
  };
  [[nodiscard]] bool may(SessionId session, const ResultSetRecord& set, Right right) const;
  // What a segment says of a set, but for its output array, and its memory.
  [[nodiscard]] static ResultSetRecord set_of(const ResultRecord& record, const SlotMemory& memory);
  ResultSetRecord& insert(ResultSetRecord set, SlotMemory memory);
  void remove_ragged(const std::string& name);
  [[nodiscard]] ResultSetRecord* still_sealing(SessionId session, const Sealing& sealing);
  void adopt_allocated(ResultSetRecord& set, Time now);
  [[nodiscard]] Result<bool> finish(ResultSetRecord& set, Time now);
  [[nodiscard]] std::optional<Refused> seal_if_free(ResultSetRecord& set, Time now);
  void lost(ResultSetRecord& set, const SlotTable::Lost& lost, std::string_view reason);
  Change& touch(ResultSetRecord& set);
  void end(ResultSetRecord& set, ResultSetRecord::State state, std::string message);
  void free_memory(ResultSetRecord& set);
  void remove(ResultSetRecord& set);
  void index(ResultSetRecord& set);
  void forget(ResultSetRecord& set);
  void add_worker(ResultSetRecord& set, SessionId session);
  bool drop_worker(ResultSetRecord& set, SessionId session);
  void forget_role(SessionId session, const ResultSetRecord& set);
  void forget_maker(ResultSetRecord& set);
  void keep_queue(const ResultSetRecord& set);
  void keep_deadline(ResultSetRecord& set);
  void invite(SessionId session, ResultSetRecord& set, Tick now);
  void end_invitation(SessionId session);
  void forget_allocated(ResultSetRecord& set, SlotIndex slot);
  [[nodiscard]] std::vector<ArrayId> sets_of(SessionId session) const;

  Store& store_;
  uid_t admin_;
  Sets sets_;
  std::map<std::string, std::set<ArrayId>, std::less<>> by_name_;
  std::map<QueueKey, std::set<ArrayId>> queues_;       // the running sets with a free slot
  std::map<SessionId, std::set<ArrayId>> of_session_;  // that it made, or works on
  std::map<std::pair<SessionId, std::uint64_t>, ArrayId> by_token_;
  std::unordered_map<ArrayId, Place> places_;     // of the arrays that are being written for slots
  std::set<std::pair<Tick, ArrayId>> deadlines_;  // of each set, the lease that ends first
  std::map<SessionId, Invitation> invitations_;
  std::set<std::pair<Tick, SessionId>> invitation_ends_;
  std::set<ArrayId> settled_;   // all slots settled, and changed since finish_settled()
  std::set<ArrayId> unsealed_;  // and could not be sealed then
  std::optional<Tick> told_deadline_;
  std::map<ArrayId, Change> changed_;
};

}  // namespace cowmgr
