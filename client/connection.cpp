#include "client/connection.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "client/server_check.hpp"
#include "proto/version.hpp"

namespace cowmgr::detail {
namespace {

// Connections of a process (the daemon allows 256 to a session). Those that wait in the daemon may take no
// more than kMaxWaits: the others are for calls that are answered at once.
constexpr std::size_t kMaxWaits = 64;
constexpr std::size_t kMaxChannels = kMaxWaits + 16;
constexpr std::size_t kMaxReleases = 512;  // in one frame

// A daemon that answers so much after the end of a wait is heard.
constexpr Milliseconds kLateAnswer{1000};
// Who does not wait at all gives a daemon that is busy, or a machine that is, so long.
constexpr Milliseconds kAnswer{20'000};
constexpr Milliseconds kPartingPatience{5000};
// Between two looks of those who would wait, but are too many.
constexpr Milliseconds kCrowdPause{50};

thread_local int partings = 0;

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

tl::unexpected<Error> no_memory() {
  return fail(Errc::out_of_memory, "this process has no memory left");
}

}  // namespace

Limit limit_of_wait(Milliseconds wait) noexcept {
  if (wait == kForever) return {};
  return Limit::after(wait.count() == 0 ? kAnswer : wait + kLateAnswer);
}

Error error_of_failure(const wire::Failure& failure) {
  return {static_cast<Errc>(failure.code()), std::string(view_of(failure.message()))};
}

Parting::Parting() noexcept {
  ++partings;
}
Parting::~Parting() {
  --partings;
}

// ---- The first channel, and what a child makes of it ----

Result<std::shared_ptr<Connection>> Connection::open(const Options& options) {
  try {
    std::shared_ptr<Connection> connection(new Connection(options));
    auto channel = connection->find_daemon(0, connection->epoch_, options.wait);
    if (!channel) return error_of(std::move(channel));
    const std::lock_guard lock(pool_mutex());
    connection->begin_with(*std::move(channel));
    return connection;
  } catch (const std::bad_alloc&) {
    return no_memory();
  }
}

// What a channel is put into has room for it, always.
void Connection::make_room() {
  idle_.reserve(kMaxChannels);
  late_.reserve(kMaxChannels);
  busy_.reserve(kMaxChannels);
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
void Connection::start_over_in_child() {
  if (generation_ == fork_generation()) return;
  generation_ = fork_generation();
  idle_.clear();
  late_.clear();
  releases_.clear();
  busy_.clear();
  opening_.clear();
  holdings_ = {};
  leave_threads_to_parent();
  flusher_wake_ = std::make_unique<std::condition_variable>();
  channel_free_ = std::make_unique<std::condition_variable>();
  is_flusher_resting_ = false;
  open_channels_ = 0;
  waiting_ = 0;
  session_ = 0;
  is_lost_ = false;
  is_reconnecting_ = false;
  was_robbed_ = false;
}

tl::unexpected<Error> Connection::lost() const {
  return fail(Errc::disconnected,
              fmt::format("the connection to the daemon at {} is lost; connect again", socket_));
}

// ---- A channel for a request ----

namespace {

// Waits until `holds`, or the limit is over. Whether it holds.
template <class Holds>
bool wait_until(std::condition_variable& change, std::unique_lock<std::mutex>& lock, const Limit& limit,
                const Holds& holds) {
  if (limit.is_set()) return change.wait_until(lock, limit.end(), holds);
  change.wait(lock, holds);
  return true;
}

}  // namespace

Limit Connection::limit() const noexcept {
  const Limit own = Limit::after(answer_);
  return partings > 0 ? Limit::after(kPartingPatience).or_earlier(own) : own;
}

Result<std::unique_ptr<Channel>> Connection::take(bool reconnects, const Limit& limit) {
  std::unique_lock lock(pool_mutex());
  start_over_in_child();
  for (;;) {
    if (!late_.empty() && !watcher_) settle_late(lock);
    // The first channel makes the session; until then nobody else can join it.
    const bool is_there = wait_until(*channel_free_, lock, limit, [&] {
      return is_lost_ || is_closing_ || !idle_.empty() || open_channels_ == 0 ||
             (session_ != 0 && open_channels_ < kMaxChannels);
    });
    if (is_closing_) return lost();
    if (!is_there)
      return fail(Errc::timed_out,
                  fmt::format("the daemon at {} answers none of the {} requests that are under "
                              "way; is it stopped?",
                              socket_, open_channels_));
    if (is_lost_ && !reconnects) return lost();
    if (is_lost_) {
      if (auto ok = reconnect(lock); !ok) return error_of(std::move(ok));
      continue;
    }
    if (!idle_.empty()) {
      auto channel = std::move(idle_.back());
      idle_.pop_back();
      busy_.push_back(channel.get());
      return channel;
    }
    const std::uint64_t epoch = epoch_;
    auto channel = add_channel(lock, limit);
    if (epoch != epoch_) continue;  // what an earlier daemon said, or gave, does not count any more
    if (channel) busy_.push_back(channel->get());
    if (channel || !is_lost_) return channel;
    if (!reconnects) return lost();
  }
}

// Called with the mutex held, which it gives up meanwhile.
Result<std::unique_ptr<Channel>> Connection::add_channel(std::unique_lock<std::mutex>& lock,
                                                         const Limit& limit) {
  ++open_channels_;
  const std::uint64_t session = session_;
  const std::uint64_t epoch = epoch_;
  lock.unlock();
  Tries tries;
  auto channel = open_channel(session, false, epoch, limit, tries);
  lock.lock();
  channel_free_->notify_all();
  if (channel || epoch != epoch_) return channel;
  --open_channels_;
  // A daemon that is gone does not answer; the next one does not know the session.
  const Errc code = channel.error().code;
  is_lost_ = is_lost_ || code == Errc::no_daemon || code == Errc::disconnected ||
             (code == Errc::permission_denied && (session != 0 || tries.was_kept_out));
  return channel;
}

Result<std::unique_ptr<Channel>> Connection::open_channel(std::uint64_t session, bool resumes,
                                                          std::uint64_t epoch, const Limit& limit,
                                                          Tries& tries) {
  try {
    return greet(session, resumes, epoch, limit, tries);
  } catch (const std::bad_alloc&) {
    return no_memory();
  }
}

Result<std::unique_ptr<Channel>> Connection::greet(std::uint64_t session, bool resumes, std::uint64_t epoch,
                                                   const Limit& limit, Tries& tries) {
  auto channel = Channel::connect(socket_, epoch, limit);
  if (!channel) {
    tries.was_kept_out = channel.error().code == Errc::permission_denied;
    return channel;
  }
  if (auto ok = check_server((*channel)->fd(), socket_, daemon_user_); !ok) return error_of(std::move(ok));
  const Opening opening(opening_, channel->get());
  (*channel)->finish(wire::CreateHelloDirect((*channel)->builder(), kProtocolVersion, command_.c_str(),
                                             session, resumes, kLayoutVersion));
  const auto reply = (*channel)->exchange(limit);
  if (!reply) {
    if (reply.error().code == Errc::disconnected && (*channel)->was_read()) ++tries.deaths;
    if (reply.error().code == Errc::timed_out)
      return fail(Errc::timed_out, fmt::format("the daemon at {} does not answer; is it stopped?", socket_));
    return error_of(reply);
  }
  if (const auto* failure = (*reply)->body_as_Failure()) return tl::unexpected(error_of_failure(*failure));
  const auto* welcome = (*reply)->body_as_Welcome();
  if (welcome == nullptr) return fail(Errc::protocol_error, "the daemon does not greet");
  if (session == 0 || resumes) {
    const std::lock_guard lock(pool_mutex());
    if (epoch == epoch_) session_ = welcome->session();
  }
  return channel;
}

// ---- A request ----

Result<Connection::Use> Connection::begin_use(bool reconnects, const Limit& limit) {
  auto channel = take(reconnects, limit);
  if (!channel) return error_of(std::move(channel));
  Use use(*this, *std::move(channel));
  use.released = take_releases();
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
                            socket_));
  if (reply.error().code != Errc::disconnected) return reply;
  attempt.is_again = attempt.is_again || channel.was_sent();
  if (!channel.is_intact()) {  // nobody died
    attempt.may_try_again = attempt.is_repeatable;
    return reply;
  }
  attempt.deaths += channel.was_read() ? 1 : 0;
  if (attempt.patience != nullptr) attempt.patience->look_first();
  if (attempt.deaths < kMostDeaths) {
    attempt.may_try_again = attempt.is_repeatable;
    return fail(
        Errc::disconnected,
        fmt::format("the daemon at {} went away; whether the request was carried out is not known", socket_));
  }
  return fail(
      Errc::disconnected,
      fmt::format("the daemon at {} went away, and so did the next, while this request was under way; it is "
                  "not sent a third time",
                  socket_));
}

void Connection::end_use(Use& use) noexcept {
  Unkept unkept;
  try {
    if (!use.granted.is_empty()) unkept.push_back(std::move(use.granted));
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
  end_use(std::move(use.channel), use.released, std::move(unkept), Limit::after(kPartingPatience));
}

void Connection::end_use(std::unique_ptr<Channel> channel, const std::vector<std::uint64_t>& released,
                         Unkept unkept, const Limit& limit) noexcept {
  std::vector<std::uint64_t> views;
  try {
    if (!channel->was_sent()) views = released;
    while (channel->state() == Channel::State::ready && !unkept.empty()) {
      Grants& next = unkept.back();
      views.insert(views.end(), next.views.begin(), next.views.end());
      next.views.clear();
      if (next.finish_next(*channel))
        (void)channel->exchange(limit);  // nothing of what may be answered helps
      else
        unkept.pop_back();
    }
    const std::lock_guard lock(pool_mutex());
    if (generation_ == fork_generation() && channel->epoch() == epoch_)
      releases_.insert(releases_.end(), views.begin(), views.end());
  } catch (const std::bad_alloc&) {  // what could not be told goes with the session
  }
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;  // a channel of the parent, in a child
  if (!views.empty() && !is_lost_) wake_flusher();
  put_back(std::move(channel), std::move(unkept));
}

// Called with the mutex held.
void Connection::put_back(std::unique_ptr<Channel> channel, Unkept unkept) noexcept {
  std::erase(busy_, channel.get());
  channel_free_->notify_all();  // who reconnects waits for it too
  if (channel->epoch() != epoch_) return;
  switch (channel->state()) {
    case Channel::State::ready:
      idle_.push_back(std::move(channel));
      return;
    case Channel::State::owed:
      late_.push_back({std::move(channel), std::move(unkept)});
      start_watcher();
      return;
    default:
      was_robbed_ = was_robbed_ || !channel->is_intact();
      --open_channels_;
      // The session ended with the daemon, or with its last channel.
      is_lost_ = is_lost_ || channel->state() == Channel::State::ended || open_channels_ == 0;
  }
}

// After the replies that the daemon owes already, if it does. Called with the mutex held.
bool Connection::give_back_later(Grants& grants) {
  if (late_.empty() || generation_ != fork_generation()) return false;
  auto& unkept = late_.back().unkept;
  unkept.insert(unkept.begin(), std::move(grants));
  return true;
}

bool Connection::give_back(Grants grants) noexcept {
  try {
    {
      const std::lock_guard lock(pool_mutex());
      if (give_back_later(grants)) return false;
    }
    auto channel = take(false, Limit::after(kPartingPatience));
    if (channel) {
      Unkept unkept;
      unkept.push_back(std::move(grants));
      const Channel* const address = channel->get();
      end_use(*std::move(channel), {}, std::move(unkept), Limit::after(kPartingPatience));
      const std::lock_guard lock(pool_mutex());
      return std::none_of(late_.begin(), late_.end(),
                          [&](const Late& late) { return late.channel.get() == address; });
    }
    const std::lock_guard lock(pool_mutex());
    (void)give_back_later(grants);
  } catch (const std::bad_alloc&) {  // it goes with the session
  }
  return false;
}

// ---- What this process has ----

void Connection::keep(Grants& granted, const WritingRequest* writing) {
  const std::lock_guard lock(pool_mutex());
  // A copy, as long as something can fail.
  std::map<std::uint64_t, WritingRequest> added;
  if (writing != nullptr) added.emplace(granted.array, *writing);
  std::size_t counted = 0;
  try {
    for (; counted < granted.views.size(); ++counted) ++holdings_.views[granted.views[counted]];
    for (std::size_t i = 0; i < granted.slots.size(); ++i)
      holdings_.slots.insert_or_assign({granted.set, granted.slots[i]}, granted.attempts[i]);
  } catch (const std::bad_alloc&) {
    for (std::size_t i = 0; i < counted; ++i) forget_view(granted.views[i]);
    for (const std::uint64_t slot : granted.slots) holdings_.slots.erase({granted.set, slot});
    throw;
  }
  holdings_.writing.merge(added);
  granted = {};
}

// Called with the mutex held.
void Connection::forget_view(std::uint64_t id) noexcept {
  auto& views = holdings_.views;
  if (const auto at = views.find(id); at != views.end() && --at->second == 0) views.erase(at);
}

void Connection::remove_writing(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  holdings_.writing.erase(id);
  ++ends_;
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

void Connection::release_view(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;
  forget_view(id);
  try {
    releases_.push_back(id);
  } catch (const std::bad_alloc&) {  // it goes with the session
    return;
  }
  if (!is_lost_) wake_flusher();
}

std::vector<std::uint64_t> Connection::take_releases() {
  const std::lock_guard lock(pool_mutex());
  const std::size_t count = std::min(releases_.size(), kMaxReleases);
  std::vector<std::uint64_t> ids(releases_.end() - static_cast<std::ptrdiff_t>(count), releases_.end());
  releases_.resize(releases_.size() - count);
  return ids;
}

Result<std::shared_ptr<Mapping>> Connection::map(const ArrayInfo& info, int fd, View view) {
  const bool is_shared = view == View::shared;
  if (is_shared) {
    const std::lock_guard lock(pool_mutex());
    if (const auto at = mappings_.find(info.id); at != mappings_.end()) {
      if (auto mapping = at->second.lock()) return mapping;
    }
  }
  auto mapped = map_segment(fd, info.segment_bytes, data_end(info),
                            is_shared ? Access::read_only : Access::copy_on_write);
  if (!mapped) return error_of(std::move(mapped));
  auto mapping = std::make_shared<Mapping>(*std::move(mapped));
  if (is_shared) keep_mapping(info.id, mapping);
  return mapping;
}

void Connection::keep_mapping(std::uint64_t id, const std::shared_ptr<Mapping>& mapping) noexcept {
  const std::lock_guard lock(pool_mutex());
  try {
    mappings_[id] = mapping;
  } catch (const std::bad_alloc&) {  // the next view gets a mapping of its own
  }
}

void Connection::forget_mapping(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (const auto at = mappings_.find(id); at != mappings_.end() && at->second.expired()) mappings_.erase(at);
}

// ---- Waiting ----

bool Connection::begin_turn(Milliseconds pause) {
  std::unique_lock lock(pool_mutex());
  start_over_in_child();
  if (!channel_free_->wait_for(lock, pause, [&] { return waiting_ < kMaxWaits; })) return false;
  ++waiting_;
  return true;
}

void Connection::end_turn() noexcept {
  const std::lock_guard lock(pool_mutex());
  if (generation_ != fork_generation()) return;
  --waiting_;
  channel_free_->notify_all();
}

Patience::Patience(Connection& connection, Milliseconds wait)
    : connection_(connection), wait_(wait), end_(Limit::after(wait)), answer_(limit_of_wait(wait)) {}

Patience::~Patience() {
  if (has_turn_ && generation_ == fork_generation()) connection_.end_turn();
}

void Patience::next() {
  is_look_ = false;
  if (wait_.count() == 0) return;
  has_turn_ = has_turn_ || connection_.begin_turn(is_crowded_ ? kCrowdPause : Milliseconds(0));
  is_crowded_ = !has_turn_;
  is_look_ = is_crowded_;
  const auto left = std::chrono::ceil<Milliseconds>(end_.end() - Limit::Clock::now());
  const auto most = end_.is_set() ? std::clamp(left, Milliseconds(0), kLongestPoll) : kLongestPoll;
  wait_ms_ = static_cast<std::uint32_t>(most.count());
}

Limit Patience::limit() const noexcept {
  const Milliseconds answer = connection_.answer_;
  return answer == kForever ? answer_ : answer_.or_earlier(Limit::after(Milliseconds(wait_ms()) + answer));
}

bool Patience::may_ask_again(const Error& error) const {
  if (is_over()) return false;
  return error.code == Errc::timed_out || (is_look_ && error.code == Errc::not_found);
}

Error Patience::last_word(const Error& error) const {
  if (!is_look_ || wait_.count() == 0 || error.code != Errc::not_found) return error;
  return {Errc::timed_out, fmt::format("{}; it did not come within {} ms", error.message, wait_.count())};
}

}  // namespace cowmgr::detail
