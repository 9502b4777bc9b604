// The parts of a connection, each by itself: no daemon, or a socket that nobody reads.
#include <cstdint>
#include <filesystem>
#include <future>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/channel_pool.hpp"
#include "client/fork_guard.hpp"
#include "client/holdings.hpp"
#include "client/patience.hpp"
#include "client/releases.hpp"
#include "client/resumption.hpp"
#include "client/turns.hpp"
#include "proto/fd_socket.hpp"

namespace cowmgr::detail {
namespace {

using std::chrono::seconds;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

// ---- Holdings ----

// The ids of the views, and how many slots, that a daemon is told of.
struct Told {
  std::vector<std::uint64_t> views{};
  std::size_t slots = 0;
  std::size_t frames = 0;
};
Told told_of(const Holdings& holdings) {
  Told told;
  Builder builder;
  const auto new_builder = [&]() -> Builder& {
    builder.Clear();
    return builder;
  };
  const auto send = [&](Offset<wire::Hold> table) -> Result<void> {
    builder.Finish(table);
    const auto& hold = *flatbuffers::GetRoot<wire::Hold>(builder.GetBufferPointer());
    told.views.insert(told.views.end(), hold.ids()->begin(), hold.ids()->end());
    for (const auto* set : *hold.slots()) told.slots += set->slots()->size();
    ++told.frames;
    return {};
  };
  EXPECT_TRUE(holdings.tell(new_builder, send));
  return told;
}

TEST(Holdings, CountsViewsAsOftenAsTheyWereKept) {
  Holdings holdings;
  Grants granted{.views = {7, 7, 8}};
  holdings.keep(granted, nullptr);
  EXPECT_TRUE(granted.is_empty());
  holdings.forget_view(7);
  holdings.forget_view(8);
  holdings.forget_view(9);  // never held
  EXPECT_THAT(told_of(holdings).views, ElementsAre(7));
}

TEST(Holdings, SaysAllInFramesThatFit) {
  Holdings holdings;
  Grants granted{.views = std::vector<std::uint64_t>(20'000), .set = 3};
  std::iota(granted.views.begin(), granted.views.end(), std::uint64_t{1});
  granted.slots.resize(5'000);
  std::iota(granted.slots.begin(), granted.slots.end(), std::uint64_t{0});
  granted.attempts.resize(granted.slots.size(), 1);
  holdings.keep(granted, nullptr);
  const Told told = told_of(holdings);
  EXPECT_THAT(told.views, SizeIs(20'000));
  EXPECT_EQ(told.slots, 5'000U);
  EXPECT_GT(told.frames, 1U);
}

TEST(Holdings, CountsEndsForADaemonThatWasToldBefore) {
  Holdings holdings;
  Grants granted{.set = 3, .slots = {5}, .attempts = {1}};
  holdings.keep(granted, nullptr);
  const auto before = holdings.ends();
  holdings.forget_slot(3, 5, 1);
  EXPECT_GT(holdings.ends(), before);
  EXPECT_EQ(told_of(holdings).slots, 0U);
}

TEST(Holdings, KeepASlotThatWasLeasedOnceMore) {
  Holdings holdings;
  Grants first{.set = 3, .slots = {5}, .attempts = {1}};
  holdings.keep(first, nullptr);
  Grants second{.set = 3, .slots = {5}, .attempts = {2}};
  holdings.keep(second, nullptr);
  holdings.forget_slot(3, 5, 1);
  EXPECT_EQ(told_of(holdings).slots, 1U);
  holdings.forget_slot(3, 5, 2);
  EXPECT_EQ(told_of(holdings).slots, 0U);
}

// ---- Turns ----

TEST(Turns, AreLimitedAndComeBack) {
  Turns turns;
  for (std::size_t i = 0; i < kMaxWaits; ++i) ASSERT_TRUE(turns.begin(Milliseconds(0)));
  EXPECT_FALSE(turns.begin(Milliseconds(0)));
  turns.end();
  EXPECT_TRUE(turns.begin(Milliseconds(0)));
}

// ---- Patience ----

// Whose time ends between two requests asks once more, without a wait: that it is not there has waited, too.
TEST(PatienceOfACaller, EndsAsAWaitHoweverLittleWasLeftOfIt) {
  Turns turns;
  Patience patience(turns, Milliseconds(1), kForever);
  patience.next();
  const Error missing{Errc::not_found, "there is no array"};
  while (!patience.is_over()) {
  }
  patience.next();
  EXPECT_EQ(patience.wait_ms(), 0U);
  EXPECT_FALSE(patience.may_ask_again(missing));
  EXPECT_EQ(patience.last_word(missing).code, Errc::timed_out);
  Patience none(turns, Milliseconds(0), kForever);
  none.next();
  EXPECT_EQ(none.last_word(missing).code, Errc::not_found) << "it was asked for without a wait";
}

// ---- Releases ----

// Whose thread hands what it takes to the test.
class ToldReleases {
 public:
  explicit ToldReleases(bool has_daemon) : has_daemon_(has_daemon) {}
  ToldReleases(const ToldReleases&) = delete;
  ToldReleases& operator=(const ToldReleases&) = delete;
  ~ToldReleases() {
    {
      const std::lock_guard lock(pool_mutex());
      releases_.close();
    }
    releases_.join();
  }

  void add(const std::vector<std::uint64_t>& ids) {
    const std::lock_guard lock(pool_mutex());
    releases_.add(ids);
  }
  std::vector<std::uint64_t> take() {
    const std::lock_guard lock(pool_mutex());
    return releases_.take();
  }
  void find_daemon() {
    const std::lock_guard lock(pool_mutex());
    has_daemon_ = true;
    releases_.wake();
  }
  std::vector<std::uint64_t> told() { return told_.get_future().get(); }
  void wait_until_asked() { asked_.get_future().wait(); }

 private:
  bool tell() {
    const std::lock_guard lock(pool_mutex());
    if (!std::exchange(was_asked_, true)) asked_.set_value();
    if (has_daemon_) told_.set_value(releases_.take());
    return has_daemon_;
  }

  bool has_daemon_;
  bool was_asked_ = false;
  std::promise<void> asked_;
  std::promise<std::vector<std::uint64_t>> told_;
  Releases releases_{[this] { return tell(); }};
};

TEST(Releases, AreToldByTheirThreadWhenNoRequestTakesThem) {
  ToldReleases releases(true);
  releases.add({4, 5});
  EXPECT_THAT(releases.told(), UnorderedElementsAre(4, 5));
  EXPECT_THAT(releases.take(), IsEmpty());
}

TEST(Releases, WaitForADaemonThatIsThereAgain) {
  ToldReleases releases(false);
  releases.add({4});
  releases.wait_until_asked();
  releases.find_daemon();
  EXPECT_THAT(releases.told(), ElementsAre(4));
}

TEST(Releases, GoWithRequestsInPartsThatFitAFrame) {
  ToldReleases releases(false);
  releases.add(std::vector<std::uint64_t>(513, 9));
  EXPECT_THAT(releases.take(), SizeIs(512));
  EXPECT_THAT(releases.take(), SizeIs(1));
}

// ---- ChannelPool, Resumption ----

// A socket whose connections nobody reads, and a pool with a first channel to it.
class ChannelPoolTest : public ::testing::Test {
 protected:
  void listen() {
    auto socket = listen_at(path_, 0600);
    ASSERT_TRUE(socket) << socket.error().message;
    listener_ = *std::move(socket);
  }
  void begin_session() {
    auto channel = Channel::connect(path_, pool_.epoch(), Limit::after(seconds(10)));
    ASSERT_TRUE(channel) << channel.error().message;
    const std::lock_guard lock(pool_mutex());
    pool_.begin_session(*std::move(channel), 77);
  }
  std::unique_ptr<Channel> take() {
    std::unique_lock lock(pool_mutex());
    auto channel = pool_.take(lock, Limit::now());
    EXPECT_TRUE(channel) << channel.error().message;
    return channel ? *std::move(channel) : nullptr;
  }
  bool put_back(std::unique_ptr<Channel> channel, Unkept unkept = {}) {
    const std::lock_guard lock(pool_mutex());
    return pool_.put_back(std::move(channel), std::move(unkept));
  }
  // Asks, and does not wait for the answer, which never comes.
  static void leave_unanswered(Channel& channel) {
    channel.finish(wire::CreatePing(channel.builder()));
    const auto reply = channel.exchange(Limit::now());
    ASSERT_FALSE(reply);
    ASSERT_EQ(reply.error().code, Errc::timed_out);
  }
  ~ChannelPoolTest() override { std::filesystem::remove(path_); }

  std::string path_ = fmt::format("{}channel-pool-{}.sock", ::testing::TempDir(), ::getpid());
  UniqueFd listener_;
  Greeter greeter_{{.socket = path_, .command = "test", .daemon_user = {}}};
  ChannelPool pool_{greeter_};
};

TEST_F(ChannelPoolTest, GivesTheChannelThatWasPutBack) {
  listen();
  begin_session();
  auto channel = take();
  const Channel* const address = channel.get();
  EXPECT_FALSE(put_back(std::move(channel)));
  channel = take();
  EXPECT_EQ(channel.get(), address);
}

TEST_F(ChannelPoolTest, KeepsALateChannelFromOthers) {
  listen();
  begin_session();
  auto channel = take();
  leave_unanswered(*channel);
  const Channel* const address = channel.get();
  EXPECT_TRUE(put_back(std::move(channel)));
  const std::lock_guard lock(pool_mutex());
  Grants grants{.made_set = 5};
  EXPECT_TRUE(pool_.give_back_late(grants));
  const auto late = pool_.take_late();
  ASSERT_THAT(late, SizeIs(1));
  EXPECT_EQ(late.front().channel.get(), address);
  EXPECT_THAT(late.front().unkept, SizeIs(1));
  EXPECT_FALSE(pool_.has_late());
}

TEST_F(ChannelPoolTest, HasNoChannelOnceTheSessionIsLost) {
  EXPECT_EQ(take(), nullptr);  // nobody listens
  const std::lock_guard lock(pool_mutex());
  EXPECT_TRUE(pool_.is_lost());
}

TEST_F(ChannelPoolTest, ClosesChannelsOfAnEarlierEpoch) {
  listen();
  begin_session();
  auto busy = take();
  const auto epoch = pool_.epoch();
  auto ended = std::async(std::launch::async, [&] {
    std::unique_lock lock(pool_mutex());
    return pool_.end_session(lock).size();
  });
  busy->finish(wire::CreatePing(busy->builder()));
  EXPECT_FALSE(busy->exchange({}));  // it is shut down, so nothing waits for ever
  EXPECT_FALSE(put_back(std::move(busy)));
  EXPECT_EQ(ended.get(), 0U);
  EXPECT_GT(pool_.epoch(), epoch);
  EXPECT_EQ(take(), nullptr);
}

TEST_F(ChannelPoolTest, GivesNothingOnceItIsClosed) {
  listen();
  begin_session();
  {
    const std::lock_guard lock(pool_mutex());
    pool_.close();
  }
  EXPECT_EQ(take(), nullptr);
}

TEST_F(ChannelPoolTest, ResumptionSaysThatNoDaemonCameInTime) {
  Releases releases([] { return false; });
  Resumption resumption({.reconnect = Milliseconds(1)}, greeter_, pool_, releases);
  EXPECT_EQ(take(), nullptr);
  std::unique_lock lock(pool_mutex());
  const auto resumed = resumption.resume(lock);
  ASSERT_FALSE(resumed);
  EXPECT_EQ(resumed.error().code, Errc::disconnected);
  EXPECT_FALSE(resumption.is_under_way());
  EXPECT_TRUE(lock.owns_lock());
}

}  // namespace
}  // namespace cowmgr::detail
