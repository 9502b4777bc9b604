#include "client/connection.hpp"

#include <array>
#include <cerrno>
#include <poll.h>
#include <utility>

#include <fmt/format.h>

namespace cowmgr::detail {
namespace {

// How often the watcher looks whether what it watches is still its own: poll(2) is not told when a descriptor
// is closed, and keeps the socket open meanwhile.
constexpr Milliseconds kLook{1000};
constexpr Milliseconds kNoMemoryPause{100};  // before a thread that had none tries again

tl::unexpected<Error> lost(const std::string& socket) {
  return fail(Errc::disconnected,
              fmt::format("the connection to the daemon at {} is lost; connect again", socket));
}

}  // namespace

Connection::Connection(const Options& options)
    : answer_(options.answer),
      greeter_({.socket = options.socket, .command = options.command, .daemon_user = options.daemon_user}),
      pool_(greeter_),
      releases_([this] { return tell_releases(); }),
      resumption_({.reconnect = options.reconnect, .answer = options.answer}, greeter_, pool_, releases_) {}

Result<std::shared_ptr<Connection>> Connection::open(const Options& options) {
  try {
    std::shared_ptr<Connection> connection(new Connection(options));
    if (auto ok = connection->resumption_.begin(options.wait); !ok) return error_of(std::move(ok));
    return connection;
  } catch (const std::bad_alloc&) {
    return fail(Errc::out_of_memory, "this process has no memory left");
  }
}

Connection::~Connection() {
  if (generation_ != fork_generation()) return;  // the threads, and what they wait for, are the parent's
  {
    const std::lock_guard lock(pool_mutex());
    greeter_.close();
    pool_.close();
    releases_.close();
    resumption_.close();
  }
  releases_.join();
  watcher_.join();
}

// What the parent held is its own. Called with the mutex held.
void Connection::start_over_in_child() {
  if (generation_ == fork_generation()) return;
  greeter_.start_over_in_child();
  pool_.start_over_in_child();
  releases_.start_over_in_child();
  resumption_.start_over_in_child();
  generation_ = fork_generation();
}

// ---- A request ----

Result<std::unique_ptr<Channel>> Connection::take(bool reconnects, const Limit& limit) {
  std::unique_lock lock(pool_mutex());
  start_over_in_child();
  for (;;) {
    if (pool_.has_late() && !watcher_.is_there()) settle_late(lock);
    auto channel = pool_.take(lock, limit);
    if (!channel || *channel) return channel;
    if (!reconnects || pool_.is_closed()) return lost(socket());
    if (auto ok = resumption_.resume(lock); !ok) return error_of(std::move(ok));
  }
}

Result<Connection::Use> Connection::begin_use(bool reconnects, const Limit& limit) {
  auto channel = take(reconnects, limit);
  if (!channel) return error_of(std::move(channel));
  Use use(*this, *std::move(channel));
  const std::lock_guard lock(pool_mutex());
  use.released = releases_.take();
  return use;
}

Result<const wire::Reply*> Connection::exchange(Use& use, Attempt& attempt) {
  Channel& channel = *use.channel;
  auto reply = channel.exchange(attempt.limit);
  if (reply) {
    if (const auto* failure = (*reply)->body_as_Failure()) return tl::unexpected(error_of_failure(*failure));
    use.granted = Grants::of(channel.request(), **reply);
    if (channel.lacks_fds()) return tl::unexpected(os_error("recvmsg", "a reply's descriptors", EMFILE));
    return reply;
  }
  if (reply.error().code == Errc::timed_out)
    return fail(Errc::timed_out,
                fmt::format("the daemon at {} does not answer in time; is it stopped? Whether the "
                            "request was carried out is not known",
                            socket()));
  if (reply.error().code != Errc::disconnected) return reply;
  attempt.is_again = attempt.is_again || channel.was_sent();
  if (channel.is_intact()) return tl::unexpected(note_death(channel, attempt));
  attempt.may_try_again = attempt.is_repeatable;  // nobody died
  return reply;
}

// The error for the caller, if the request is not sent again.
Error Connection::note_death(const Channel& channel, Attempt& attempt) const {
  attempt.deaths += channel.was_read() ? 1 : 0;
  if (attempt.patience != nullptr) attempt.patience->look_first();
  if (attempt.deaths >= kMostDeaths)
    return {Errc::disconnected,
            fmt::format("the daemon at {} went away, and so did the next, while this request was under way; "
                        "it is not sent a third time",
                        socket())};
  attempt.may_try_again = attempt.is_repeatable;
  return {
      Errc::disconnected,
      fmt::format("the daemon at {} went away; whether the request was carried out is not known", socket())};
}

void Connection::end_use(Use& use) noexcept {
  Unkept unkept;
  try {
    if (!use.granted.is_empty()) unkept.push_back(std::move(use.granted));
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
  (void)end_use(std::move(use.channel), use.released, std::move(unkept), Limit::after(kPartingPatience));
}

// Gives back what is unkept, as far as the channel is ready for it. Whether the rest waits for a late reply.
bool Connection::end_use(std::unique_ptr<Channel> channel, std::span<const std::uint64_t> released,
                         Unkept unkept, const Limit& limit) noexcept {
  std::vector<std::uint64_t> views;
  try {
    if (!channel->was_sent()) views.assign(released.begin(), released.end());
    while (channel->state() == Channel::State::ready && !unkept.empty()) {
      Grants& next = unkept.back();
      views.insert(views.end(), next.views.begin(), next.views.end());
      next.views.clear();
      if (next.finish_next(*channel))
        (void)channel->exchange(limit);  // nothing of what may be answered helps
      else
        unkept.pop_back();
    }
  } catch (const std::bad_alloc&) {  // what could not be told goes with the session
  }
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return false;  // a channel of the parent, in a child
  try {
    if (channel->epoch() == pool_.epoch()) releases_.add(views);
  } catch (const std::bad_alloc&) {  // the same
  }
  const bool is_late = pool_.put_back(std::move(channel), std::move(unkept));
  if (is_late) start_watcher();
  return is_late;
}

std::uint64_t Connection::next_token() noexcept {
  const std::lock_guard lock(pool_mutex());
  return ++last_token_;
}

// ---- What this process has ----

void Connection::keep(Grants& granted, const WritingRequest* writing) {
  const std::lock_guard lock(pool_mutex());
  resumption_.holdings().keep(granted, writing);
}

bool Connection::give_back(Grants grants) noexcept {
  const auto give_back_late = [&] {
    const std::lock_guard lock(pool_mutex());
    return generation_ == fork_generation() && pool_.give_back_late(grants);
  };
  try {
    if (give_back_late()) return false;
    auto channel = take(false, Limit::after(kPartingPatience));
    if (channel) {
      Unkept unkept;
      unkept.push_back(std::move(grants));
      return !end_use(*std::move(channel), {}, std::move(unkept), Limit::after(kPartingPatience));
    }
    (void)give_back_late();
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
  return false;
}

void Connection::release_view(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;
  resumption_.holdings().forget_view(id);
  try {
    releases_.add({&id, 1});
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
}

bool Connection::tell_releases() noexcept {
  notify([](Builder& b) { return wire::CreateRelease(b); });
  const std::lock_guard lock(pool_mutex());
  return !pool_.is_lost();
}

void Connection::remove_writing(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  resumption_.holdings().forget_writing(id);
}

void Connection::remove_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept {
  const std::lock_guard lock(pool_mutex());
  resumption_.holdings().forget_slot(set, slot, attempt);
}

bool Connection::was_robbed() const noexcept {
  const std::lock_guard lock(pool_mutex());
  return pool_.was_robbed();
}

// ---- Watching the daemon ----

void Connection::watch_daemon() noexcept {
  const std::lock_guard lock(pool_mutex());
  if (resumption_.is_wanted() && generation_ == fork_generation()) start_watcher();
}

// Without a thread, the next call looks what has come. Called with the mutex held.
void Connection::start_watcher() noexcept {
  watcher_.start([this] { watch(); });
}

// A daemon that does not come back in time is looked for again by the next call.
void Connection::watch() {
  std::unique_lock lock(pool_mutex());
  bool has_given_up = false;
  while (!pool_.is_closed()) {
    try {
      if (!pool_.is_lost()) has_given_up = false;
      if (pool_.is_lost() && !has_given_up && resumption_.is_wanted())
        has_given_up = !resumption_.resume(lock);
      else
        watch_once(lock);
    } catch (const std::bad_alloc&) {
      if (!lock.owns_lock()) lock.lock();
      pool_.pause(lock, kNoMemoryPause);
    }
  }
}

// Waits for the end of a channel's other side, without taking what comes from there, and for late replies; of
// one that was not late when it began, it hears kLook later.
void Connection::watch_once(std::unique_lock<std::mutex>& lock) {
  if (resumption_.is_under_way() || (pool_.is_lost() && !pool_.has_late())) {
    pool_.pause(lock, kLook);
    return;
  }
  auto polled = pool_.poll_set();
  lock.unlock();
  (void)::poll(polled.fds.data(), polled.count, static_cast<int>(kLook.count()));
  lock.lock();
  if (pool_.note(polled)) settle_late(lock);
}

// Takes the late replies that have come. Called with the mutex held, which it gives up meanwhile.
void Connection::settle_late(std::unique_lock<std::mutex>& lock) {
  auto all = pool_.take_late();
  lock.unlock();
  for (auto& late : all) settle(std::move(late));
  lock.lock();
}

void Connection::settle(ChannelPool::Late late) noexcept {
  try {
    const auto reply = late.channel->receive(Limit::now());
    if (reply) late.unkept.push_back(Grants::of_late(late.channel->request(), **reply));
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
  (void)late.channel->take_fds();
  (void)end_use(std::move(late.channel), {}, std::move(late.unkept), Limit::now());
}

}  // namespace cowmgr::detail
