// Views: one mapping for each process, counted by the daemon, and valid whatever happens to the name.
#include <algorithm>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr std::size_t kSize = 100'000;

class Views : public DaemonTest {
 protected:
  [[nodiscard]] static Result<Array> put(const Client& client, const std::string& name, unsigned seed = 1,
                                         const CreateOptions& options = {}) {
    return client.put(name, {Dtype::of<std::uint8_t>(), {kSize}}, pattern_bytes(kSize, seed), options);
  }
  [[nodiscard]] static Result<EvictReport> evict(const Client& client, std::vector<std::string> patterns) {
    return client.evict(patterns);
  }
  [[nodiscard]] static std::uint32_t views_of(const Client& client, const std::string& name) {
    return client.stat(name)->array.views;
  }
  // What was released may still be on its way: the daemon is told by itself, or with the next request.
  [[nodiscard]] static bool nothing_is_viewed(const Client& client) {
    return eventually([&] { return client.ping()->viewed_bytes == 0; });
  }
};

TEST_F(Views, ShareOneMappingInAProcess) {
  const Client client = connect();
  const auto written = put(client, "a");
  const auto first = client.attach("a");
  const auto second = client.attach("a");
  ASSERT_THAT(second, Succeeds());
  EXPECT_EQ(first->bytes().data(), written->bytes().data());
  EXPECT_EQ(second->bytes().data(), written->bytes().data());
}

TEST_F(Views, OfCopiesOnWriteArePrivate) {
  const Client client = connect();
  const auto shared = put(client, "a");
  auto one = client.attach("a", {.view = View::copy_on_write});
  auto two = client.attach("a", {.view = View::copy_on_write});
  ASSERT_THAT(two, Succeeds());
  std::fill(one->mutable_bytes()->begin(), one->mutable_bytes()->end(), std::byte{0xAA});
  (*two->mutable_as<std::uint8_t>())[5] = 0xBB;
  EXPECT_EQ(copy_of(shared->bytes()), pattern_bytes(kSize));
  EXPECT_EQ(two->bytes()[5], std::byte{0xBB});
  EXPECT_EQ(two->bytes()[6], pattern_bytes(kSize)[6]);
  EXPECT_EQ(one->bytes()[6], std::byte{0xAA});
  EXPECT_EQ(copy_of(client.attach("a")->bytes()), pattern_bytes(kSize));
}

TEST_F(Views, AreCounted) {
  const Client client = connect("counter");
  const Client other = connect("other");
  auto written = put(client, "a");
  EXPECT_EQ(views_of(other, "a"), 1U) << "the writer's";
  {
    const auto first = client.attach("a");
    const auto second = client.attach("a", {.view = View::copy_on_write});
    const auto third = other.attach("a");
    EXPECT_EQ(views_of(other, "a"), 4U);
    const auto details = other.stat("a");
    ASSERT_EQ(details->holders.size(), 2U);
    EXPECT_EQ(details->holders[0].views, 3U);
    EXPECT_EQ(details->holders[0].command, "counter");
    EXPECT_EQ(details->holders[1].views, 1U);
    EXPECT_GE(details->resident_bytes, kSize);
    EXPECT_EQ(other.list()->front().views, 4U);
    EXPECT_EQ(other.ping()->viewed_bytes, details->array.segment_bytes);
  }
  ASSERT_TRUE(eventually([&] { return views_of(other, "a") == 1; })) << "the other three were released";
  { const Array last = *std::move(written); }
  ASSERT_TRUE(eventually([&] { return views_of(other, "a") == 0; }));
  EXPECT_EQ(other.ping()->viewed_bytes, 0U);
}

TEST_F(Views, GoWithTheirProcess) {
  const Client client = connect();
  (void)put(client, "a");
  Child reader([&](const Link& test) {
    const Client own = connect();
    std::vector<Array> views;
    for (int i = 0; i < 10; ++i) views.push_back(own.attach("a").value());
    test.say("ten views");
    test.await_word();
  });
  reader.expect("ten views");
  ASSERT_TRUE(eventually([&] { return views_of(client, "a") == 10; }));
  reader.kill();
  ASSERT_TRUE(eventually([&] { return views_of(client, "a") == 0; }));
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
}

// ---- Replacing ----

TEST_F(Views, OfAReplacedArrayKeepTheirBytes) {
  const Client client = connect();
  const Client other = connect();
  auto old = put(client, "a", 1);
  auto held = other.attach("a");
  const std::uint64_t one = client.ping()->used_bytes;
  auto fresh = put(client, "a", 2, {.replace = true});
  ASSERT_THAT(fresh, Succeeds());
  EXPECT_EQ(fresh->version(), 2U);
  EXPECT_EQ(copy_of(old->bytes()), pattern_bytes(kSize, 1));
  EXPECT_EQ(copy_of(held->bytes()), pattern_bytes(kSize, 1));
  EXPECT_EQ(copy_of(other.attach("a")->bytes()), pattern_bytes(kSize, 2));
  EXPECT_EQ(client.ping()->used_bytes, 2 * one) << "the old version drains";
  EXPECT_EQ(client.list()->front().state, ArrayState::draining);

  { const Array gone = *std::move(old); }
  EXPECT_EQ(copy_of(held->bytes()), pattern_bytes(kSize, 1));
  { const Array gone = *std::move(held); }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == one; })) << "it went with its last view";
  EXPECT_EQ(client.list()->size(), 1U);
}

TEST_F(Views, AreOfTheOldVersionUntilTheNewOneIsSealed) {
  const Client client = connect();
  (void)put(client, "a", 1);
  auto writer = client.create("a", {Dtype::of<std::uint8_t>(), {3}}, {.replace = true});
  ASSERT_THAT(writer, Succeeds());
  EXPECT_EQ(client.attach("a")->version(), 1U);
  ASSERT_THAT(writer->seal(), Succeeds());
  EXPECT_EQ(client.attach("a")->version(), 2U);
  EXPECT_EQ(client.attach("a")->bytes().size(), 3U);
}

// ---- Evicting and pinning ----

TEST_F(Views, OutliveAnEviction) {
  const Client client = connect();
  auto view = put(client, "a");
  const auto report = evict(client, {"a"});
  ASSERT_THAT(report, Succeeds());
  EXPECT_THAT(report->names, testing::ElementsAre("a"));
  EXPECT_EQ(report->freed_bytes, 0U) << "somebody reads it";
  EXPECT_THAT(client.attach("a"), FailsWith(Errc::not_found));
  EXPECT_EQ(copy_of(view->bytes()), pattern_bytes(kSize));
  EXPECT_GT(client.ping()->used_bytes, kSize);

  ASSERT_THAT(put(client, "a", 2), Succeeds()) << "the name is free at once";
  EXPECT_EQ(copy_of(view->bytes()), pattern_bytes(kSize));
  ASSERT_THAT(evict(client, {"a"}), Succeeds());
  { const Array gone = *std::move(view); }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(Views, DoNotSeePinnedArraysGo) {
  const Client client = connect();
  (void)put(client, "a", 1, {.evictable = true});
  (void)put(client, "b", 1, {.evictable = true});
  const std::vector<std::string> a = {"a"};
  ASSERT_TRUE(nothing_is_viewed(client));
  EXPECT_THAT(*client.pin(a), testing::ElementsAre("a"));
  EXPECT_THAT(evict(client, {"a"}), FailsWith(Errc::pinned));
  EXPECT_THAT(evict(client, {"a", "b"}), FailsWith(Errc::pinned));
  EXPECT_THAT(client.evict_lru(1ULL << 40U)->names, testing::ElementsAre("b"));
  EXPECT_EQ(client.ping()->pinned_bytes, client.ping()->used_bytes);
  EXPECT_THAT(*client.pin(a, false), testing::ElementsAre("a"));
  EXPECT_EQ(evict(client, {"a"})->freed_bytes, segment_bytes(kSize));
  const std::vector<std::string> missing = {"missing"};
  EXPECT_THAT(client.pin(missing), FailsWith(Errc::not_found));
}

TEST_F(Views, AreEvictedByPattern) {
  const Client client = connect();
  for (const std::string name : {"job/1", "job/2", "job/30", "other"}) (void)put(client, name);
  ASSERT_TRUE(nothing_is_viewed(client));
  const auto evict_matching = [&](std::vector<std::string> patterns) {
    return client.evict_matching(patterns);
  };
  EXPECT_THAT(evict(client, {"job/?"}), FailsWith(Errc::not_found)) << "there is none of that name";
  EXPECT_THAT(evict_matching({"job/?", "nothing*"}), FailsWith(Errc::not_found));
  EXPECT_EQ(client.list()->size(), 4U) << "all or none";
  EXPECT_THAT(evict_matching({"job/?"})->names, testing::UnorderedElementsAre("job/1", "job/2"));
  EXPECT_THAT(evict_matching({"j*", "*er", "other"})->names,
              testing::UnorderedElementsAre("job/30", "other"));
  EXPECT_EQ(client.ping()->used_bytes, 0U) << "what is free after the answer is free";
}

TEST_F(Views, LetTheLeastRecentlyUsedGoFirst) {
  const Client client = connect();
  for (const std::string name : {"a", "b", "c", "d"}) {
    (void)put(client, name);
    ASSERT_TRUE(nothing_is_viewed(client)) << "the release, too, is a use";
  }
  ASSERT_THAT(client.attach("a"), Succeeds());
  ASSERT_TRUE(nothing_is_viewed(client));
  const auto held = client.attach("b");
  EXPECT_THAT(client.evict_lru(1)->names, testing::ElementsAre("c"));
  EXPECT_THAT(client.evict_lru(1ULL << 40U)->names, testing::ElementsAre("d", "a"));
  EXPECT_EQ(client.list()->size(), 1U);
}

TEST_F(Views, AreNotEvictedWhileTheArrayIsWritten) {
  const Client client = connect();
  const auto writer = client.create("a", {Dtype::of<std::uint8_t>(), {3}});
  EXPECT_THAT(evict(client, {"a"}), FailsWith(Errc::busy));
}

// ---- Looking ----

TEST_F(Views, AreListedHoweverManyThereAre) {
  constexpr int kCount = 1600;
  const Client client = connect();
  for (int i = 0; i < kCount; ++i) {
    ASSERT_THAT(client.put<std::uint8_t>("n" + std::to_string(i), std::vector<std::uint8_t>{7}, {1}),
                Succeeds());
  }
  const auto all = client.list();
  ASSERT_THAT(all, Succeeds());
  ASSERT_EQ(all->size(), static_cast<std::size_t>(kCount));
  for (int i = 0; i < kCount; ++i)
    EXPECT_EQ((*all)[static_cast<std::size_t>(i)].name, "n" + std::to_string(i)) << "in order of creation";
  EXPECT_EQ(client.list_matching("n1?")->size(), 10U);
  EXPECT_EQ(client.list_matching("n15*")->size(), 111U) << "n15, n150 to n159, n1500 to n1599";
  EXPECT_EQ(client.ping()->arrays, static_cast<std::uint32_t>(kCount));
  ASSERT_TRUE(nothing_is_viewed(client));
  EXPECT_EQ(client.evict_matching("*")->freed_bytes, all->size() * segment_bytes(1));
}

TEST_F(Views, OfWhatIsThere) {
  const Client client = connect("looker");
  const auto array = put(client, "a", 1, {.evictable = true, .mode = 0640});
  const auto details = client.stat("a");
  ASSERT_THAT(details, Succeeds());
  EXPECT_EQ(details->array.name, "a");
  EXPECT_EQ(details->array.spec, (ArraySpec{Dtype::of<std::uint8_t>(), {kSize}}));
  EXPECT_EQ(details->array.data_bytes, kSize);
  EXPECT_EQ(details->array.state, ArrayState::sealed);
  EXPECT_EQ(details->array.owner_uid, ::geteuid());
  EXPECT_EQ(details->array.mode, 0640U);
  EXPECT_TRUE(details->array.evictable);
  EXPECT_LE(details->array.created, details->array.sealed);
  EXPECT_THAT(shm_files(instance()), testing::Contains(details->array.segment.substr(1)));
  EXPECT_THAT(client.stat("b"), FailsWith(Errc::not_found));

  const auto clients = client.clients();
  ASSERT_EQ(clients->size(), 1U);
  EXPECT_EQ(clients->front().pid, ::getpid());
  EXPECT_EQ(clients->front().command, "looker");
  EXPECT_EQ(clients->front().views, 1U);
  const auto pong = client.ping();
  EXPECT_EQ(pong->instance, instance());
  EXPECT_EQ(pong->socket, socket());
  EXPECT_EQ(pong->pid, daemon_->pid());
  EXPECT_EQ(pong->used_bytes, details->array.segment_bytes);
}

}  // namespace
}  // namespace cowmgr::test
