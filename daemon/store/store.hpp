// The arrays: which there are, who owns, fills and views them, and when their memory goes.
//
// Synchronous, single-threaded, without Asio; time is a parameter. What takes long is not done here: the
// memory of a new array comes from outside (back()), the memory of a gone one is handed out (take_garbage()).
//
// Invariants:
// 1. A record is in one state: reserved (no memory yet) -> writing -> sealed -> draining, or tampered.
// 2. One version of a name is current: the highest that was sealed and neither evicted nor replaced.
// 3. A record's views are the sum of its views over all sessions. It is dropped at zero views when draining.
// 4. used_bytes never understates the memory that is taken: every byte of it is in one state (MemoryStates).
//    What was handed out as garbage counts until it is reported reclaimed(), which is when the kernel says
//    that nobody has it any more.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/shm/shm_env.hpp"
#include "daemon/store/charges.hpp"
#include "daemon/store/memory.hpp"
#include "daemon/store/peer.hpp"
#include "daemon/store/selection.hpp"
#include "daemon/store/time.hpp"
#include "proto/errors.hpp"
#include "proto/npy.hpp"

namespace cowmgr {

using ArrayId = std::uint64_t;  // never used again while anything of it is left

struct StoreOptions {
  std::uint64_t capacity_bytes = 0;
  QuotaLimits quota;
  uid_t admin = 0;  // the daemon's user
  ArrayId first_id = 1;
  std::uint64_t id_step = 1;  // ids grow by 1 to this much, at random: nobody can take their names before
};

struct CreateRequest {
  std::string name;
  ArraySpec spec;
  bool replace = false;
  bool evictable = false;
  std::uint32_t mode = 0600;
  std::optional<Ownership> owner{};  // default: the session's peer, with `mode`
};

// The daemon's own session: it writes what belongs to a result set, and goes with that. No peer's session can
// have this number, and it names no process.
inline constexpr SessionId kDaemonSession = SessionId{1} << 63U;
static_assert(!is_session_id(kDaemonSession) && pid_of(kDaemonSession) == 0);

// What a segment takes: of its owner's quota, and of the capacity.
struct Room {
  Charge charge;
  Memory::Share memory;

  [[nodiscard]] uid_t owner() const noexcept { return charge.user(); }
  void shrink(std::uint64_t less_bytes) noexcept {
    charge.shrink(less_bytes);
    memory.shrink(less_bytes);
  }
};

struct ArrayRecord {
  enum class State : std::uint8_t { reserved, writing, sealed, draining, tampered };

  ArrayId id = 0;
  std::string name;
  std::uint64_t version = 0;
  ArraySpec spec;
  std::uint32_t header_bytes = 0;  // of the .npy header, whole pages; the data follows
  std::uint64_t data_bytes = 0;
  Ownership owner;
  State state = State::reserved;
  bool replace = false;
  bool evictable = false;
  bool pinned = false;
  std::uint64_t checksum = 0;  // 0: none
  std::string_view harm{};     // in words, why it is not served any more, in state draining too; mostly empty
  bool is_awaited = false;     // draining, and of an earlier daemon: who views it may not have said so yet
  bool is_unlinked = false;    // somebody took its file's name away
  std::uint32_t views = 0;
  SessionId writer = 0;  // until sealed
  pid_t writer_pid = 0;
  Time created{};
  Time seal_asked{};  // for the first time: the trailer says it, and can be written only then
  Time sealed{};
  Time last_used{};
  UseOrder::Use used{};  // when it was used last
  // As the store has counted it.
  struct Counted {
    UseOrder* order = nullptr;  // that it stands in, at `use`
    UseOrder::Use use{};
    bool pinned = false;
    bool viewed = false;
  };
  Counted counted{};
  Segment segment{};
  Room room{};
  struct Older {
    Segment segment;
    Memory::Share memory;
  };
  std::vector<Older> older{};  // without names, and still mapped by some of its views

  [[nodiscard]] std::uint64_t segment_bytes() const noexcept {
    return cowmgr::segment_bytes(data_bytes, header_bytes);
  }
  [[nodiscard]] bool is_reclaimable() const noexcept {
    return state == State::sealed && evictable && !pinned && views == 0;
  }
};

// The .npy header of the array, made anew: it takes a page, and is needed twice. Errors: corrupted, where
// what an earlier daemon left has one of another length.
[[nodiscard]] Result<std::string> header_of(const ArrayRecord& record);
// What the trailer says of the array as it is now.
[[nodiscard]] TrailerPage trailer_page(const ArrayRecord& record);

// Where the capacity is: each byte is in one state, the first that fits. Their sum is the capacity, or what
// is used if that is more: a daemon may find more than it would take.
struct MemoryStates {
  std::uint64_t free_bytes = 0;
  std::uint64_t writing_bytes = 0;     // reserved, being written or copied, or waiting for its writer
  std::uint64_t draining_bytes = 0;    // evicted, replaced or rewritten, and kept for its views
  std::uint64_t pinned_bytes = 0;      // viewed or not
  std::uint64_t viewed_bytes = 0;      // served, and somebody views it
  std::uint64_t evictable_bytes = 0;   // goes when room is needed
  std::uint64_t kept_bytes = 0;        // nobody views it, and it stays until somebody evicts it
  std::uint64_t results_bytes = 0;     // slots and values of result sets
  std::uint64_t reclaiming_bytes = 0;  // being given back
  std::uint64_t outside_bytes = 0;     // gone for us, but processes have it mapped or open without a view

  [[nodiscard]] std::uint64_t used_bytes() const noexcept {
    return writing_bytes + draining_bytes + pinned_bytes + viewed_bytes + evictable_bytes + kept_bytes +
           results_bytes + reclaiming_bytes + outside_bytes;
  }
};

// How the capacity is used; the last three are parts of the second, and may overlap.
struct MemoryUse {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t pinned_bytes = 0;
  std::uint64_t evictable_bytes = 0;
  std::uint64_t viewed_bytes = 0;
  MemoryStates states{};
};

// A segment that the store needs no more. Its memory may be somebody's still: it counts until this goes.
struct Garbage {
  Segment segment;
  Memory::Share memory;
  std::optional<uid_t> owner{};  // who pays while others hold it; none: whose it was is not known for sure
  Charge charge{};               // that pays
};

class Store {
 public:
  Store(const ShmEnv& env, const StoreOptions& options);

  // ---- Sessions: all that a peer holds hangs on its session ----

  struct SessionUse {
    std::uint32_t views = 0;
    std::uint64_t view_bytes = 0;  // each array once
    std::uint32_t writing = 0;
    std::uint64_t writing_bytes = 0;
  };
  void open_session(SessionId session, Peer peer);
  // The newest layout of segments that the peer reads; all, unless this says otherwise.
  void set_layout(SessionId session, std::uint32_t layout) { holdings(session).layout = layout; }
  // Drops the session's views and the arrays that it was writing.
  void close_session(SessionId session);
  [[nodiscard]] Charges& charges() noexcept { return charges_; }
  [[nodiscard]] const Peer& peer(SessionId session) const { return holdings(session).peer; }

  // ---- Making arrays ----

  // Checks everything and takes the room, evicting evictable arrays, least recently used first, if need be.
  // The caller makes the segment and calls back(), or abort(). Errors: as Client::create; out_of_memory
  // while expects_room() is worth another try when garbage is gone, or after end_rewrite().
  [[nodiscard]] Result<ArrayId> reserve(SessionId session, const CreateRequest& request, Time now);
  // Gives a reserved array its memory. Errors: not_found when the array is gone meanwhile; the segment
  // becomes garbage then. Each reserve() is followed by one back() or one fail_backing().
  [[nodiscard]] Result<const ArrayRecord*> back(ArrayId id, Segment segment);
  // An array that is being written goes no more with the session that asked for it. Null when nobody is
  // writing such an array any more.
  [[nodiscard]] const ArrayRecord* hand_to_daemon(ArrayId id);
  // The memory of a reserved array could not be had.
  void fail_backing(ArrayId id);
  // Drops an array that is reserved or being written.
  void abort(ArrayId id);
  // The end of an array that belongs to something else which ends: dropped if it is not sealed, else evicted
  // unless it is pinned. Unknown ids are ignored.
  void retire(ArrayId id);
  // Seals what `session` was writing, and gives it a view if `keep_view`. `checksum` is what the trailer
  // shall say of the data; of several calls the first one's counts. False when somebody can still write: try
  // again later. Errors: not_holder; already_exists, corrupted (the array is gone then); out_of_memory,
  // os_failure (try again later).
  [[nodiscard]] Result<bool> seal(SessionId session, ArrayId id, bool keep_view, Time now,
                                  std::uint64_t checksum = 0);

  // ---- What an earlier daemon left ----

  // `id` was used by an earlier daemon: ids to come are higher, so that their order is that of creation.
  void note_id(ArrayId id) noexcept;
  // Takes over a sealed array, and serves it as that did; not if it `is_tampered`. Of two versions of a name
  // the higher counts, the other drains, until drop_unviewed() though nobody views it yet. Charged to its
  // owner, whatever the limits are now.
  void adopt(Segment segment, const SegmentFile& file, bool is_tampered, Time now);
  // Who had a view of what drains has said so by now.
  void drop_unviewed();
  [[nodiscard]] bool has_awaited() const;
  // Keeps an array that was being written until it is claimed, or dropped with its writer.
  void keep_unclaimed(ArrayId id, Segment segment, const SegmentFile& file);
  // Its writer came back: it goes on as what `request` says. The daemon itself may claim every array, and is
  // charged for it whatever the limits. Errors: not_found unless `session` was its writer; as reserve();
  // os_failure.
  [[nodiscard]] Result<const ArrayRecord*> claim(SessionId session, ArrayId id, const CreateRequest& request,
                                                 Time now);
  // Whether the session was that array's writer, and may come back to it.
  [[nodiscard]] bool may_claim(SessionId session, ArrayId id) const;
  // What the segment of an unclaimed array says that it holds; its writer may have changed that. Or null.
  [[nodiscard]] const ArraySpec* unclaimed_spec(ArrayId id) const;
  [[nodiscard]] std::set<SessionId> unclaimed_writers() const;
  // Its writer will not come back, or does not know of them: its unclaimed arrays go. 0: those of nobody.
  void drop_unclaimed(SessionId writer);

  // ---- Memory that is no array: the slots of a result set ----

  // Higher than every id before, and one whose name in shared memory nobody has.
  [[nodiscard]] ArrayId next_id();
  // Takes the room for a segment, or for what one shall grow by. Errors: out_of_memory as reserve(),
  // quota_exceeded.
  [[nodiscard]] Result<Room> take_room(uid_t owner, std::uint64_t size_bytes);
  [[nodiscard]] Result<void> extend(Room& room, std::uint64_t more_bytes);
  // The same for a segment that is there already, whatever the limits.
  [[nodiscard]] Room take_over_room(uid_t owner, std::uint64_t size_bytes);
  // The segment is not needed any more.
  void discard(Room room, Segment segment);

  // ---- Using them ----

  // One view for each name or id, or none at all. Errors: not_found, permission_denied, tampered, unsupported
  // for a layout that the session does not read.
  [[nodiscard]] Result<std::vector<const ArrayRecord*>> attach(SessionId session,
                                                               std::span<const std::string> names,
                                                               std::span<const ArrayId> ids, Time now);
  // Whether the session may say that it views the array, from before this daemon's start.
  [[nodiscard]] bool may_hold(SessionId session, ArrayId id) const;
  // The session has these views of arrays that it may_hold(), as many of each as an array may have, and no
  // others; what it writes
  // beyond `writing`, it never heard of.
  using Views = std::unordered_map<ArrayId, std::uint32_t>;
  void keep_only(SessionId session, const Views& views, const std::set<ArrayId>& writing, Time now);
  // The first of `names` that no sealed array has, or null.
  [[nodiscard]] const std::string* first_missing(std::span<const std::string> names) const;
  // Drops one view; unknown ids are ignored, for the peer's loss only.
  void release(SessionId session, ArrayId id, Time now);

  struct Evicted {
    std::vector<std::string> names;
    std::uint64_t freed_bytes = 0;
    std::vector<std::string> passed_over{};  // pinned, of what a pattern matched
  };
  // As clients ask that do not say whether they mean names or patterns: each is a name if some array has it,
  // else a pattern. Errors: invalid_argument.
  [[nodiscard]] Result<Selection> names_or_patterns(const std::vector<std::string>& texts) const;
  // Looks on for what `selection` names, for a slice. Whether it has come to the end. Errors:
  // invalid_argument when the request has taken too long.
  [[nodiscard]] Result<bool> search(SessionId session, Selection& selection) const;
  // These follow a search() that came to its end, and do a part of it, until they are called with nothing
  // left. A name that is spelled out is refused before anything is done; a pattern passes over what is
  // pinned, and over what the session may not change, and is refused when it matches nothing else. Errors:
  // not_found, busy while one is being written, pinned, permission_denied. False when there is more to do.
  //
  // With `asked` the request came once more after a daemon was lost that may have carried it out: what is
  // gone is done, and what was sealed since it was asked for first stays.
  [[nodiscard]] Result<bool> evict_some(SessionId session, Selection& selection, Evicted& evicted,
                                        std::optional<Time> asked = std::nullopt);
  [[nodiscard]] Result<bool> pin_some(SessionId session, Selection& selection, bool pinned,
                                      std::vector<std::string>& names);
  // Makes a selection of what is used least, and may go, as much of it as it takes.
  [[nodiscard]] Selection least_used(SessionId session, std::uint64_t size_bytes) const;

  // ---- Segments that somebody else opens, harms or removes ----

  // Somebody broke the lease with this descriptor: opened the segment for writing. Null if it is none of
  // ours.
  const ArrayRecord* mark_tampered(int lease_fd);
  // The data is not what its checksum says. Null if the array is gone.
  const ArrayRecord* mark_corrupted(ArrayId id);
  // Somebody may have taken the name of its file away. Whether somebody has; told once.
  bool note_unlinked(ArrayId id);
  // Arrays that are served, and have no file: they end with the daemon unless they are rewritten.
  [[nodiscard]] const std::set<ArrayId>& unlinked() const noexcept { return unlinked_; }
  // Takes the room for a second copy of one of these; end_rewrite() follows. Nothing is evicted for it.
  // Errors: out_of_memory; already_exists when its file is there again, and then all is well.
  [[nodiscard]] Result<const ArrayRecord*> begin_rewrite(ArrayId id);
  // The copy takes the place of what lost its name, which goes with the views of the array. Whether it did:
  // it may be wanted no more. Without a copy all stays as it was.
  bool end_rewrite(ArrayId id, std::optional<Segment> copy);

  // ---- Looking ----

  [[nodiscard]] const ArrayRecord* find(ArrayId id) const;
  // The sealed version of `name`, else one that is being written or drained. Errors: not_found.
  [[nodiscard]] Result<const ArrayRecord*> find(SessionId session, std::string_view name) const;
  // Arrays after the id `after` that the session may read, in order of their ids: up to `limit`, in a slice
  // of time.
  [[nodiscard]] Listing<ArrayRecord> list(SessionId session, const NameFilter& filter, ArrayId after,
                                          std::size_t limit) const;
  [[nodiscard]] const std::map<ArrayId, ArrayRecord>& records() const noexcept { return records_; }
  [[nodiscard]] bool may(SessionId session, const ArrayRecord& record, Right right) const;
  [[nodiscard]] MemoryUse memory_use() const;
  [[nodiscard]] std::size_t size() const noexcept { return records_.size(); }
  [[nodiscard]] std::uint32_t views_of(SessionId session, ArrayId id) const;
  [[nodiscard]] bool is_writing(SessionId session, ArrayId id) const;
  [[nodiscard]] SessionUse use_of(SessionId session) const;

  // ---- What changed, for the caller to act on ----

  [[nodiscard]] bool has_notes() const noexcept {
    return !garbage_.empty() || !changed_names_.empty() || !served_.empty() || !dropped_.empty();
  }
  // Segments whose memory is to be given back, off this thread (ShmEnv::try_remove). Nobody gets their room
  // until they go.
  [[nodiscard]] std::vector<Garbage> take_garbage() { return std::exchange(garbage_, {}); }
  // Somebody keeps this garbage: who waits for room waits for it no more, and its owner pays for it.
  void begin_outside(Garbage& garbage);
  [[nodiscard]] std::uint64_t bytes(MemoryState state) const noexcept { return memory_.bytes(state); }
  [[nodiscard]] bool expects_room() const noexcept {
    return bytes(MemoryState::reclaiming) > 0 || !rewriting_.empty();
  }
  // Names whose waiters should look again.
  [[nodiscard]] std::vector<std::string> take_changed_names() { return std::exchange(changed_names_, {}); }
  // Arrays that are served from a segment that was not there before.
  [[nodiscard]] std::vector<ArrayId> take_served() { return std::exchange(served_, {}); }
  // Arrays that are gone.
  [[nodiscard]] std::vector<ArrayId> take_dropped() { return std::exchange(dropped_, {}); }

 private:
  struct Holdings {
    Peer peer;
    Views views{};
    std::set<ArrayId> writing{};
    std::uint32_t layout = kLayoutVersion;
    SessionUse use{};
  };
  struct Unclaimed {
    Segment segment;
    Memory::Share memory;
    ArraySpec spec;
    SessionId writer = 0;
    uid_t owner = 0;  // says the segment, which whoever wrote it may have forged
  };
  struct Versions {
    ArrayId current = 0;                   // 0: none is sealed
    std::set<ArrayId> all;                 // being written, sealed, and draining; never empty
    std::set<ArrayId> writing;             // of these
    std::multiset<std::uint64_t> numbers;  // of all
  };

  [[nodiscard]] const Holdings& holdings(SessionId session) const;
  [[nodiscard]] Holdings& holdings(SessionId session);
  [[nodiscard]] Result<void> check_name_is_free(SessionId session, const CreateRequest& request) const;
  [[nodiscard]] Ownership owner_of(SessionId session, const CreateRequest& request) const;
  ArrayRecord& add_record(SessionId session, ArrayId id, const CreateRequest& request,
                          std::uint32_t header_bytes, Room room, Time now);
  [[nodiscard]] ArrayId current_of(const std::string& name) const;
  [[nodiscard]] const ArrayRecord* being_written(const std::string& name) const;
  [[nodiscard]] Result<void> make_room(std::uint64_t size_bytes);
  [[nodiscard]] Error no_room(std::uint64_t size_bytes) const;
  [[nodiscard]] std::string advice(std::uint64_t size_bytes, const MemoryStates& states) const;
  [[nodiscard]] std::string largest_holders() const;
  [[nodiscard]] Result<void> check_attach(SessionId session, const ArrayRecord& record) const;
  [[nodiscard]] Result<std::uint32_t> header_bytes_for(SessionId session, const ArraySpec& spec) const;
  [[nodiscard]] Result<void> check_change(SessionId session, const ArrayRecord& record) const;
  [[nodiscard]] tl::unexpected<Error> not_to_be_changed(const std::string& name) const;
  [[nodiscard]] bool is_current(const ArrayRecord& record) const;
  void hold_against_patterns(SessionId session, const ArrayRecord& record, Selection& selection) const;
  [[nodiscard]] Result<void> select_names(SessionId session, Selection& selection, bool may_be_gone);
  [[nodiscard]] std::vector<ArrayRecord*> take_selected(Selection& selection);
  void account(ArrayRecord& record);
  void discount(ArrayRecord& record);
  void index_leases(const ArrayRecord& record);
  void begin_writing(SessionId session, const ArrayRecord& record);
  void end_writing(SessionId session, const ArrayRecord& record);
  void add_views(Holdings& held, ArrayRecord& record, std::uint32_t count, Time now);
  void drop_views(ArrayRecord& record, std::uint32_t count);
  void publish(ArrayRecord& record, Time now);
  void put_out_of_service(ArrayRecord& record, std::string_view harm);
  void throw_away(Segment segment, Memory::Share memory, std::optional<uid_t> owner);
  [[nodiscard]] MemoryStates memory_states() const;
  [[nodiscard]] bool is_wanted(ArrayId id, const Segment& copy) const;
  void drain(ArrayRecord& record);
  void drop(ArrayId id);

  const ShmEnv& env_;
  StoreOptions options_;
  Memory memory_;  // outlives all that has a share of it, and so do the charges
  Charges charges_;
  UseOrder evictable_;  // of what is evictable, and of what is kept: nobody views either
  UseOrder kept_;
  UseOrder::Use uses_ = 0;
  std::uint64_t pinned_bytes_ = 0;  // of arrays that are pinned, in whatever state; the same of those viewed
  std::uint64_t viewed_bytes_ = 0;
  ArrayId last_id_;
  std::map<ArrayId, ArrayRecord> records_;
  std::unordered_map<std::string, Versions> names_;
  std::map<ArrayId, Memory::Share> orphans_;  // reserved, dropped, and their memory not here yet
  std::map<ArrayId, Unclaimed> unclaimed_;
  std::set<ArrayId> unlinked_;
  std::map<ArrayId, Memory::Share> rewriting_;
  std::unordered_map<int, ArrayId> by_lease_;  // whose the lease with that descriptor is
  std::unordered_map<SessionId, Holdings> sessions_;
  std::vector<Garbage> garbage_;
  std::vector<std::string> changed_names_;
  std::vector<ArrayId> served_;
  std::vector<ArrayId> dropped_;
};

}  // namespace cowmgr
