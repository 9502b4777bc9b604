// The connection behind a Client: channels to the daemon, and the mappings that this process has.
//
// 1. A channel carries one request at a time. A call takes an idle one, or opens another, so that threads do
//    not wait for each other; all channels of a process belong to one session.
// 2. What the daemon counts (views, slots, writers) belongs to the session, not to a channel.
// 3. A forked child starts over with no channel and no session; see fork_guard.hpp.
// 4. When the daemon went away, the next call connects to the one that took its place, says what this process
//    has (holdings.hpp), and sends again what was under way. Before it says so, every call to the old daemon
//    has come to its end, and what its reply brought is among what the process has: so no call is made while
//    the reply to another is still in hand.
// 5. A program may close descriptors that are not its own, and be given their numbers again. So no descriptor
//    is used before it is seen to be still the socket that it was; when it is not, the channel is lost, as if
//    the daemon had gone away.
// 6. Who has something that a daemon keeps for a grace period only, a slot above all, may compute for longer
//    than that without a call: then a thread looks for the next daemon.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "client/fork_guard.hpp"
#include "client/holdings.hpp"
#include "client/socket_mark.hpp"
#include "cowmgr/info.hpp"
#include "proto/errors.hpp"
#include "proto/fd_socket.hpp"
#include "proto/frames.hpp"
#include "proto/mapping.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

// Whether a request is sent again when the daemon went away: the next one does not do twice what the last has
// done. What ends something is not: it is left out of what the next daemon is told that this process has.
template <class Table>
inline constexpr bool kIsSentAgain = true;
template <>
inline constexpr bool kIsSentAgain<wire::AbortArray> = false;
template <>
inline constexpr bool kIsSentAgain<wire::GiveBackSlots> = false;
template <>
inline constexpr bool kIsSentAgain<wire::Unmapped> = false;
template <>
inline constexpr bool kIsSentAgain<wire::Release> = false;
template <>
inline constexpr bool kIsSentAgain<wire::Shutdown> = false;

[[nodiscard]] Error error_of_failure(const wire::Failure& failure);

// A socket with the buffers of the request and the reply that it carries.
class Channel {
 public:
  Channel(UniqueFd socket, std::uint64_t epoch);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Starts a request; finish it with send() or exchange().
  [[nodiscard]] Builder& builder() noexcept;
  template <class Table>
  void finish(Offset<Table> table, const std::vector<std::uint64_t>& released = {}, bool is_again = false) {
    const auto ids = released.empty() ? 0 : builder_.CreateVector(released);
    builder_.Finish(wire::CreateRequest(builder_, wire::RequestBodyTraits<Table>::enum_value, table.Union(),
                                        ids, is_again));
  }

  // Sends what was finished; blocks while the daemon has no room for it.
  [[nodiscard]] Result<void> send();
  // Sends, and receives the reply, which is valid until the next request. An error means that the channel
  // cannot be used any more.
  [[nodiscard]] Result<const wire::Reply*> exchange();
  [[nodiscard]] std::vector<UniqueFd> take_fds() noexcept { return std::move(fds_); }
  // Whether the last request may have reached the daemon.
  [[nodiscard]] bool was_sent() const noexcept { return was_sent_; }
  [[nodiscard]] std::uint64_t epoch() const noexcept { return epoch_; }
  // Ends an exchange() of another thread: with the reply, if it is there already.
  void shutdown() const noexcept;
  // Another descriptor of the socket, to be told of its end by.
  [[nodiscard]] UniqueFd duplicate() const noexcept;
  // False when the program closed the descriptor, or put another file in its place.
  [[nodiscard]] bool is_intact() const noexcept { return mark_.is_still(socket_.get()); }

 private:
  UniqueFd socket_;
  SocketMark mark_;
  bool was_sent_ = false;
  std::uint64_t epoch_;
  Builder builder_;
  std::unique_ptr<std::byte[]> buffer_;
  std::vector<UniqueFd> fds_;
  std::uint64_t generation_;
};

class Connection {
 public:
  // Connects and says Hello. Errors: as Client::connect.
  [[nodiscard]] static Result<std::shared_ptr<Connection>> open(std::string socket, std::string command,
                                                                std::string daemon_user,
                                                                Milliseconds reconnect, Milliseconds wait);

  // The reply to a call. Its tables are valid until let_go(), its descriptors while this object lives. It
  // keeps the channel busy until then: let go before the next call, or with all channels busy each of two
  // threads waits for the other's.
  template <class Body>
  class Reply {
   public:
    Reply(Connection& connection, std::unique_ptr<Channel> channel, const Body* body)
        : connection_(&connection), channel_(std::move(channel)), body_(body), fds_(channel_->take_fds()) {}
    Reply(Reply&& other) noexcept = default;
    Reply& operator=(Reply&&) = delete;
    Reply(const Reply&) = delete;
    Reply& operator=(const Reply&) = delete;
    ~Reply() { let_go(); }
    void let_go() noexcept {
      if (channel_) connection_->put_back(std::move(channel_));
    }
    const Body* operator->() const noexcept { return body_; }
    const Body& operator*() const noexcept { return *body_; }
    [[nodiscard]] const std::vector<UniqueFd>& fds() const noexcept { return fds_; }
    [[nodiscard]] std::vector<UniqueFd>& fds() noexcept { return fds_; }

   private:
    Connection* connection_;
    std::unique_ptr<Channel> channel_;
    const Body* body_;
    std::vector<UniqueFd> fds_;
  };

  // One request and its reply of the type `Body`. `build` gets a builder and returns the request's table; it
  // is called again when the request is sent again. Blocks until the reply is there. Errors: what the daemon
  // answered, disconnected, protocol_error.
  template <class Body, class Build>
  [[nodiscard]] Result<Reply<Body>> call(const Build& build) {
    bool is_again = false;
    for (;;) {
      bool may_try_again = false;
      auto reply = try_call<Body>(build, is_again, may_try_again);
      if (reply || !may_try_again) return reply;
    }
  }

 private:
  template <class Body, class Build>
  [[nodiscard]] Result<Reply<Body>> try_call(const Build& build, bool& is_again, bool& may_try_again) {
    using Table = typename TableOf<std::invoke_result_t<Build, Builder&>>::Type;
    auto channel = take(kIsSentAgain<Table>);
    if (!channel) return error_of(std::move(channel));
    const auto released = take_releases();
    (*channel)->finish(build((*channel)->builder()), released, is_again);
    const auto reply = (*channel)->exchange();
    if (!reply) {
      may_try_again =
          kIsSentAgain<Table> && reconnect_.count() > 0 && reply.error().code == Errc::disconnected;
      is_again = is_again || (*channel)->was_sent();
      return give_up(*std::move(channel), reply.error(), released);
    }
    if (const auto* failure = (*reply)->body_as_Failure()) {
      Error error = error_of_failure(*failure);
      put_back(*std::move(channel));
      return tl::unexpected(std::move(error));
    }
    const auto* body = (*reply)->template body_as<Body>();
    if (body == nullptr)
      return give_up(*std::move(channel),
                     {Errc::protocol_error, "the daemon answers something else than was asked"});
    return Reply<Body>(*this, *std::move(channel), body);
  }

 public:
  // A request that has no reply. Errors are not told: the daemon is gone, and what was held with it.
  template <class Build>
  void notify(const Build& build) {
    auto channel = take(false);
    if (!channel) return;
    (*channel)->finish(build((*channel)->builder()), take_releases());
    if (auto sent = (*channel)->send(); sent)
      put_back(*std::move(channel));
    else
      (void)give_up(*std::move(channel), std::move(sent).error());
  }

  // Tells the daemon that a view is gone: with the next request, or by itself within two milliseconds if
  // there is none. A message for each would double the cost of looking at an array (`./dev bench`). Never
  // blocks.
  void release_view(std::uint64_t id) noexcept;
  // This process has a view of `id`. Each is given up with release_view().
  void add_view(std::uint64_t id);
  // This process writes the array `id`, which it asked for with `request`; or no more.
  void add_writing(std::uint64_t id, WritingRequest request);
  void remove_writing(std::uint64_t id) noexcept;
  // This process has leased these slots of a set; or one no more.
  void add_slots(std::uint64_t set, std::span<const wire::SlotLease* const> slots);
  void remove_slot(std::uint64_t set, std::uint64_t slot) noexcept;
  // This process has something now that it must come back to in time when the daemon goes away.
  void watch_daemon() noexcept;
  // A number for a request that must not be carried out twice: the same when it is sent again.
  [[nodiscard]] std::uint64_t next_token() noexcept;

  // The mapping that this process has of the array `id`, or a new one of `fd`.
  [[nodiscard]] Result<std::shared_ptr<Mapping>> map_shared(std::uint64_t id, int fd,
                                                            std::uint64_t size_bytes);
  void keep_mapping(std::uint64_t id, const std::shared_ptr<Mapping>& mapping);
  // To be called when a mapping may have gone, so that nothing of it stays behind.
  void forget_mapping(std::uint64_t id) noexcept;

  [[nodiscard]] const std::string& socket() const noexcept { return socket_; }
  [[nodiscard]] const std::string& daemon_user() const noexcept { return daemon_user_; }
  // Whether the program ever took a descriptor from this connection (see 5).
  [[nodiscard]] bool was_robbed() const noexcept;

  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

 private:
  Connection(std::string socket, std::string command, std::string daemon_user, Milliseconds reconnect)
      : socket_(std::move(socket)),
        command_(std::move(command)),
        daemon_user_(std::move(daemon_user)),
        reconnect_(reconnect) {}

  template <class OffsetType>
  struct TableOf;
  template <class Table>
  struct TableOf<Offset<Table>> {
    using Type = Table;
  };

  // A channel for one request. With `reconnects` it looks for another daemon when this one is lost.
  [[nodiscard]] Result<std::unique_ptr<Channel>> take(bool reconnects);
  [[nodiscard]] Result<std::unique_ptr<Channel>> add_channel(std::unique_lock<std::mutex>& lock);
  // Opens the connection with Hello: in a new session (0), in one that this process has, or, with `resumes`,
  // in one that it had with an earlier daemon.
  [[nodiscard]] Result<std::unique_ptr<Channel>> open_channel(std::uint64_t session, bool resumes,
                                                              std::uint64_t epoch);
  [[nodiscard]] Result<void> reconnect(std::unique_lock<std::mutex>& lock);
  [[nodiscard]] Result<std::unique_ptr<Channel>> find_daemon(std::uint64_t session, std::uint64_t epoch,
                                                             Milliseconds patience);
  [[nodiscard]] Result<void> say_what_is_held(Channel& channel);
  [[nodiscard]] tl::unexpected<Error> lost() const;
  void begin_with(std::unique_ptr<Channel> channel);
  void put_back(std::unique_ptr<Channel> channel) noexcept;
  // A request failed, and the releases that it carried with it. A channel that is still good is put back.
  [[nodiscard]] tl::unexpected<Error> give_up(std::unique_ptr<Channel> channel, Error error,
                                              const std::vector<std::uint64_t>& released = {});
  void start_over_in_child() noexcept;
  void leave_threads_to_parent() noexcept;
  [[nodiscard]] std::vector<std::uint64_t> take_releases();
  void wake_flusher() noexcept;
  void start_flusher() noexcept;
  void start_watcher() noexcept;
  void let_go_of_watched() noexcept;
  void watch();
  void flush_releases();

  const std::string socket_;
  const std::string command_;
  const std::string daemon_user_;  // whose daemon is trusted besides; see check_server()
  const Milliseconds reconnect_;

  // All below is guarded by pool_mutex().
  std::vector<std::unique_ptr<Channel>> idle_;
  std::set<Channel*> busy_;               // taken; of this epoch, or, until all of them are back, of the last
  std::vector<std::uint64_t> releases_;   // not told yet
  std::unique_ptr<std::thread> flusher_;  // from the first release on
  std::unique_ptr<std::condition_variable> flusher_wake_ = std::make_unique<std::condition_variable>();
  std::uint64_t release_count_ = 0;
  std::unique_ptr<std::thread> watcher_;  // from the first watch_daemon() on
  UniqueFd watched_;                      // of a channel of this epoch
  SocketMark watched_mark_{-1};
  bool was_robbed_ = false;
  std::set<const Channel*> opening_;  // channels that say Hello just now
  bool is_flusher_resting_ = false;
  bool is_closing_ = false;
  std::unordered_map<std::uint64_t, std::weak_ptr<Mapping>> mappings_;
  std::size_t open_channels_ = 0;
  std::unique_ptr<std::condition_variable> channel_free_ = std::make_unique<std::condition_variable>();
  std::uint64_t session_ = 0;  // 0: none yet
  std::uint64_t generation_ = fork_generation();
  std::uint64_t epoch_ = 1;
  std::uint64_t last_token_ = 0;
  Holdings holdings_;
  std::uint64_t ends_ = 0;        // of slots and of writing, counted
  std::uint64_t told_ends_ = 0;   // when the holdings were told last
  bool is_lost_ = false;          // the session ended
  bool is_reconnecting_ = false;  // some thread is at it
};

// The connection behind a client, for the rest of the library.
struct ClientAccess {
  [[nodiscard]] static const Connection& connection(const Client& client) noexcept {
    return *client.connection_;
  }
};

// How long one request may wait in the daemon; longer waits ask again.
inline constexpr Milliseconds kLongestPoll{20'000};

// A wait of the caller, cut into requests.
class Patience {
 public:
  explicit Patience(Milliseconds wait)
      : is_endless_(wait == kForever), end_(Clock::now() + (is_endless_ ? Milliseconds{0} : wait)) {}

  // For the wait_ms of the next request.
  [[nodiscard]] std::uint32_t next_ms() const {
    if (is_endless_) return static_cast<std::uint32_t>(kLongestPoll.count());
    const auto left = std::chrono::ceil<Milliseconds>(end_ - Clock::now());
    return static_cast<std::uint32_t>(std::clamp(left, Milliseconds{0}, kLongestPoll).count());
  }
  [[nodiscard]] bool is_over() const { return !is_endless_ && Clock::now() >= end_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool is_endless_;
  Clock::time_point end_;
};

}  // namespace cowmgr::detail
