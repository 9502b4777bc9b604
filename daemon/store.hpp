// The arrays: which there are, who owns, fills and views them, and when their memory goes.
//
// Synchronous, single-threaded, without Asio; time is a parameter. What takes long is not done here: the
// memory of a new array comes from outside (back()), the memory of a gone one is handed out (take_garbage()).
//
// Invariants:
// 1. A record is in one state: reserved (no memory yet) -> writing -> sealed -> draining, or tampered.
// 2. One version of a name is current: the highest that was sealed and neither evicted nor replaced.
// 3. A record's views are the sum of its views over all sessions. It is dropped at zero views when draining.
// 4. used_bytes is the sum of segment_bytes over all records, plus what was handed out as garbage and not
//    yet reported reclaimed(): it never understates the memory that is taken.
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

#include "daemon/peer.hpp"
#include "daemon/quota.hpp"
#include "daemon/shm_env.hpp"
#include "proto/errors.hpp"
#include "proto/npy.hpp"

namespace cowmgr {

using ArrayId = std::uint64_t;  // never used again within a daemon's life

struct StoreOptions {
  std::uint64_t capacity_bytes = 0;
  QuotaLimits quota;
  uid_t admin = 0;  // the daemon's user
  ArrayId first_id = 1;
};

struct CreateRequest {
  std::string name;
  ArraySpec spec;
  bool replace = false;
  bool evictable = false;
  std::uint32_t mode = 0600;
  std::optional<Ownership> owner{};  // default: the session's peer, with `mode`
  bool is_detached = false;          // does not go with the session that makes it
};

// The daemon's own session: it writes what outlives the session that asked for it.
inline constexpr SessionId kHouse = UINT64_MAX;

struct ArrayRecord {
  enum class State : std::uint8_t { reserved, writing, sealed, draining, tampered };

  ArrayId id = 0;
  std::string name;
  std::uint64_t version = 0;
  ArraySpec spec;
  std::string header;  // the .npy header page
  std::uint64_t data_bytes = 0;
  Ownership owner;
  State state = State::reserved;
  bool replace = false;
  bool evictable = false;
  bool pinned = false;
  bool tampered = false;  // in state draining too
  std::uint32_t views = 0;
  SessionId writer = 0;  // until sealed
  pid_t writer_pid = 0;
  Time created{};
  Time seal_asked{};  // for the first time: the trailer says it, and can be written only then
  Time sealed{};
  Time last_used{};
  Segment segment{};

  [[nodiscard]] std::uint64_t segment_bytes() const noexcept { return cowmgr::segment_bytes(data_bytes); }
  [[nodiscard]] bool is_reclaimable() const noexcept {
    return state == State::sealed && evictable && !pinned && views == 0;
  }
};

// How the capacity is used; the last three are parts of the second.
struct MemoryUse {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t pinned_bytes = 0;
  std::uint64_t evictable_bytes = 0;
  std::uint64_t viewed_bytes = 0;
};

class Store {
 public:
  Store(const ShmEnv& env, const StoreOptions& options);

  // ---- Sessions: all that a peer holds hangs on its session ----

  void open_session(SessionId session, Peer peer);
  // Drops the session's views and the arrays that it was writing.
  void close_session(SessionId session);
  [[nodiscard]] Quota& quota() noexcept { return quota_; }
  [[nodiscard]] const Peer& peer(SessionId session) const { return holdings(session).peer; }

  // ---- Making arrays ----

  // Checks everything and takes the room, evicting evictable arrays, least recently used first, if need be.
  // The caller makes the segment and calls back(), or abort(). Errors: as Client::create; out_of_memory
  // while reclaiming_bytes() is not 0 is worth another try when reclaimed() was called.
  [[nodiscard]] Result<ArrayId> reserve(SessionId session, const CreateRequest& request, Time now);
  // Gives a reserved array its memory. Errors: not_found when the array is gone meanwhile; the segment
  // becomes garbage then. Each reserve() is followed by one back() or one fail_backing().
  [[nodiscard]] Result<const ArrayRecord*> back(ArrayId id, Segment segment);
  // The memory of a reserved array could not be had.
  void fail_backing(ArrayId id);
  // Drops an array that is reserved or being written.
  void abort(ArrayId id);
  // The end of an array that belongs to something else which ends: dropped if it is not sealed, else evicted
  // unless it is pinned. Unknown ids are ignored.
  void retire(ArrayId id);
  // Seals what `session` was writing, and gives it a view if `keep_view`. False when somebody can still
  // write: try again later. Errors: not_holder, already_exists, corrupted (the array is gone then).
  [[nodiscard]] Result<bool> seal(SessionId session, ArrayId id, bool keep_view, Time now);

  // ---- Memory that is no array: the slots of a result set ----

  [[nodiscard]] ArrayId next_id() noexcept { return ++last_id_; }
  // Takes the room for a segment, or for the `size_bytes` that one shall grow. Errors: out_of_memory as
  // reserve(), quota_exceeded.
  [[nodiscard]] Result<void> charge_segment(uid_t owner, std::uint64_t size_bytes);
  [[nodiscard]] Result<void> charge_growth(uid_t owner, std::uint64_t size_bytes);
  // The memory could not be had.
  void release_segment(uid_t owner, std::uint64_t size_bytes);
  void release_growth(uid_t owner, std::uint64_t size_bytes);
  // The segment is not needed any more.
  void discard(uid_t owner, Segment segment);

  // ---- Using them ----

  // One view for each name or id, or none at all. Errors: not_found, permission_denied, tampered.
  [[nodiscard]] Result<std::vector<const ArrayRecord*>> attach(SessionId session,
                                                               std::span<const std::string> names,
                                                               std::span<const ArrayId> ids, Time now);
  // The first of `names` that no sealed array has, or null.
  [[nodiscard]] const std::string* first_missing(std::span<const std::string> names) const;
  // Drops one view; unknown ids are ignored, for the peer's loss only.
  void release(SessionId session, ArrayId id, Time now);

  struct Evicted {
    std::vector<std::string> names;
    std::uint64_t freed_bytes = 0;
  };
  [[nodiscard]] Result<Evicted> evict(SessionId session, std::span<const std::string> patterns);
  [[nodiscard]] Result<Evicted> evict_lru(SessionId session, std::uint64_t size_bytes);
  [[nodiscard]] Result<std::vector<std::string>> pin(SessionId session, std::span<const std::string> patterns,
                                                     bool pinned);

  // Somebody broke the lease with this descriptor: opened the segment for writing. Null if it is none of
  // ours.
  const ArrayRecord* mark_tampered(int lease_fd);

  // ---- Looking ----

  [[nodiscard]] const ArrayRecord* find(ArrayId id) const;
  // The sealed version of `name`, else one that is being written or drained. Errors: not_found.
  [[nodiscard]] Result<const ArrayRecord*> find(SessionId session, std::string_view name) const;
  // Up to `limit` arrays after the id `after` that the session may read, in order of their ids.
  [[nodiscard]] std::vector<const ArrayRecord*> list(SessionId session, std::string_view pattern,
                                                     ArrayId after, std::size_t limit) const;
  [[nodiscard]] bool may(SessionId session, const ArrayRecord& record, Right right) const;
  [[nodiscard]] MemoryUse memory_use() const;
  [[nodiscard]] std::size_t size() const noexcept { return records_.size(); }
  [[nodiscard]] std::uint32_t views_of(SessionId session, ArrayId id) const;
  struct SessionUse {
    std::uint32_t views = 0;
    std::uint64_t view_bytes = 0;
    std::uint32_t writing = 0;
  };
  [[nodiscard]] SessionUse use_of(SessionId session) const;

  // ---- What changed, for the caller to act on ----

  // Segments whose memory is to be given back, off this thread. Report each with reclaimed().
  [[nodiscard]] std::vector<Segment> take_garbage() { return std::exchange(garbage_, {}); }
  void reclaimed(std::uint64_t size_bytes);
  [[nodiscard]] std::uint64_t reclaiming_bytes() const noexcept { return reclaiming_bytes_; }
  // Names whose waiters should look again.
  [[nodiscard]] std::vector<std::string> take_changed_names() { return std::exchange(changed_names_, {}); }
  // Arrays that are gone.
  [[nodiscard]] std::vector<ArrayId> take_dropped() { return std::exchange(dropped_, {}); }

 private:
  struct Holdings {
    Peer peer;
    std::unordered_map<ArrayId, std::uint32_t> views;
    std::set<ArrayId> writing;
  };
  struct Versions {
    ArrayId current = 0;    // 0: none is sealed
    std::set<ArrayId> all;  // being written, sealed, and draining; never empty
  };

  [[nodiscard]] const Holdings& holdings(SessionId session) const;
  [[nodiscard]] Holdings& holdings(SessionId session);
  [[nodiscard]] Result<void> check_name_is_free(SessionId session, const CreateRequest& request) const;
  [[nodiscard]] std::uint64_t next_version(const std::string& name) const;
  [[nodiscard]] ArrayId current_of(const std::string& name) const;
  [[nodiscard]] const ArrayRecord* being_written(const std::string& name) const;
  [[nodiscard]] Result<void> make_room(std::uint64_t size_bytes);
  [[nodiscard]] Error no_room(std::uint64_t size_bytes) const;
  [[nodiscard]] std::string largest_holders() const;
  [[nodiscard]] Result<void> check_attach(SessionId session, const ArrayRecord& record) const;
  [[nodiscard]] Result<std::vector<ArrayRecord*>> match_to_change(SessionId session,
                                                                  std::span<const std::string> patterns);
  [[nodiscard]] std::vector<ArrayRecord*> least_recently_used(
      const std::function<bool(const ArrayRecord&)>& wanted);
  void add_view(Holdings& held, ArrayRecord& record, Time now);
  void drop_views(ArrayRecord& record, std::uint32_t count);
  void publish(ArrayRecord& record, Time now);
  void drain(ArrayRecord& record);
  void drop(ArrayId id);

  const ShmEnv& env_;
  StoreOptions options_;
  Quota quota_;
  ArrayId last_id_;
  std::map<ArrayId, ArrayRecord> records_;
  std::unordered_map<std::string, Versions> names_;
  std::map<ArrayId, std::uint64_t>
      orphans_;  // reserved, dropped, and their memory not here yet: bytes of each
  std::unordered_map<SessionId, Holdings> sessions_;
  std::uint64_t used_bytes_ = 0;
  std::uint64_t reclaiming_bytes_ = 0;
  std::vector<Segment> garbage_;
  std::vector<std::string> changed_names_;
  std::vector<ArrayId> dropped_;
};

}  // namespace cowmgr
