#include "client/connection.hpp"

#include <algorithm>
#include <array>
#include <csignal>
#include <exception>
#include <fcntl.h>
#include <poll.h>
#include <random>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <utility>

#include <fmt/format.h>

#include "client/deadlock.hpp"
#include "client/server_check.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr::detail {
namespace {

constexpr std::size_t kMaxChannels = 64;   // of one connection; more threads than that wait for each other
constexpr std::size_t kMaxReleases = 512;  // in one frame
constexpr auto kFlushPause = std::chrono::milliseconds(1);
// Between two tries to find a daemon.
constexpr auto kFirstReconnect = std::chrono::microseconds(2'000);
constexpr auto kLongestReconnect = std::chrono::microseconds(500'000);
// How often the watcher looks whether what it watches is still its own: poll(2) is not told when a descriptor
// is closed, and keeps the socket open meanwhile.
constexpr auto kLook = std::chrono::milliseconds(1000);

// With all signals blocked: the program's handlers run in the program's threads. With a name by which they
// are told from the program's (deadlock.cpp). Null when none is to be had.
template <class Work>
std::unique_ptr<std::thread> start_thread(Work work) noexcept {
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::unique_ptr<std::thread> thread;
  try {
    thread = std::make_unique<std::thread>([work = std::move(work)] {
      ::prctl(PR_SET_NAME, kThreadName);
      work();
    });
  } catch (const std::exception&) {
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

// A channel among those that are being opened, for as long as this object lives.
class Opening {
 public:
  Opening(std::set<const Channel*>& opening, const Channel* channel) : opening_(opening), channel_(channel) {
    const std::lock_guard lock(pool_mutex());
    opening_.insert(channel_);
  }
  Opening(const Opening&) = delete;
  Opening& operator=(const Opening&) = delete;
  ~Opening() {
    const std::lock_guard lock(pool_mutex());
    opening_.erase(channel_);
  }

 private:
  std::set<const Channel*>& opening_;
  const Channel* channel_;
};

}  // namespace

// ---- Channel ----

Channel::Channel(UniqueFd socket, std::uint64_t epoch)
    : socket_(std::move(socket)),
      mark_(socket_.get()),
      epoch_(epoch),
      buffer_(new std::byte[kMaxFrameBytes]),
      generation_(fork_generation()) {
  close_in_children(socket_.get());
}

Channel::~Channel() {
  // In a child the number was closed at the fork, and may be another file by now.
  if (generation_ != fork_generation()) {
    (void)socket_.release();
    return;
  }
  shutdown();  // it may be watched through a duplicate
  forget_fd(socket_.get());
  if (!is_intact()) (void)socket_.release();
}

Builder& Channel::builder() noexcept {
  builder_.Clear();
  return builder_;
}

void Channel::shutdown() const noexcept {
  if (is_intact()) ::shutdown(socket_.get(), SHUT_RDWR);
}

UniqueFd Channel::duplicate() const noexcept {
  return UniqueFd(::fcntl(socket_.get(), F_DUPFD_CLOEXEC, 0));
}

Result<void> Channel::send() {
  was_sent_ = false;
  if (!is_intact())
    return fail(Errc::disconnected, "the program closed the descriptor of the connection to the daemon");
  auto sent = send_frame(socket_.get(), bytes_of(builder_));
  was_sent_ = sent.has_value();
  if (!sent) return error_of(std::move(sent));
  return {};
}

Result<const wire::Reply*> Channel::exchange() {
  auto sent = send();
  if (!sent && (sent.error().code != Errc::disconnected || !is_intact())) return error_of(std::move(sent));
  auto frame = receive_frame(socket_.get(), {buffer_.get(), kMaxFrameBytes});
  // Whoever hung up may have said why before: the kernel tells of the end first if it has left us unread.
  if (!frame && frame.error().code == Errc::disconnected)
    frame = receive_frame(socket_.get(), {buffer_.get(), kMaxFrameBytes});
  if (!frame) return error_of(std::move(frame));
  if (!*frame) return fail(Errc::os_failure, "the connection to the daemon was made non-blocking");
  fds_ = std::move((*frame)->fds);
  const auto* reply = verified_root<wire::Reply>((*frame)->bytes);
  if (reply == nullptr || reply->body() == nullptr)
    return fail(Errc::protocol_error, "the daemon's reply is malformed");
  return reply;
}

Error error_of_failure(const wire::Failure& failure) {
  return {static_cast<Errc>(failure.code()), std::string(view_of(failure.message()))};
}

// ---- Connection ----

Result<std::shared_ptr<Connection>> Connection::open(std::string socket, std::string command,
                                                     std::string daemon_user, Milliseconds reconnect,
                                                     Milliseconds wait) {
  std::shared_ptr<Connection> connection(
      new Connection(std::move(socket), std::move(command), std::move(daemon_user), reconnect));
  auto channel = connection->find_daemon(0, connection->epoch_, wait);
  if (!channel) return error_of(std::move(channel));
  const std::lock_guard lock(pool_mutex());
  connection->begin_with(*std::move(channel));
  return connection;
}

// The first channel to a daemon. Called with the mutex held.
void Connection::begin_with(std::unique_ptr<Channel> channel) {
  let_go_of_watched();
  watched_ = channel->duplicate();
  watched_mark_ = SocketMark(watched_.get());
  close_in_children(watched_.get());
  open_channels_ = 1;
  idle_.push_back(std::move(channel));
}

// The thread exists in the parent alone. A condition variable that threads waited for at the fork waits for
// them for ever, in notify_one() as in its destructor.
void Connection::leave_threads_to_parent() noexcept {
  (void)flusher_.release();
  (void)watcher_.release();
  // Closed in this process already, at the fork.
  (void)watched_.release();
  (void)flusher_wake_.release();
  (void)channel_free_.release();
}

// What the parent held is its own. Called with the mutex held.
void Connection::start_over_in_child() noexcept {
  if (generation_ == fork_generation()) return;
  generation_ = fork_generation();
  idle_.clear();
  releases_.clear();
  busy_.clear();
  opening_.clear();
  holdings_ = {};
  leave_threads_to_parent();
  flusher_wake_ = std::make_unique<std::condition_variable>();
  channel_free_ = std::make_unique<std::condition_variable>();
  is_flusher_resting_ = false;
  open_channels_ = 0;
  session_ = 0;
  is_lost_ = false;
  is_reconnecting_ = false;
  was_robbed_ = false;
}

tl::unexpected<Error> Connection::lost() const {
  return fail(Errc::disconnected,
              fmt::format("the connection to the daemon at {} is lost; connect again", socket_));
}

Result<std::unique_ptr<Channel>> Connection::take(bool reconnects) {
  reconnects = reconnects && reconnect_.count() > 0;
  std::unique_lock lock(pool_mutex());
  start_over_in_child();
  for (;;) {
    // The first channel makes the session; until then nobody else can join it.
    channel_free_->wait(lock, [&] {
      return is_lost_ || !idle_.empty() || open_channels_ == 0 ||
             (session_ != 0 && open_channels_ < kMaxChannels);
    });
    if (is_lost_ && !reconnects) return lost();
    if (is_lost_) {
      if (auto ok = reconnect(lock); !ok) return error_of(std::move(ok));
      continue;
    }
    if (!idle_.empty()) {
      auto channel = std::move(idle_.back());
      idle_.pop_back();
      busy_.insert(channel.get());
      return channel;
    }
    const std::uint64_t epoch = epoch_;
    auto channel = add_channel(lock);
    if (epoch != epoch_) continue;  // what an earlier daemon said, or gave, does not count any more
    if (channel) busy_.insert(channel->get());
    if (channel || !is_lost_) return channel;
    if (!reconnects) return lost();
  }
}

// Called with the mutex held, which it gives up meanwhile.
Result<std::unique_ptr<Channel>> Connection::add_channel(std::unique_lock<std::mutex>& lock) {
  ++open_channels_;
  const std::uint64_t session = session_;
  const std::uint64_t epoch = epoch_;
  lock.unlock();
  auto channel = open_channel(session, false, epoch);
  lock.lock();
  channel_free_->notify_all();
  if (channel || epoch != epoch_) return channel;
  --open_channels_;
  // A daemon that is gone does not answer; the next one does not know the session.
  const Errc code = channel.error().code;
  is_lost_ = is_lost_ || code == Errc::no_daemon || code == Errc::disconnected ||
             (session != 0 && code == Errc::permission_denied);
  return channel;
}

// ---- When the daemon went away ----

// Called with the mutex held, which it gives up meanwhile. One thread looks for the next daemon, the others
// wait.
Result<void> Connection::reconnect(std::unique_lock<std::mutex>& lock) {
  if (is_reconnecting_) {
    channel_free_->wait(lock, [&] { return !is_reconnecting_; });
    return {};
  }
  is_reconnecting_ = true;
  const std::uint64_t epoch = ++epoch_;
  const std::uint64_t session = session_;
  auto old = std::exchange(idle_, {});
  for (const Channel* channel : busy_) channel->shutdown();
  channel_free_->wait(lock, [&] { return busy_.empty() || epoch != epoch_; });
  lock.unlock();
  old.clear();
  auto channel = find_daemon(session, epoch, reconnect_);
  lock.lock();
  // What was given up since is not told in any other way.
  bool is_told = true;
  while (channel && is_told && session != 0 && epoch == epoch_ && told_ends_ != ends_) {
    lock.unlock();
    is_told = say_what_is_held(**channel).has_value();
    lock.lock();
  }
  if (epoch != epoch_) return {};  // in a child that was forked meanwhile, or it began once more
  is_reconnecting_ = false;
  channel_free_->notify_all();
  if (!is_told) return {};  // that daemon went away, too: whoever asked looks for the next one
  if (!channel) {
    // A program that had a daemon asks why it has none.
    Error error = std::move(channel).error();
    if (error.code == Errc::no_daemon) error.code = Errc::disconnected;
    return tl::unexpected(std::move(error));
  }
  begin_with(*std::move(channel));
  is_lost_ = false;
  if (!releases_.empty()) wake_flusher();  // of what was given up since the daemon was told of it
  return {};
}

Result<std::unique_ptr<Channel>> Connection::find_daemon(std::uint64_t session, std::uint64_t epoch,
                                                         Milliseconds patience) {
  const Patience until(patience);
  std::minstd_rand random(std::random_device{}());
  for (auto pause = kFirstReconnect;; pause = std::min(pause * 2, kLongestReconnect)) {
    auto channel = open_channel(session, session != 0, epoch);
    if (channel) {
      if (session == 0 || say_what_is_held(**channel)) return channel;
      channel = fail(Errc::disconnected, fmt::format("the daemon at {} went away again", socket_));
    }
    const Errc code = channel.error().code;
    if ((code != Errc::no_daemon && code != Errc::disconnected) || patience.count() == 0) return channel;
    if (until.is_over()) {
      return fail(code, fmt::format("{}; none came within {} ms", channel.error().message, patience.count()));
    }
    // With jitter: of many clients that lost the same daemon, each comes at a time of its own.
    const auto jitter = std::uniform_int_distribution<std::int64_t>(pause.count() / 2, pause.count())(random);
    std::unique_lock lock(pool_mutex());
    if (is_closing_) return channel;
    channel_free_->wait_for(lock, std::min<std::chrono::microseconds>(std::chrono::microseconds(jitter),
                                                                      Milliseconds(until.next_ms())));
  }
}

// Nobody is between a reply and what it brings: what is held now is all that there is.
Result<void> Connection::say_what_is_held(Channel& channel) {
  Holdings held;
  {
    const std::lock_guard lock(pool_mutex());
    releases_.clear();  // this daemon does not hear of them in the first place
    held = holdings_;
    told_ends_ = ends_;
  }
  return held.tell([&]() -> Builder& { return channel.builder(); },
                   [&](Offset<wire::Hold> table) -> Result<void> {
                     channel.finish(table);
                     const auto reply = channel.exchange();
                     if (!reply) return error_of(reply);
                     return {};
                   });
}

void Connection::add_view(std::uint64_t id) {
  const std::lock_guard lock(pool_mutex());
  ++holdings_.views[id];
}

void Connection::add_writing(std::uint64_t id, WritingRequest request) {
  const std::lock_guard lock(pool_mutex());
  holdings_.writing.insert_or_assign(id, std::move(request));
}

void Connection::remove_writing(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  holdings_.writing.erase(id);
  ++ends_;
}

void Connection::add_slots(std::uint64_t set, std::span<const wire::SlotLease* const> slots) {
  const std::lock_guard lock(pool_mutex());
  for (const auto* lease : slots) holdings_.slots.insert_or_assign({set, lease->slot()}, lease->attempt());
}

void Connection::remove_slot(std::uint64_t set, std::uint64_t slot) noexcept {
  const std::lock_guard lock(pool_mutex());
  holdings_.slots.erase({set, slot});
  ++ends_;
}

std::uint64_t Connection::next_token() noexcept {
  const std::lock_guard lock(pool_mutex());
  return ++last_token_;
}

Result<std::unique_ptr<Channel>> Connection::open_channel(std::uint64_t session, bool resumes,
                                                          std::uint64_t epoch) {
  auto socket = connect_to(socket_);
  if (!socket) return error_of(std::move(socket));
  if (auto ok = check_server(socket->get(), socket_, daemon_user_); !ok) return error_of(std::move(ok));
  auto channel = std::make_unique<Channel>(*std::move(socket), epoch);
  const Opening opening(opening_, channel.get());
  channel->finish(wire::CreateHelloDirect(channel->builder(), kProtocolVersion, command_.c_str(), session,
                                          resumes, kLayoutVersion));
  const auto reply = channel->exchange();
  if (!reply) return error_of(reply);
  if (const auto* failure = (*reply)->body_as_Failure()) return tl::unexpected(error_of_failure(*failure));
  const auto* welcome = (*reply)->body_as_Welcome();
  if (welcome == nullptr) return fail(Errc::protocol_error, "the daemon does not greet");
  if (session == 0 || resumes) {
    const std::lock_guard lock(pool_mutex());
    if (epoch == epoch_) session_ = welcome->session();
  }
  return channel;
}

void Connection::put_back(std::unique_ptr<Channel> channel) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;  // a channel of the parent, in a child
  busy_.erase(channel.get());
  if (channel->epoch() == epoch_) {
    idle_.push_back(std::move(channel));
    channel_free_->notify_one();
  } else {
    channel_free_->notify_all();  // who reconnects waits for it
  }
}

tl::unexpected<Error> Connection::give_up(std::unique_ptr<Channel> channel, Error error,
                                          const std::vector<std::uint64_t>& released) {
  if (error.code == Errc::invalid_argument) {
    // The request did not fit a frame and was not sent: the channel, and the session with it, is as good as
    // before.
    put_back(std::move(channel));
    const std::lock_guard lock(pool_mutex());
    releases_.insert(releases_.end(), released.begin(), released.end());
    wake_flusher();
    return tl::unexpected(std::move(error));
  }
  const std::uint64_t epoch = channel->epoch();
  Channel* const address = channel.get();
  const bool is_intact = channel->is_intact();
  if (error.code == Errc::disconnected && is_intact)
    error.message =
        fmt::format("the daemon at {} went away; whether the request was carried out is not known", socket_);
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return tl::unexpected(std::move(error));
  was_robbed_ = was_robbed_ || !is_intact;
  busy_.erase(address);
  channel.reset();
  if (epoch != epoch_) {
    channel_free_->notify_all();
    return tl::unexpected(std::move(error));  // somebody looks for another daemon already
  }
  --open_channels_;
  // The session ended with the daemon, or with its last channel.
  is_lost_ = is_lost_ || error.code == Errc::disconnected || open_channels_ == 0;
  channel_free_->notify_all();
  return tl::unexpected(std::move(error));
}

void Connection::release_view(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;
  auto& views = holdings_.views;
  if (const auto at = views.find(id); at != views.end() && --at->second == 0) views.erase(at);
  releases_.push_back(id);
  if (!is_lost_) wake_flusher();
}

// Called with the mutex held.
void Connection::wake_flusher() noexcept {
  ++release_count_;
  if (!flusher_)
    start_flusher();
  else if (is_flusher_resting_)
    flusher_wake_->notify_one();
}

// Without a thread, what was released goes with the next request.
void Connection::start_flusher() noexcept {
  flusher_ = start_thread([this] { flush_releases(); });
}

std::vector<std::uint64_t> Connection::take_releases() {
  const std::lock_guard lock(pool_mutex());
  const std::size_t count = std::min(releases_.size(), kMaxReleases);
  std::vector<std::uint64_t> ids(releases_.end() - static_cast<std::ptrdiff_t>(count), releases_.end());
  releases_.resize(releases_.size() - count);
  return ids;
}

// ---- Watching the daemon ----

void Connection::watch_daemon() noexcept {
  const std::lock_guard lock(pool_mutex());
  if (!watcher_ && reconnect_.count() > 0 && generation_ == fork_generation()) start_watcher();
}

void Connection::start_watcher() noexcept {
  watcher_ = start_thread([this] { watch(); });
}

// Called with the mutex held.
void Connection::let_go_of_watched() noexcept {
  forget_fd(watched_.get());
  if (!watched_mark_.is_still(watched_.get())) (void)watched_.release();
  watched_.reset();
}

bool Connection::was_robbed() const noexcept {
  const std::lock_guard lock(pool_mutex());
  const auto is_intact = [](const auto& channel) { return channel->is_intact(); };
  return was_robbed_ || !std::all_of(idle_.begin(), idle_.end(), is_intact) ||
         (watched_ && !watched_mark_.is_still(watched_.get()));
}

// Waits for the end of a channel's other side, without taking what comes from there. A daemon that does not
// come back in time is looked for again by the next call.
void Connection::watch() {
  std::unique_lock lock(pool_mutex());
  bool has_given_up = false;
  while (!is_closing_) {
    if (is_lost_ && !has_given_up) {
      has_given_up = !reconnect(lock);
      continue;
    }
    if (!is_lost_) has_given_up = false;
    if (is_lost_ || is_reconnecting_) {
      channel_free_->wait_for(lock, kLook);
      continue;
    }
    const std::uint64_t epoch = epoch_;
    pollfd watched{watched_.get(), POLLRDHUP, 0};
    lock.unlock();
    (void)::poll(&watched, 1, static_cast<int>(kLook.count()));
    lock.lock();
    if (epoch != epoch_) continue;
    const bool is_robbed = !watched_mark_.is_still(watched_.get());
    was_robbed_ = was_robbed_ || is_robbed;
    is_lost_ = is_lost_ || is_robbed || watched.revents != 0;
  }
}

// Looks once in kFlushPause while views come and go, and rests when none did: waking it for each release
// would cost as much as telling the daemon of each.
void Connection::flush_releases() {
  std::unique_lock lock(pool_mutex());
  while (!is_closing_) {
    const std::uint64_t seen = release_count_;
    const bool was_empty = releases_.empty();
    flusher_wake_->wait_for(lock, kFlushPause, [&] { return is_closing_; });
    if (is_closing_ || release_count_ != seen) continue;  // still busy: the next request takes them along
    if (!was_empty && !releases_.empty() && !is_lost_) {
      lock.unlock();
      notify([](Builder& b) { return wire::CreateRelease(b); });
      lock.lock();
      continue;
    }
    is_flusher_resting_ = true;
    flusher_wake_->wait(lock, [&] { return is_closing_ || release_count_ != seen; });
    is_flusher_resting_ = false;
  }
}

Connection::~Connection() {
  if (generation_ != fork_generation()) {
    leave_threads_to_parent();
    return;
  }
  {
    const std::lock_guard lock(pool_mutex());
    is_closing_ = true;
    for (const Channel* channel : opening_) channel->shutdown();
    if (watched_mark_.is_still(watched_.get())) ::shutdown(watched_.get(), SHUT_RDWR);  // wakes the watcher
    channel_free_->notify_all();
    flusher_wake_->notify_one();
  }
  if (flusher_) flusher_->join();
  if (watcher_) watcher_->join();
  const std::lock_guard lock(pool_mutex());
  let_go_of_watched();
}

Result<std::shared_ptr<Mapping>> Connection::map_shared(std::uint64_t id, int fd, std::uint64_t size_bytes) {
  {
    const std::lock_guard lock(pool_mutex());
    if (const auto at = mappings_.find(id); at != mappings_.end()) {
      if (auto mapping = at->second.lock()) return mapping;
    }
  }
  auto mapped = Mapping::map(fd, size_bytes, Access::read_only);
  if (!mapped) return error_of(std::move(mapped));
  auto mapping = std::make_shared<Mapping>(*std::move(mapped));
  keep_mapping(id, mapping);
  return mapping;
}

void Connection::keep_mapping(std::uint64_t id, const std::shared_ptr<Mapping>& mapping) {
  const std::lock_guard lock(pool_mutex());
  mappings_[id] = mapping;
}

void Connection::forget_mapping(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (const auto at = mappings_.find(id); at != mappings_.end() && at->second.expired()) mappings_.erase(at);
}

}  // namespace cowmgr::detail
