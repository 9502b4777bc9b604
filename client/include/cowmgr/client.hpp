// The client: a connection to a cowmgr daemon.
//
//   using cowmgr::or_throw;
//   const auto client = or_throw(cowmgr::Client::connect());  // where is the daemon? see ConnectOptions
//   const auto array = or_throw(client.attach("train"));      // maps, never copies
//   std::span<const float> pixels = or_throw(array.as<float>());
//
// Every call that can be refused returns Result<T> (tl::expected): no exception leaves this library but what
// a function of the caller's throws, and std::bad_alloc where there is no memory for a few hundred bytes.
// Check it, or let or_throw() of exception.hpp give the value or throw the sentence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cowmgr/array.hpp"
#include "cowmgr/info.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr {

namespace detail {
class Connection;
struct ClientAccess;
}  // namespace detail

struct ConnectOptions {
  // Path of the daemon's socket. Empty: $COWMGR_SOCKET, else $XDG_RUNTIME_DIR/cowmgr/cowmgr.sock if it
  // exists, else /run/cowmgr/cowmgr.sock.
  std::string socket{};
  // What `cowctl clients` shows. Empty: the name of this program.
  std::string command{};
  // How long a call tries to find the daemon again when it went away, whatever wait the call has. 0: not at
  // all.
  Milliseconds reconnect = std::chrono::seconds(30);
  // How long to wait for a daemon that is not there yet, or does not let this process in yet. Default: not at
  // all; one that is there has 20 s to answer.
  Milliseconds wait{0};
  // How long the daemon may take to answer a request, beyond what that asks it to wait; then the call fails
  // with timed_out. Default: as long as it takes (large arrays take a while to make), but for calls that have
  // a wait of their own.
  Milliseconds answer = kForever;
  // Whose daemon is trusted, by name or number, besides one of the caller's own user, of root, or of the
  // owner of the socket's directory where only root could have made that (/run/cowmgr of the packaged
  // service). Empty: $COWMGR_DAEMON_USER, else nobody's. In a user namespace, what is served from outside it
  // must be named.
  std::string daemon_user{};
};

struct CreateOptions {
  bool replace = false;    // a new version when the name exists; the old one drains. Default: already_exists
  bool evictable = false;  // may go, least recently used first, when room is needed. Default: stays
  std::uint32_t mode =
      0600;  // permission bits; read: may attach, write: may replace, evict, pin, lease slots
  // The seal computes a checksum of the data, at the speed of memory: Array::verify() and `cowctl verify`
  // check it, and so does a daemon that takes the array over from an earlier one, in the background.
  bool checksum = false;
};

struct ResultsOptions {
  bool replace = false;        // as CreateOptions
  bool evictable = false;      // as CreateOptions, of the output array of a dense set
  std::uint32_t mode = 0600;   // as CreateOptions
  std::uint32_t attempts = 0;  // a slot that was lost so often has failed. Default: lost slots are tried
                               // again for ever, and what a worker fails has failed
  Milliseconds lease{0};       // a worker that takes longer for a slot loses it. Default: no limit
  bool is_detached = false;    // the set outlives the client that made it. Default: it goes with it
  std::string queue{};         // workers of the same user find the set with Client::open_queued() too
  std::span<const std::byte> job{};  // what they must know, up to kMaxJobBytes; read it with ResultSet::job()
};

struct AttachOptions {
  View view = View::shared;
  Milliseconds wait{0};  // how long to wait until every name is there. Default: not at all
};

// A thread-safe handle; copies share one connection, which ends with the last copy and the last Array,
// ArrayWriter, Slot and ResultSet made through it. Calls of several threads run side by side: each takes a
// channel of its own. In a forked child the handle opens a session of its own at its first use; writers and
// slots of the parent answer wrong_process there.
//
// When the daemon goes away, every call reconnects to the next one of the instance, with pauses that grow,
// says what this process views, writes and has leased, and goes on; readers do not notice. A request that was
// under way is sent again, and is not carried out twice; but one that two daemons in a row were at when they
// died is not sent to a third: that, evict_lru() and shutdown() answer `disconnected`, and may have been
// carried out or not.
//
// A call that has a `wait` ends with timed_out within a second of its end, also when the daemon does not
// answer at all, as one that is stopped (SIGSTOP); of a wait of 0, 20 s later. A call that has none ends as
// ConnectOptions::answer says. What it asked for may be carried out yet; what the daemon grants then goes
// back by itself. Destructors wait for the daemon for 5 s at most. Any number of threads may wait: 64 of a
// process in the daemon, each on a connection of its own, the others by looking every 50 ms. Calls that do
// not wait have connections beside those.
//
// A call that fails for want of something here (a descriptor, address space, memory) after the daemon has
// done its part fails alone: what was granted goes back, and all that the client has stays.
//
// Every call may fail with no_daemon, disconnected, timed_out, protocol_error, out_of_memory, quota_exceeded
// or os_failure; only what is special stands beside a call.
class Client {
 public:
  // Connects, and introduces this process. Blocks for one round trip, and for the wait. Errors: no_daemon,
  // with how to start one; timed_out when one is there that does not answer; protocol_mismatch;
  // permission_denied when the daemon is of a user who is not trusted, now or when another one takes its
  // place.
  [[nodiscard]] static Result<Client> connect(const ConnectOptions& options = {});

  // Makes room for an array that the caller then fills and seals. Blocks while the memory is being backed,
  // which takes time for gigabytes; other threads are not held up. Errors: invalid_name, invalid_shape,
  // already_exists, out_of_memory (says what is needed, free, evictable, pinned, and who holds it),
  // quota_exceeded.
  [[nodiscard]] Result<ArrayWriter> create(NameRef name, const ArraySpec& spec,
                                           const CreateOptions& options = {}) const;

  // create(), copy `data` in, seal(). `data` must have as many bytes as `spec` says (else invalid_shape).
  [[nodiscard]] Result<Array> put(NameRef name, const ArraySpec& spec, std::span<const std::byte> data,
                                  const CreateOptions& options = {}) const;
  template <Scalar T>
  [[nodiscard]] Result<Array> put(NameRef name, std::span<const T> data, Shape shape,
                                  const CreateOptions& options = {}) const {
    return put(name, ArraySpec{Dtype::of<T>(), std::move(shape)}, std::as_bytes(data), options);
  }
  // The same of whatever holds its items in a row: a vector, an array.
  template <std::ranges::contiguous_range R>
    requires(Scalar<std::ranges::range_value_t<R>> && std::ranges::sized_range<R>)
  [[nodiscard]] Result<Array> put(NameRef name, const R& data, Shape shape,
                                  const CreateOptions& options = {}) const {
    return put(name, std::span<const std::ranges::range_value_t<R>>(data), std::move(shape), options);
  }

  // A view of the newest sealed version of `name`. Takes the same time whatever the array's size. Errors:
  // not_found, timed_out when it did not come within the wait, permission_denied, tampered.
  [[nodiscard]] Result<Array> attach(NameRef name, const AttachOptions& options = {}) const;
  // Views of all `names` (at most 64), or none, in one round trip.
  [[nodiscard]] Result<std::vector<Array>> attach(std::span<const std::string> names,
                                                  const AttachOptions& options = {}) const;
  [[nodiscard]] Result<std::vector<Array>> attach(std::initializer_list<std::string_view> names,
                                                  const AttachOptions& options = {}) const;

  // A view of the version with this id, though its name may be gone or another's by now. Errors: not_found
  // when nobody has a view of it any more, permission_denied, tampered.
  [[nodiscard]] Result<Array> attach_id(std::uint64_t id, View view = View::shared) const;

  // Takes these names (at most 64) away now, their memory with the last view. All or none. A name is a name,
  // whatever characters it holds. Errors: not_found, pinned, busy while one is being written,
  // permission_denied.
  [[nodiscard]] Result<EvictReport> evict(std::span<const std::string> names) const;
  [[nodiscard]] Result<EvictReport> evict(std::initializer_list<std::string_view> names) const;
  [[nodiscard]] Result<EvictReport> evict(NameRef name) const;
  // The same for the names that match any of the patterns (at most 64, of at most 512 bytes): `*` stands for
  // any characters, `?` for one, a backslash takes away the meaning of what follows it. Passes over what is
  // pinned. Errors: not_found when a pattern matches nothing, pinned when they match nothing else,
  // invalid_argument, also when to hold them against all names takes too long.
  [[nodiscard]] Result<EvictReport> evict_matching(std::span<const std::string> patterns) const;
  [[nodiscard]] Result<EvictReport> evict_matching(std::initializer_list<std::string_view> patterns) const;
  [[nodiscard]] Result<EvictReport> evict_matching(NameRef pattern) const;
  // Evicts unpinned, unviewed arrays that the caller may write, evictable or not, least recently used first,
  // until `size_bytes` are freed or none is left.
  [[nodiscard]] Result<EvictReport> evict_lru(std::uint64_t size_bytes) const;

  // Pinned arrays are never evicted. Returns the names. Errors: not_found, permission_denied.
  [[nodiscard]] Result<std::vector<std::string>> pin(std::span<const std::string> names,
                                                     bool pinned = true) const;
  [[nodiscard]] Result<std::vector<std::string>> pin(std::initializer_list<std::string_view> names,
                                                     bool pinned = true) const;
  [[nodiscard]] Result<std::vector<std::string>> pin(NameRef name, bool pinned = true) const;
  // The same for the names that match any of the patterns, as evict_matching().
  [[nodiscard]] Result<std::vector<std::string>> pin_matching(std::span<const std::string> patterns,
                                                              bool pinned = true) const;
  [[nodiscard]] Result<std::vector<std::string>> pin_matching(
      std::initializer_list<std::string_view> patterns, bool pinned = true) const;
  [[nodiscard]] Result<std::vector<std::string>> pin_matching(NameRef pattern, bool pinned = true) const;

  // The sealed version of `name`; if there is none, one that is being written or drained. Errors: not_found,
  // permission_denied.
  [[nodiscard]] Result<ArrayDetails> stat(NameRef name) const;
  // All arrays that this process may read, those being written or drained too, in order of creation; or those
  // of one name; or those whose name matches a pattern, as evict_matching(). Empty when there are none.
  [[nodiscard]] Result<std::vector<ArrayInfo>> list() const;
  [[nodiscard]] Result<std::vector<ArrayInfo>> list(NameRef name) const;
  [[nodiscard]] Result<std::vector<ArrayInfo>> list_matching(NameRef pattern) const;
  [[nodiscard]] Result<std::vector<ClientInfo>> clients() const;

  // A dense result set: one C-order output array of `spec`, its rows split into `slots` slots (at least 1;
  // more slots than rows leave the last ones empty). The set goes with the client that made it, unless it is
  // done by then, or detached. Errors: as create(), and invalid_shape without a first axis.
  [[nodiscard]] Result<ResultSet> create_results(NameRef name, const ArraySpec& spec, std::uint64_t slots,
                                                 const ResultsOptions& options = {}) const;
  // A ragged result set: `slots` results of any size. It goes with the client that made it, and its results
  // with it, unless it is detached. Errors: invalid_name, invalid_argument, already_exists, out_of_memory,
  // quota_exceeded.
  [[nodiscard]] Result<ResultSet> create_ragged(NameRef name, std::uint64_t slots,
                                                const ResultsOptions& options = {}) const;
  // The result set `name`; waits up to `wait` until it is there. Errors: not_found, permission_denied.
  [[nodiscard]] Result<ResultSet> open_results(NameRef name, Milliseconds wait = Milliseconds{0}) const;
  // The oldest result set of the queue that has a free slot; waits up to `wait` until there is one. Sees only
  // sets that this process's user made. Errors: timed_out.
  [[nodiscard]] Result<ResultSet> open_queued(NameRef queue, Milliseconds wait = kForever) const;
  // As list() and list_matching().
  [[nodiscard]] Result<std::vector<ResultsInfo>> list_results() const;
  [[nodiscard]] Result<std::vector<ResultsInfo>> list_results(NameRef name) const;
  [[nodiscard]] Result<std::vector<ResultsInfo>> list_results_matching(NameRef pattern) const;

  [[nodiscard]] Result<DaemonInfo> ping() const;
  // Asks the daemon to stop. Its arrays stay for the next daemon of the instance, unless `purge`. Errors:
  // permission_denied unless the caller is its user, or root.
  [[nodiscard]] Result<void> shutdown(bool purge = false) const;

  // Where the daemon listens: hand it to workers, as COWMGR_SOCKET.
  [[nodiscard]] const std::string& socket() const noexcept;

 private:
  // `texts` are names, or patterns.
  [[nodiscard]] Result<EvictReport> evict(std::span<const std::string> texts, bool are_patterns) const;
  [[nodiscard]] Result<std::vector<std::string>> pin(std::span<const std::string> texts, bool are_patterns,
                                                     bool pinned) const;
  [[nodiscard]] Result<std::vector<ArrayInfo>> list(std::string_view text, bool is_pattern) const;
  [[nodiscard]] Result<std::vector<ResultsInfo>> list_results(std::string_view text, bool is_pattern) const;
  friend struct detail::ClientAccess;
  template <class Build>
  [[nodiscard]] Result<ResultSet> make_set(const Build& build) const;
  explicit Client(std::shared_ptr<detail::Connection> connection) noexcept
      : connection_(std::move(connection)) {}

  std::shared_ptr<detail::Connection> connection_;
};

}  // namespace cowmgr
