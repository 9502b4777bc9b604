// What the daemon tells about arrays, result sets, clients and itself: plain values, a snapshot each.
#pragma once

#include <chrono>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

#include "cowmgr/array_spec.hpp"
#include "cowmgr/errors.hpp"

namespace cowmgr {

using SystemTime = std::chrono::sys_time<std::chrono::microseconds>;  // UTC
using Milliseconds = std::chrono::milliseconds;

// For waits without an end.
inline constexpr Milliseconds kForever = Milliseconds::max();

// A name, or another text that a call takes: whatever converts to std::string_view. That itself could be made
// of {"a", "b"}, taken for pointers to the two ends of one string.
class NameRef : public std::string_view {
 public:
  template <class T>
    requires std::convertible_to<const T&, std::string_view>
  // NOLINTNEXTLINE(google-explicit-constructor): it takes the place of std::string_view
  NameRef(const T& text) : std::string_view(text) {}
};

enum class ArrayState : std::uint8_t {
  writing,   // its writer fills it; nobody else sees it
  sealed,    // immutable, served under its name
  draining,  // evicted or replaced; the memory goes with its last view
  tampered,  // somebody opened the sealed segment for writing, or its data changed; no longer served
  unlinked,  // sealed and served, but somebody removed its file: it ends with the daemon unless that can
             // write a new one
};

// What stands behind "immutable".
enum class Protection : std::uint8_t {
  advisory,  // the kernel gives no leases here: nothing is proven
  verified,  // proven at the seal; a later open for writing, by the daemon's user or root, is detected
  enforced,  // verified, and other users than the daemon's cannot open the segment at all
};

struct ArrayInfo {
  std::uint64_t id = 0;       // unique within the instance, never used again
  std::string name;           // UTF-8, 1 to 255 bytes
  std::uint64_t version = 0;  // 1, 2, 3, ... for one name
  ArraySpec spec;
  std::uint64_t data_bytes = 0;
  std::uint64_t segment_bytes = 0;  // with header and trailer
  std::string segment;              // as shm_open(3) takes it: "/cowmgr.<instance>.<id>"
  ArrayState state{};
  Protection protection{};
  std::uint32_t views = 0;  // mappings that sessions hold
  bool pinned = false;
  bool evictable = false;  // may be evicted, least recently used first, when room is needed
  uid_t owner_uid = 0;
  gid_t owner_gid = 0;
  std::uint32_t mode = 0;  // permission bits; read: may attach, write: may replace, evict, pin
  SystemTime created;
  SystemTime sealed;  // the epoch while writing
  SystemTime last_used;
  pid_t writer_pid = 0;           // while writing
  std::uint64_t checksum = 0;     // of the data, XXH3 with 64 bits; 0: none was asked for
  std::uint64_t data_offset = 0;  // of the data in the segment
};

enum class ResultsState : std::uint8_t {
  running,    // slots are free or leased
  sealing,    // every slot is committed; somebody can still write
  done,       // every slot is committed; a dense set is sealed, and an array now
  failed,     // every slot is settled, at least one failed
  cancelled,  // by its owner
};

struct ResultsInfo {
  std::uint64_t id = 0;  // of the set; of a dense one, of the array that it becomes too
  std::string name;
  bool is_ragged = false;
  ArraySpec spec;  // of a dense set
  std::uint64_t slots = 0;
  std::uint64_t data_bytes = 0;  // of a dense set
  ResultsState state{};
  std::uint64_t revision = 0;  // grows with every change
  std::uint64_t free = 0;
  std::uint64_t leased = 0;
  std::uint64_t committed = 0;
  std::uint64_t failed = 0;
  std::string message;  // of the first slot that failed, or why the set cannot be sealed
  uid_t owner_uid = 0;
  pid_t owner_pid = 0;
  SystemTime created;
  std::vector<pid_t> holders{};   // its workers; of a dense set: those that may have it mapped for writing
  std::uint32_t attempts = 0;     // that a slot may take; 0: no limit
  Milliseconds lease{0};          // how long a slot may take; 0: no limit
  bool is_detached = false;       // outlives its maker
  std::uint64_t value_bytes = 0;  // of values and reasons, in the set's own segment
  std::string segment{};          // the set's own, as shm_open(3) takes it
  std::string queue{};            // empty: workers find it by its name alone
  std::uint64_t data_offset = 0;  // of a dense set: of the data in its array's segment
};

struct ClientInfo {
  std::uint64_t session = 0;
  pid_t pid = 0;
  uid_t uid = 0;
  std::string command;         // what the client calls itself
  std::uint32_t channels = 0;  // connections
  std::uint32_t views = 0;
  std::uint64_t view_bytes = 0;
  std::uint32_t writing = 0;  // arrays that it fills
  std::uint32_t leases = 0;   // slots that it holds
  SystemTime connected;
};

struct ArrayDetails {
  ArrayInfo array;
  std::uint64_t resident_bytes = 0;   // memory behind the segment
  std::uint64_t huge_bytes = 0;       // of it, in huge pages
  std::vector<ClientInfo> holders{};  // sessions with a view
};

// Where the daemon's capacity is: each byte is in one state, the first that fits.
struct DaemonMemory {
  std::uint64_t free_bytes = 0;
  std::uint64_t writing_bytes = 0;     // being written, or waiting for its writer
  std::uint64_t draining_bytes = 0;    // evicted or replaced, and kept for its views
  std::uint64_t pinned_bytes = 0;      // viewed or not
  std::uint64_t viewed_bytes = 0;      // served, and somebody views it
  std::uint64_t evictable_bytes = 0;   // goes when room is needed
  std::uint64_t kept_bytes = 0;        // nobody views it, and it stays until somebody evicts it
  std::uint64_t results_bytes = 0;     // slots and values of result sets
  std::uint64_t reclaiming_bytes = 0;  // being given back
  std::uint64_t outside_bytes = 0;     // gone, but processes have it mapped or open without a view
};

struct DaemonInfo {
  std::string version;
  std::string instance;
  std::string socket;
  pid_t pid = 0;
  uid_t uid = 0;
  SystemTime started;
  Protection protection{};
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;  // of the capacity; the next three are parts of it, and may overlap
  std::uint64_t pinned_bytes = 0;
  std::uint64_t evictable_bytes = 0;  // could be evicted now
  std::uint64_t viewed_bytes = 0;     // someone holds a view
  std::uint32_t arrays = 0;
  std::uint32_t sessions = 0;
  std::uint32_t result_sets = 0;
  DaemonMemory memory{};  // the same told in parts that add up; of an older daemon only some are known
};

struct EvictReport {
  std::vector<std::string> names;  // evicted
  std::uint64_t freed_bytes =
      0;  // freed at once; the rest drains, or others than the library's users hold it
  std::vector<std::string> passed_over{};  // pinned, though a pattern matched them: not evicted
};

}  // namespace cowmgr
