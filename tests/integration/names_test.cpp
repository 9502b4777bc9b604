// Names are names and patterns are patterns, for today's clients and for those that never said which they
// meant.
#include <chrono>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using Texts = std::vector<std::string>;

class Names : public DaemonTest {
 protected:
  void put(const Texts& names) {
    const Client client = connect();
    for (const auto& name : names)
      ASSERT_THAT(client.put<std::uint8_t>(name, std::vector<std::uint8_t>{7}, {1}), Succeeds()) << name;
  }
  static Texts names_of(const Result<std::vector<ArrayInfo>>& arrays) {
    Texts names;
    for (const auto& array : arrays.value()) names.push_back(array.name);
    return names;
  }
  // The names that the daemon answers with.
  template <class Build>
  static Texts ask(RawPeer& peer, const Build& build) {
    const auto* names = peer.ask<wire::Names>(build);
    Texts out;
    if (names == nullptr) return {"refused"};
    for (const auto* name : *names->names()) out.emplace_back(view_of(name));
    return out;
  }
};

TEST_F(Names, HoldWhateverCharactersTheyWant) {
  put({"w0", "w[0]", "*"});
  const Client client = connect();
  EXPECT_THAT(names_of(client.list("w[0]")), ElementsAre("w[0]"));
  EXPECT_THAT(names_of(client.list("*")), ElementsAre("*"));
  EXPECT_THAT(names_of(client.list("w?")), IsEmpty());
  const Texts bracket = {"w[0]"};
  EXPECT_THAT(client.pin(bracket), Succeeds());
  EXPECT_FALSE(client.list("w0")->front().pinned);
  EXPECT_THAT(client.pin(bracket, false), Succeeds());
  EXPECT_THAT(client.evict(bracket)->names, ElementsAre("w[0]"));
  EXPECT_THAT(client.evict(bracket), FailsWith(Errc::not_found)) << "and not w0";
  const Texts star = {"*"};
  EXPECT_THAT(client.evict(star)->names, ElementsAre("*"));
  EXPECT_THAT(client.evict(star), FailsWith(Errc::not_found));
  EXPECT_THAT(names_of(client.list()), ElementsAre("w0"));
}

TEST_F(Names, OfResultSetsToo) {
  const Client client = connect();
  const auto one = client.create_ragged("r[1]", 1);
  const auto two = client.create_ragged("r1", 1);
  ASSERT_THAT(client.list_results("r[1]"), Succeeds());
  EXPECT_EQ(client.list_results("r[1]")->front().name, "r[1]");
  EXPECT_EQ(client.list_results("r[1]")->size(), 1U);
  EXPECT_THAT(*client.list_results("r*"), IsEmpty());
  EXPECT_EQ(client.list_results_matching("r*")->size(), 2U);
}

TEST_F(Names, ArePassedOverWhenAPatternMatchesWhatIsPinned) {
  put({"a1", "a2"});
  const Client client = connect();
  const Texts one = {"a1"};
  ASSERT_THAT(client.pin(one), Succeeds());
  const auto evicted = client.evict_matching("a*");
  ASSERT_THAT(evicted, Succeeds());
  EXPECT_THAT(evicted->names, ElementsAre("a2"));
  EXPECT_THAT(evicted->passed_over, ElementsAre("a1"));
}

// As clients of 0.1.0 ask: `patterns` alone.
TEST_F(Names, MeanWhatTheyMeantToOlderClients) {
  put({"a1", "a2", "*", "w[0]"});
  RawPeer peer = RawPeer::greeted(socket());
  const auto evict = [](const Texts& texts) {
    return [texts](RawPeer::Builder& b) { return wire::CreateEvict(b, b.CreateVectorOfStrings(texts)); };
  };
  const auto pin = [](const Texts& texts) {
    return [texts](RawPeer::Builder& b) { return wire::CreatePin(b, b.CreateVectorOfStrings(texts), false); };
  };
  EXPECT_THAT(ask(peer, pin({"a?"})), ElementsAre("a1", "a2"));
  EXPECT_THAT(ask(peer, evict({"*"})), ElementsAre("*")) << "the name comes first";
  EXPECT_THAT(ask(peer, evict({"w[0]", "a1"})), ElementsAre("a1", "w[0]"));
  EXPECT_THAT(ask(peer, evict({"*"})), ElementsAre("a2")) << "then it is a pattern";
}

// 64 patterns of bracket classes held against 500 names took the daemon 18 s, in which it served nobody.
TEST_F(Names, HoldUpNobodyWhilePatternsAreMatched) {
  Texts names;
  for (int i = 0; i < 500; ++i) names.push_back(std::string(250, 'a') + fmt::format("{:05}", i));
  put(names);
  std::string classes;
  while (classes.size() + 6 < 505) classes += "*[a-b]";
  for (const std::string& pattern : {classes + "c", "*" + std::string(125, 'a') + "b*"}) {
    RawPeer peer = RawPeer::greeted(socket());
    const auto start = std::chrono::steady_clock::now();
    peer.request([&](RawPeer::Builder& b) {
      return wire::CreateEvict(b, b.CreateVectorOfStrings(Texts(64, pattern)));
    });
    EXPECT_THAT(connect().ping(), Succeeds());
    const auto* reply = peer.receive();
    ASSERT_NE(reply, nullptr);
    EXPECT_NE(reply->body_as_Failure(), nullptr);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10)) << pattern;
  }
}

}  // namespace
}  // namespace cowmgr::test
