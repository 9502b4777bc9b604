// The outcomes that a caller must handle: one list of codes for the wire, the client library and the CLI.
//
// A function that can be refused returns Result<T>; the message is a sentence that says what to do next.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <tl/expected.hpp>

namespace cowmgr {

// The numbers travel on the wire: append, never renumber.
enum class Errc : std::uint16_t {
  invalid_name = 1,        // an array's name is empty, too long, not UTF-8, or holds control characters
  invalid_dtype = 2,       // not a NumPy type string, or one that cannot live in shared memory
  invalid_shape = 3,       // over 32 dimensions, or the byte count overflows
  invalid_argument = 4,    // any other value that makes no sense
  invalid_file = 5,        // a .npy file that is truncated or malformed
  not_found = 6,           // no array, result set or slot of that name
  already_exists = 7,      // the name is taken and replacing was not asked for
  permission_denied = 8,   // the peer's credentials do not allow it
  out_of_memory = 9,       // the capacity or /dev/shm itself is full
  quota_exceeded = 10,     // the owner, or this process (open files, mappings), has as much as it may
  still_writable = 11,     // a seal was asked for while somebody could still write
  busy = 12,               // in use in a way that forbids the request
  pinned = 13,             // pinned arrays are not evicted
  not_holder = 14,         // the slot or array is held by another session, or by nobody
  already_committed = 15,  // a slot is committed once
  slot_failed = 16,        // a worker gave up a slot for good
  timed_out = 17,          // the wait ended before what was waited for
  no_daemon = 18,          // nothing listens at the socket
  disconnected = 19,       // the daemon went away during a request
  protocol_mismatch = 20,  // the two sides speak different versions
  protocol_error = 21,     // a frame that does not verify
  tampered = 22,           // somebody opened the sealed segment for writing
  corrupted = 23,          // header or trailer do not say what they must
  wrong_process = 24,      // a handle was used in a forked child
  shutting_down = 25,      // the daemon is stopping
  os_failure = 26,         // a system call failed; the message names it
  unsupported = 27,        // the kernel cannot do what was asked for
  cancelled = 28,          // the result set was cancelled by its owner
  no_workers = 29,         // the pool has ended
};

// The code's name as it is spelled above: stable, for scripts and logs.
[[nodiscard]] std::string_view to_string(Errc code) noexcept;

struct Error {
  Errc code{};
  std::string message;  // UTF-8, one sentence or two, without a final newline

  friend bool operator==(const Error&, const Error&) = default;
};

template <class T>
using Result = tl::expected<T, Error>;

[[nodiscard]] inline tl::unexpected<Error> fail(Errc code, std::string message) {
  return tl::unexpected<Error>(Error{code, std::move(message)});
}

// Hands the error of one Result on as the error of another.
template <class T>
[[nodiscard]] tl::unexpected<Error> error_of(Result<T>&& result) {
  return tl::unexpected<Error>(std::move(result).error());
}
template <class T>
[[nodiscard]] tl::unexpected<Error> error_of(const Result<T>& result) {
  return tl::unexpected<Error>(result.error());
}

}  // namespace cowmgr
