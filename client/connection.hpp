// The connection behind a Client: channels to the daemon, and the mappings that this process has.
//
// 1. A channel carries one request at a time. A call takes an idle one, or opens another, so that threads do
//    not wait for each other; all channels of a process belong to one session.
// 2. What the daemon counts (views, slots, writers) belongs to the session, not to a channel.
// 3. A forked child starts over with no channel and no session; see fork_guard.hpp.
// 4. When the daemon went away, the next call connects to the one that took its place, says what this process
//    has (holdings.hpp), and sends again what was under way. Before it says so, every call to the old daemon
//    has come to its end, and what its reply brought is among what the process has.
// 5. A program may close descriptors that are not its own, and be given their numbers again. So no descriptor
//    is used before it is seen to be still the socket that it was; when it is not, the channel is lost, as if
//    the daemon had gone away.
// 6. Who has something that a daemon keeps for a grace period only, a slot above all, may compute for longer
//    than that without a call: then a thread looks for the next daemon.
// 7. What a reply grants (grants.hpp) is either kept by who asked, or goes back on the same channel before
//    that is used again; so it is for a reply that comes after its caller has stopped waiting, which a thread
//    takes. Nothing that the daemon answers ends a session, and nothing that fails here after its answer.
// 8. A request that two daemons had read before they died is not sent to a third. One that waits is sent
//    without its wait after each death: a daemon that answers that does not die of it.
// 9. No mutex is held while a call waits: pool_mutex() is the only one, and a call takes it.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "client/channel.hpp"
#include "client/fork_guard.hpp"
#include "client/grants.hpp"
#include "client/holdings.hpp"
#include "client/socket_mark.hpp"
#include "cowmgr/array.hpp"
#include "cowmgr/info.hpp"
#include "proto/errors.hpp"
#include "proto/fd_socket.hpp"
#include "proto/frames.hpp"
#include "proto/mapping.hpp"
#include "proto/requests.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

[[nodiscard]] Error error_of_failure(const wire::Failure& failure);

// While an object of this lives, no call of this thread waits for an answer for longer than some seconds: for
// destructors, which tell the daemon of an end. It hears of it all the same when it goes on.
class Parting {
 public:
  Parting() noexcept;
  ~Parting();
  Parting(const Parting&) = delete;
  Parting& operator=(const Parting&) = delete;
};

class Patience;

// When the last answer to whoever waits so long must be there.
[[nodiscard]] Limit limit_of_wait(Milliseconds wait) noexcept;
inline constexpr int kMostDeaths = 2;  // of daemons that had read a request

class Connection {
 public:
  struct Options {
    std::string socket;
    std::string command;
    std::string daemon_user;  // whose daemon is trusted besides; see check_server()
    Milliseconds reconnect{0};
    Milliseconds wait{0};
    Milliseconds answer = kForever;
  };
  // Connects and says Hello. Errors: as Client::connect.
  [[nodiscard]] static Result<std::shared_ptr<Connection>> open(const Options& options);

 private:
  // A channel that is taken for a request. At its end what its reply granted goes back, unless it was kept.
  struct Use {
    Use(Connection& owner, std::unique_ptr<Channel> taken) noexcept
        : connection(&owner), channel(std::move(taken)) {}
    Use(Use&&) noexcept = default;
    Use& operator=(Use&&) = delete;
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() {
      if (channel) connection->end_use(*this);
    }

    Connection* connection;
    std::unique_ptr<Channel> channel;
    std::vector<std::uint64_t> released;  // goes with the request
    Grants granted;
  };

 public:
  // The reply to a call, valid until its taker returns.
  template <class Body>
  class Reply {
   public:
    Reply(Use& use, const Body& body) : use_(&use), body_(&body), fds_(use.channel->take_fds()) {}
    Reply(const Reply&) = delete;
    Reply& operator=(const Reply&) = delete;
    ~Reply() = default;
    const Body* operator->() const noexcept { return body_; }
    const Body& operator*() const noexcept { return *body_; }
    [[nodiscard]] std::vector<UniqueFd>& fds() noexcept { return fds_; }
    // What was granted is this process's from now on, and it answers for it; an array to be written was asked
    // for with `writing`. Nothing is kept if this throws bad_alloc.
    void keep(const WritingRequest* writing = nullptr) { use_->connection->keep(use_->granted, writing); }

   private:
    Use* use_;
    const Body* body_;
    std::vector<UniqueFd> fds_;
  };

  // One request and its reply of the type `Body`. `build` gets a builder and returns the request's table; it
  // is called again when the request is sent again. `take` gets the Reply, and returns what the call returns,
  // a Result; what the reply grants goes back unless `take` keeps it, which is its last step that can fail.
  // Neither may call. Blocks until the reply is there, or the limit is over. Errors: what the daemon
  // answered, disconnected, protocol_error, timed_out, out_of_memory, quota_exceeded where this process has
  // no descriptor left for what it was sent.
  template <class Body, class Build, class Take>
  [[nodiscard]] auto call(const Build& build, const Take& take) {
    return call_within<Body>(build, take, Attempt{.patience = nullptr, .limit = limit()});
  }
  template <class Body, class Build, class Take>
  [[nodiscard]] auto call(const Limit& limit, const Build& build, const Take& take) {
    return call_within<Body>(build, take, Attempt{.patience = nullptr, .limit = limit});
  }
  // For a request that waits, `patience` for its caller; ask patience.next() before.
  template <class Body, class Build, class Take>
  [[nodiscard]] auto call(Patience& patience, const Build& build, const Take& take);
  // For requests that have none of their own.
  [[nodiscard]] Limit limit() const noexcept;
  // For requests that are only done.
  template <class Build>
  [[nodiscard]] Result<void> call_done(const Build& build) {
    return call<wire::Done>(build, [](const auto& /*reply*/) { return Result<void>(); });
  }

 private:
  struct Attempt {
    Patience* patience = nullptr;
    Limit limit{};
    bool is_repeatable = false;
    bool is_again = false;
    bool may_try_again = false;
    int deaths = 0;  // of daemons that had read the request
  };

  template <class Body, class Build, class Take>
  [[nodiscard]] auto call_within(const Build& build, const Take& take, Attempt attempt)
      -> std::invoke_result_t<Take, Reply<Body>&> {
    try {
      for (;;) {
        auto outcome = try_call<Body>(build, take, attempt);
        if (outcome || !attempt.may_try_again) return outcome;
      }
    } catch (const std::bad_alloc&) {
      return fail(Errc::out_of_memory, "this process has no memory left");
    }
  }

  template <class Body, class Build, class Take>
  [[nodiscard]] auto try_call(const Build& build, const Take& take, Attempt& attempt)
      -> std::invoke_result_t<Take, Reply<Body>&> {
    using Table = typename TableOf<std::invoke_result_t<Build, Builder&>>::Type;
    attempt.is_repeatable =
        rule_of(wire::RequestBodyTraits<Table>::enum_value).is_sent_again && reconnect_.count() > 0;
    attempt.may_try_again = false;
    auto use = begin_use(attempt.is_repeatable, attempt.limit);
    if (!use) return error_of(std::move(use));
    Channel& channel = *use->channel;
    channel.finish(build(channel.builder()), use->released, attempt.is_again);
    const auto reply = exchange(*use, attempt);
    if (!reply) return error_of(reply);
    const auto* body = (*reply)->template body_as<Body>();
    if (body == nullptr)
      return fail(Errc::protocol_error, "the daemon answers something else than was asked");
    Reply<Body> taken(*use, *body);
    return take(taken);
  }

 public:
  // A request that has no reply. Errors are not told: the daemon is gone, and what was held with it.
  template <class Build>
  void notify(const Build& build) noexcept {
    try {
      auto use = begin_use(false, limit());
      if (!use) return;
      use->channel->finish(build(use->channel->builder()), use->released);
      (void)use->channel->send(limit());
    } catch (const std::bad_alloc&) {  // what was to be told goes with the session
    }
  }

  // Gives back what this process holds, and nobody has a handle to any more. Waits for the answer, but not
  // for long, and not at all while the daemon leaves others unanswered: then it is told as soon as that
  // answers. Whether the daemon has heard it.
  bool give_back(Grants grants) noexcept;

  // Tells the daemon that a view is gone: with the next request, or by itself within two milliseconds if
  // there is none. A message for each would double the cost of looking at an array (`./dev bench`). Never
  // blocks.
  void release_view(std::uint64_t id) noexcept;
  // This process does not write the array `id` any more, or has not leased the slot.
  void remove_writing(std::uint64_t id) noexcept;
  void remove_slot(std::uint64_t set, std::uint64_t slot) noexcept;
  // This process has something now that it must come back to in time when the daemon goes away.
  void watch_daemon() noexcept;
  // A number for a request that must not be carried out twice: the same when it is sent again.
  [[nodiscard]] std::uint64_t next_token() noexcept;

  // A mapping of an array: of a shared view the one that this process has of it, or a new one of `fd`.
  [[nodiscard]] Result<std::shared_ptr<Mapping>> map(const ArrayInfo& info, int fd, View view);
  void keep_mapping(std::uint64_t id, const std::shared_ptr<Mapping>& mapping) noexcept;
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
  friend class Patience;
  explicit Connection(const Options& options)
      : socket_(options.socket),
        command_(options.command),
        daemon_user_(options.daemon_user),
        reconnect_(options.reconnect),
        answer_(options.answer) {
    make_room();
  }

  template <class OffsetType>
  struct TableOf;
  template <class Table>
  struct TableOf<Offset<Table>> {
    using Type = Table;
  };

  [[nodiscard]] Result<Use> begin_use(bool reconnects, const Limit& limit);
  [[nodiscard]] Result<const wire::Reply*> exchange(Use& use, Attempt& attempt);
  void keep(Grants& granted, const WritingRequest* writing);
  // What is to go back, one after the other, on one channel.
  using Unkept = std::vector<Grants>;
  void end_use(Use& use) noexcept;
  void end_use(std::unique_ptr<Channel> channel, const std::vector<std::uint64_t>& released, Unkept unkept,
               const Limit& limit) noexcept;
  void put_back(std::unique_ptr<Channel> channel, Unkept unkept) noexcept;
  [[nodiscard]] bool give_back_later(Grants& grants);
  void settle_late(std::unique_lock<std::mutex>& lock);
  void forget_view(std::uint64_t id) noexcept;

  // A channel for one request. With `reconnects` it looks for another daemon when this one is lost.
  [[nodiscard]] Result<std::unique_ptr<Channel>> take(bool reconnects, const Limit& limit);
  [[nodiscard]] Result<std::unique_ptr<Channel>> add_channel(std::unique_lock<std::mutex>& lock,
                                                             const Limit& limit);
  // What came of trying to reach a daemon.
  struct Tries {
    int deaths = 0;             // of daemons that had read what was said
    bool was_kept_out = false;  // by the socket's mode
  };
  // Opens the connection with Hello: in a new session (0), in one that this process has, or, with `resumes`,
  // in one that it had with an earlier daemon.
  [[nodiscard]] Result<std::unique_ptr<Channel>> open_channel(std::uint64_t session, bool resumes,
                                                              std::uint64_t epoch, const Limit& limit,
                                                              Tries& tries);
  [[nodiscard]] Result<std::unique_ptr<Channel>> greet(std::uint64_t session, bool resumes,
                                                       std::uint64_t epoch, const Limit& limit, Tries& tries);
  [[nodiscard]] Result<void> reconnect(std::unique_lock<std::mutex>& lock);
  [[nodiscard]] Result<std::unique_ptr<Channel>> find_daemon(std::uint64_t session, std::uint64_t epoch,
                                                             Milliseconds patience);
  [[nodiscard]] Result<std::unique_ptr<Channel>> try_daemon(std::uint64_t session, std::uint64_t epoch,
                                                            const Limit& limit, Tries& tries);
  [[nodiscard]] Result<void> say_what_is_held(Channel& channel, const Limit& limit);
  [[nodiscard]] Result<void> say_all(Channel& channel, const Limit& limit);
  [[nodiscard]] tl::unexpected<Error> lost() const;
  void begin_with(std::unique_ptr<Channel> channel);
  // Whether one more may wait in the daemon; waits for that, but not longer than `pause`.
  [[nodiscard]] bool begin_turn(Milliseconds pause);
  void end_turn() noexcept;
  void start_over_in_child();
  void make_room();
  void leave_threads_to_parent() noexcept;
  [[nodiscard]] std::vector<std::uint64_t> take_releases();
  void wake_flusher() noexcept;
  void start_flusher() noexcept;
  void start_watcher() noexcept;
  void watch();
  void watch_once(std::unique_lock<std::mutex>& lock);
  void let_go_of_watched() noexcept;
  void flush_releases();

  const std::string socket_;
  const std::string command_;
  const std::string daemon_user_;
  const Milliseconds reconnect_;
  const Milliseconds answer_;

  // All below is guarded by pool_mutex().
  // A channel that is owed a reply which nobody waits for any more, and what is to go back on it.
  struct Late {
    std::unique_ptr<Channel> channel;
    Unkept unkept;
  };
  // These three have room for all channels.
  std::vector<std::unique_ptr<Channel>> idle_;
  std::vector<Late> late_;
  std::vector<Channel*> busy_;            // taken; of this epoch, or, until all of them are back, of the last
  std::vector<std::uint64_t> releases_;   // not told yet
  std::unique_ptr<std::thread> flusher_;  // from the first release on
  std::unique_ptr<std::condition_variable> flusher_wake_ = std::make_unique<std::condition_variable>();
  std::uint64_t release_count_ = 0;
  std::unique_ptr<std::thread> watcher_;  // from the first watch_daemon(), or late reply, on
  UniqueFd watched_;                      // of a channel of this epoch
  SocketMark watched_mark_{-1};
  bool was_robbed_ = false;
  std::set<const Channel*> opening_;  // channels that say Hello just now
  bool is_flusher_resting_ = false;
  bool is_closing_ = false;
  std::unordered_map<std::uint64_t, std::weak_ptr<Mapping>> mappings_;
  std::size_t open_channels_ = 0;  // those that are late too
  std::size_t waiting_ = 0;        // turns that are taken
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

// A wait of the caller, cut into requests:
//
//   for (;;) {
//     patience.next();
//     auto answer = connection.call<...>(patience, build with patience.wait_ms(), take);
//     if (answer is what is waited for, or !patience.may_ask_again(...)) return ...;
//   }
//
// So many calls may wait in the daemon at once, each on a channel of its own. Those beyond look again and
// again; and so does, once, whose daemon has died (see Connection).
class Patience {
 public:
  Patience(Connection& connection, Milliseconds wait);
  ~Patience();
  Patience(const Patience&) = delete;
  Patience& operator=(const Patience&) = delete;

  // To be called before each request; may pause, where others wait already.
  void next();
  // For the wait_ms of the request. 0 for one that only looks.
  [[nodiscard]] std::uint32_t wait_ms() const noexcept { return is_look_ ? 0 : wait_ms_; }
  // When the answer to the next request must be there.
  [[nodiscard]] Limit limit() const noexcept;
  [[nodiscard]] bool is_over() const { return end_.is_over(); }
  // Whether `error` only says that what is waited for is not there yet, and there is time left.
  [[nodiscard]] bool may_ask_again(const Error& error) const;
  // The error for the caller: a look that found nothing at the end of a wait has waited.
  [[nodiscard]] Error last_word(const Error& error) const;
  // The request was under way when its daemon died.
  void look_first() noexcept { is_look_ = true; }

 private:
  Connection& connection_;
  Milliseconds wait_;
  Limit end_;     // of the wait
  Limit answer_;  // to the last request
  std::uint32_t wait_ms_ = 0;
  bool is_look_ = false;
  bool has_turn_ = false;
  bool is_crowded_ = false;
  std::uint64_t generation_ = fork_generation();
};

template <class Body, class Build, class Take>
auto Connection::call(Patience& patience, const Build& build, const Take& take) {
  return call_within<Body>(build, take, Attempt{.patience = &patience, .limit = patience.limit()});
}

}  // namespace cowmgr::detail
