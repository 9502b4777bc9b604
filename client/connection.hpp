// The connection behind a Client: it sends the requests of any thread, through daemons that come and go.
//
// 1. A channel carries one request at a time. A call takes an idle one, or opens another, so that threads do
//    not wait for each other; all channels of a process belong to one session (channel_pool.hpp).
// 2. What the daemon counts (views, slots, writers) belongs to the session, not to a channel.
// 3. A forked child starts over with no channel and no session; see fork_guard.hpp.
// 4. When the daemon went away, the next call connects to the one that took its place, says what this process
//    has (resumption.hpp), and sends again what was under way. Before it says so, every call to the old
//    daemon has come to its end, and what its reply brought is among what the process has.
// 5. A program may close descriptors that are not its own, and be given their numbers again. So no descriptor
//    is used before it is seen to be still the socket that it was; when it is not, the channel is lost, as if
//    the daemon had gone away.
// 6. A daemon keeps some things for a grace period only, a slot above all. A process that has one may compute
//    for longer than that without a call: a thread looks for the next daemon meanwhile.
// 7. What a reply grants (grants.hpp) is kept by the caller, or goes back on the same channel before that is
//    used again. This holds too for a reply that comes after its caller has stopped waiting: a thread takes
//    it. Nothing that the daemon answers ends a session, nor does a failure here after its answer.
// 8. A request that two daemons had read before they died is not sent to a third. A request that waits is
//    sent without its wait after each death: a daemon that answers it then does not die of it.
// 9. No mutex is held while a call waits: pool_mutex() is the only one, and a call takes it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "client/channel.hpp"
#include "client/channel_pool.hpp"
#include "client/fork_guard.hpp"
#include "client/grants.hpp"
#include "client/greeter.hpp"
#include "client/limit.hpp"
#include "client/mappings.hpp"
#include "client/own_thread.hpp"
#include "client/patience.hpp"
#include "client/releases.hpp"
#include "client/resumption.hpp"
#include "client/turns.hpp"
#include "cowmgr/info.hpp"
#include "proto/errors.hpp"
#include "proto/frames.hpp"
#include "proto/requests.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

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

  // ---- Requests ----

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
  [[nodiscard]] auto call(Patience& patience, const Build& build, const Take& take) {
    return call_within<Body>(build, take, Attempt{.patience = &patience, .limit = patience.limit()});
  }
  [[nodiscard]] Patience patience(Milliseconds wait) { return {turns_, wait, answer_}; }
  // For requests that have none of their own.
  [[nodiscard]] Limit limit() const noexcept { return limit_of_call(answer_); }
  // For requests that are only done.
  template <class Build>
  [[nodiscard]] Result<void> call_done(const Build& build) {
    return call<wire::Done>(build, [](const auto& /*reply*/) { return Result<void>(); });
  }
  // A request that has no reply. Errors are not told: the daemon is gone, and what was held with it.
  template <class Build>
  void notify(const Build& build) noexcept;

  // A number for a request that must not be carried out twice: the same when it is sent again.
  [[nodiscard]] std::uint64_t next_token() noexcept;

  // ---- What this process has ----

  // Gives back what this process holds, and nobody has a handle to any more. Waits for the answer, but not
  // for long, and not at all while the daemon leaves others unanswered: then it is told as soon as that
  // answers. Whether the daemon has heard it.
  bool give_back(Grants grants) noexcept;
  // Tells the daemon that a view is gone (releases.hpp). Never blocks.
  void release_view(std::uint64_t id) noexcept;
  // This process does not write the array `id` any more, or has not leased the slot.
  void remove_writing(std::uint64_t id) noexcept;
  void remove_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept;
  // This process has something now that it must come back to in time when the daemon goes away.
  void watch_daemon() noexcept;
  [[nodiscard]] SharedMappings& mappings() noexcept { return mappings_; }

  [[nodiscard]] const std::string& socket() const noexcept { return greeter_.socket(); }
  [[nodiscard]] const std::string& daemon_user() const noexcept { return greeter_.daemon_user(); }
  // Whether the program ever took a descriptor from this connection (see 5).
  [[nodiscard]] bool was_robbed() const noexcept;

  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

 private:
  struct Attempt {
    Patience* patience = nullptr;
    Limit limit{};
    bool is_repeatable = false;
    bool is_again = false;
    bool may_try_again = false;
    int deaths = 0;  // of daemons that had read the request
  };
  template <class OffsetType>
  struct TableOf;
  template <class Table>
  struct TableOf<Offset<Table>> {
    using Type = Table;
  };
  template <class Build>
  [[nodiscard]] static constexpr RequestRule rule_of_table() noexcept {
    using Table = typename TableOf<std::invoke_result_t<Build, Builder&>>::Type;
    return rule_of(wire::RequestBodyTraits<Table>::enum_value);
  }

  explicit Connection(const Options& options);
  template <class Body, class Build, class Take>
  [[nodiscard]] auto call_within(const Build& build, const Take& take, Attempt attempt)
      -> std::invoke_result_t<Take, Reply<Body>&>;
  template <class Body, class Build, class Take>
  [[nodiscard]] auto try_call(const Build& build, const Take& take, Attempt& attempt)
      -> std::invoke_result_t<Take, Reply<Body>&>;

  // A channel for one request. With `reconnects` it looks for another daemon when this one is lost.
  [[nodiscard]] Result<std::unique_ptr<Channel>> take(bool reconnects, const Limit& limit);
  [[nodiscard]] Result<Use> begin_use(bool reconnects, const Limit& limit);
  [[nodiscard]] Result<const wire::Reply*> exchange(Use& use, Attempt& attempt);
  [[nodiscard]] Error note_death(const Channel& channel, Attempt& attempt) const;
  void keep(Grants& granted, const WritingRequest* writing);
  void end_use(Use& use) noexcept;
  bool end_use(std::unique_ptr<Channel> channel, std::span<const std::uint64_t> released, Unkept unkept,
               const Limit& limit) noexcept;
  [[nodiscard]] bool tell_releases() noexcept;
  void start_over_in_child();
  void start_watcher() noexcept;
  void watch();
  void watch_once(std::unique_lock<std::mutex>& lock);
  void settle_late(std::unique_lock<std::mutex>& lock);
  void settle(ChannelPool::Late late) noexcept;

  const Milliseconds answer_;
  Greeter greeter_;
  Turns turns_;
  SharedMappings mappings_;
  // All below is guarded by pool_mutex().
  ChannelPool pool_;
  Releases releases_;
  Resumption resumption_;
  OwnThread watcher_;  // from the first watch_daemon(), or late reply, on
  std::uint64_t last_token_ = 0;
  std::uint64_t generation_ = fork_generation();
};

template <class Body, class Build, class Take>
auto Connection::call_within(const Build& build, const Take& take, Attempt attempt)
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
auto Connection::try_call(const Build& build, const Take& take, Attempt& attempt)
    -> std::invoke_result_t<Take, Reply<Body>&> {
  constexpr RequestRule kRule = rule_of_table<Build>();
  static_assert(kRule.has_reply, "notify() is for requests that have no reply");
  attempt.is_repeatable = kRule.is_sent_again && resumption_.is_wanted();
  attempt.may_try_again = false;
  auto use = begin_use(attempt.is_repeatable, attempt.limit);
  if (!use) return error_of(std::move(use));
  Channel& channel = *use->channel;
  channel.finish(build(channel.builder()), use->released, attempt.is_again);
  const auto reply = exchange(*use, attempt);
  if (!reply) return error_of(reply);
  const auto* body = (*reply)->template body_as<Body>();
  if (body == nullptr) return fail(Errc::protocol_error, "the daemon answers something else than was asked");
  Reply<Body> taken(*use, *body);
  return take(taken);
}

template <class Build>
void Connection::notify(const Build& build) noexcept {
  static_assert(!rule_of_table<Build>().has_reply, "its reply would be taken for that of the next request");
  try {
    auto use = begin_use(false, limit());
    if (!use) return;
    use->channel->finish(build(use->channel->builder()), use->released);
    (void)use->channel->send(limit());
  } catch (const std::bad_alloc&) {  // what was to be told goes with the session
  }
}

}  // namespace cowmgr::detail
