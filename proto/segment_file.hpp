// A segment as one finds it: which of the files in shared memory are whole, and what they say.
//
// The permission bits of a segment's file are the daemon's notes about it. A writer may scribble over every
// byte of its segment, the trailer included, but only the file's owner, the daemon's user, can change its
// mode (fchmod(2)): what stands there is the daemon's word, set in one step, and it outlives the daemon.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <sys/types.h>

#include "proto/result_segment.hpp"
#include "proto/segment.hpp"

namespace cowmgr {

inline constexpr mode_t kModeWriting = 0400;  // nobody can open it for writing, not even the writer again
inline constexpr mode_t kModeOpening = 0600;  // for the moment in which the next daemon opens it again
inline constexpr mode_t kMarkSealed = 01000;  // the sticky bit, which means nothing else on a file (inode(7))
inline constexpr mode_t kMarkPinned = 00100;  // beside kMarkSealed
inline constexpr mode_t kMarkDraining = 00010;  // the same: its name is gone, but somebody views it

// What the name of a segment's file says: "cowmgr.<instance>.<id>", or of one that was moved aside,
// "cowmgr.<instance>.quarantine.<id>".
struct SegmentFileName {
  std::string instance;
  std::uint64_t id = 0;
  bool is_quarantined = false;
};
// Empty for every other file.
[[nodiscard]] std::optional<SegmentFileName> parse_segment_file_name(std::string_view file);
// Where a damaged segment is moved, as shm_open(3) takes names.
[[nodiscard]] std::string quarantine_name(std::string_view instance, std::uint64_t id);

struct SegmentFile {
  enum class Kind : std::uint8_t {
    unsealed,  // its array was being written: what it says of itself may be its writer's word
    sealed,    // header and trailer are whole and agree: it is the record of its array
    slots,     // the slots of a result set
    damaged,   // marked as sealed, or as a set's, but it does not say so itself
    newer,     // the same, but of a newer layout: for a newer program
  };
  Kind kind{};
  bool is_pinned = false;
  bool is_draining = false;
  uid_t file_owner = 0;  // the daemon's user; that of the array stands in the trailer
  std::uint64_t size_bytes = 0;
  TrailerInfo trailer{};  // of an array, as the next two; of one without a name: it has no whole record
  ArraySpec spec{Dtype::of<std::uint8_t>(), {}};
  std::string header{};    // all in front of the data
  ResultRecord results{};  // of a set's slots
  std::string problem{};   // of a damaged or newer one, in words
};

// Reads what the file `fd` says of itself; its name has `id`. Reads two or three pages, whatever its size,
// with pread(2): no file makes this fail with a signal. Errors: out_of_memory, os_failure.
[[nodiscard]] Result<SegmentFile> read_segment_file(int fd, std::uint64_t id);

}  // namespace cowmgr
