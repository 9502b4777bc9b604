#include "client/connection.hpp"

#include <algorithm>
#include <csignal>
#include <exception>
#include <utility>

#include <fmt/format.h>

#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr::detail {
namespace {

constexpr std::size_t kMaxChannels = 64;   // of one connection; more threads than that wait for each other
constexpr std::size_t kMaxReleases = 512;  // in one frame
constexpr auto kFlushPause = std::chrono::milliseconds(1);

}  // namespace

// ---- Channel ----

Channel::Channel(UniqueFd socket)
    : socket_(std::move(socket)), buffer_(new std::byte[kMaxFrameBytes]), generation_(fork_generation()) {
  close_in_children(socket_.get());
}

Channel::~Channel() {
  // In a child the number was closed at the fork, and may be another file by now.
  if (generation_ != fork_generation())
    (void)socket_.release();
  else
    forget_fd(socket_.get());
}

Builder& Channel::builder() noexcept {
  builder_.Clear();
  return builder_;
}

Result<void> Channel::send() {
  auto sent = send_frame(socket_.get(), bytes_of(builder_));
  if (!sent) return error_of(std::move(sent));
  return {};
}

Result<const wire::Reply*> Channel::exchange() {
  auto sent = send();
  if (!sent && sent.error().code != Errc::disconnected) return error_of(std::move(sent));
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

Result<std::shared_ptr<Connection>> Connection::open(std::string socket, std::string command) {
  std::shared_ptr<Connection> connection(new Connection(std::move(socket), std::move(command)));
  auto channel = connection->take();
  if (!channel) return error_of(std::move(channel));
  connection->put_back(*std::move(channel));
  return connection;
}

// The thread exists in the parent alone. A condition variable that threads waited for at the fork waits for
// them for ever, in notify_one() as in its destructor.
void Connection::leave_threads_to_parent() noexcept {
  (void)flusher_.release();
  (void)flusher_wake_.release();
  (void)channel_free_.release();
}

// What the parent held is its own. Called with the mutex held.
void Connection::start_over_in_child() noexcept {
  if (generation_ == fork_generation()) return;
  generation_ = fork_generation();
  idle_.clear();
  releases_.clear();
  leave_threads_to_parent();
  flusher_wake_ = std::make_unique<std::condition_variable>();
  channel_free_ = std::make_unique<std::condition_variable>();
  is_flusher_resting_ = false;
  open_channels_ = 0;
  session_ = 0;
  is_lost_ = false;
}

Result<std::unique_ptr<Channel>> Connection::take() {
  std::unique_lock lock(pool_mutex());
  start_over_in_child();
  // The first channel makes the session; until then nobody else can join it.
  channel_free_->wait(lock, [&] {
    return is_lost_ || !idle_.empty() || open_channels_ == 0 ||
           (session_ != 0 && open_channels_ < kMaxChannels);
  });
  if (is_lost_) {
    return fail(Errc::disconnected,
                fmt::format("the connection to the daemon at {} is lost; connect again", socket_));
  }
  if (!idle_.empty()) {
    auto channel = std::move(idle_.back());
    idle_.pop_back();
    return channel;
  }
  ++open_channels_;
  const std::uint64_t session = session_;
  lock.unlock();
  auto channel = open_channel(session);
  lock.lock();
  if (!channel) --open_channels_;
  channel_free_->notify_one();
  return channel;
}

Result<std::unique_ptr<Channel>> Connection::open_channel(std::uint64_t session) {
  auto socket = connect_to(socket_);
  if (!socket) return error_of(std::move(socket));
  auto channel = std::make_unique<Channel>(*std::move(socket));
  channel->finish(wire::CreateHelloDirect(channel->builder(), kProtocolVersion, command_.c_str(), session));
  const auto reply = channel->exchange();
  if (!reply) return error_of(reply);
  if (const auto* failure = (*reply)->body_as_Failure()) return tl::unexpected(error_of_failure(*failure));
  const auto* welcome = (*reply)->body_as_Welcome();
  if (welcome == nullptr) return fail(Errc::protocol_error, "the daemon does not greet");
  if (session == 0) {
    const std::lock_guard lock(pool_mutex());
    session_ = welcome->session();
  }
  return channel;
}

void Connection::put_back(std::unique_ptr<Channel> channel) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;  // a channel of the parent, in a child
  idle_.push_back(std::move(channel));
  channel_free_->notify_one();
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
  channel.reset();
  if (error.code == Errc::disconnected)
    error.message = fmt::format("the daemon at {} went away; connect again when it is back", socket_);
  const std::lock_guard lock(pool_mutex());
  --open_channels_;
  // The session ended with the daemon, or with its last channel.
  is_lost_ = is_lost_ || error.code == Errc::disconnected || open_channels_ == 0;
  if (is_lost_) releases_.clear();  // or the flusher would go on trying
  channel_free_->notify_all();
  return tl::unexpected(std::move(error));
}

void Connection::release_view(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation() || is_lost_) return;
  releases_.push_back(id);
  wake_flusher();
}

// Called with the mutex held.
void Connection::wake_flusher() noexcept {
  ++release_count_;
  if (!flusher_)
    start_flusher();
  else if (is_flusher_resting_)
    flusher_wake_->notify_one();
}

// With all signals blocked: the program's handlers run in the program's threads.
void Connection::start_flusher() noexcept {
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    flusher_ = std::make_unique<std::thread>([this] { flush_releases(); });
  } catch (const std::exception&) {
    // No thread to be had: what was released goes with the next request.
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

std::vector<std::uint64_t> Connection::take_releases() {
  const std::lock_guard lock(pool_mutex());
  const std::size_t count = std::min(releases_.size(), kMaxReleases);
  std::vector<std::uint64_t> ids(releases_.end() - static_cast<std::ptrdiff_t>(count), releases_.end());
  releases_.resize(releases_.size() - count);
  return ids;
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
    if (!was_empty && !releases_.empty()) {
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
  if (!flusher_) return;
  {
    const std::lock_guard lock(pool_mutex());
    is_closing_ = true;
  }
  flusher_wake_->notify_one();
  flusher_->join();
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
