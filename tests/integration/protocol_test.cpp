// The protocol as a stranger may use it: greetings, sessions, requests out of turn.
#include <string>
#include <sys/socket.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

class Protocol : public DaemonTest {};

auto ping() {
  return [](Builder& b) { return wire::CreatePing(b); };
}
auto hello(std::uint32_t protocol, std::uint64_t join = 0) {
  return [=](Builder& b) { return wire::CreateHelloDirect(b, protocol, "raw", join); };
}

TEST_F(Protocol, OfAnotherVersionIsRefusedInWords) {
  for (const std::uint32_t version : {0U, kProtocolVersion + 1, ~0U}) {
    RawPeer peer(socket());
    const Error refused = peer.refusal(hello(version));
    EXPECT_EQ(refused.code, Errc::protocol_mismatch);
    EXPECT_THAT(refused.message, testing::HasSubstr("version " + std::to_string(kProtocolVersion)));
    EXPECT_THAT(refused.message, testing::HasSubstr(std::to_string(version)));
    EXPECT_TRUE(peer.is_hung_up());
  }
}

TEST_F(Protocol, BeginsWithHello) {
  RawPeer peer(socket());
  EXPECT_EQ(peer.refusal(ping()).code, Errc::protocol_error);
  EXPECT_TRUE(peer.is_hung_up());
}

TEST_F(Protocol, HasOneHelloOnly) {
  RawPeer peer = RawPeer::greeted(socket());
  EXPECT_EQ(peer.refusal(hello(kProtocolVersion)).code, Errc::invalid_argument);
  EXPECT_NE(peer.ask<wire::Pong>(ping()), nullptr) << "the connection goes on";
}

TEST_F(Protocol, LetsAProcessJoinItsOwnSession) {
  RawPeer first = RawPeer::greeted(socket());
  RawPeer second(socket());
  const auto* welcome = second.ask<wire::Welcome>(hello(kProtocolVersion, first.session()));
  ASSERT_NE(welcome, nullptr);
  EXPECT_EQ(welcome->session(), first.session());
  EXPECT_EQ(second.ask<wire::Pong>(ping())->sessions(), 1U);
  first.hang_up();
  EXPECT_EQ(second.ask<wire::Pong>(ping())->sessions(), 1U) << "a session ends with its last connection";
}

TEST_F(Protocol, LetsNobodyJoinAnothersSession) {
  const RawPeer first = RawPeer::greeted(socket());
  Child other([&](const Link&) {
    for (const std::uint64_t session : {first.session(), std::uint64_t{999}}) {
      RawPeer peer(socket());
      EXPECT_EQ(peer.refusal(hello(kProtocolVersion, session)).code, Errc::permission_denied);
      EXPECT_TRUE(peer.is_hung_up());
    }
  });
  EXPECT_EQ(other.wait(), 0);
}

TEST_F(Protocol, SurvivesWhoHangsUpAtOnce) {
  const Client client = connect();
  for (int i = 0; i < 300; ++i) {
    RawPeer peer(socket());
    if (i % 3 != 0) peer.request(hello(kProtocolVersion));
    if (i % 3 == 2) peer.request(ping());
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
}

TEST_F(Protocol, AnswersRequestsThatCameTogetherInOrder) {
  const Client client = connect();
  RawPeer peer = RawPeer::greeted(socket());
  const auto list = [](Builder& b) { return wire::CreateListArrays(b); };
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(i % 2 == 0 ? peer.request(ping()) : peer.request(list));
  for (int i = 0; i < 20; ++i) {
    const auto* reply = peer.receive();
    ASSERT_NE(reply, nullptr);
    EXPECT_EQ(reply->body_type(), i % 2 == 0 ? wire::ReplyBody::Pong : wire::ReplyBody::Arrays);
  }
}

TEST_F(Protocol, EndsAWaitWhenThePeerSpeaksOutOfTurn) {
  RawPeer peer = RawPeer::greeted(socket());
  ASSERT_TRUE(peer.request([](Builder& b) {
    const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString("never")};
    return wire::CreateAttachDirect(b, &names, nullptr, 3'600'000);
  }));
  ASSERT_TRUE(peer.request(ping()));
  EXPECT_TRUE(peer.is_hung_up());
}

TEST_F(Protocol, IsNotHeldUpByWhoNeverReads) {
  const Client client = connect();
  for (int i = 0; i < 400; ++i)
    ASSERT_THAT(client.put<std::uint8_t>("n" + std::to_string(i), std::vector<std::uint8_t>{1}, {1}),
                Succeeds());
  std::vector<RawPeer> silent;
  for (int i = 0; i < 4; ++i) {
    silent.push_back(RawPeer::greeted(socket()));
    Builder builder;
    const auto frame = RawPeer::frame_of(builder, [](Builder& b) { return wire::CreateListArrays(b); });
    // Until neither side's socket holds more.
    while (::send(silent.back().socket(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT) > 0) {
    }
  }
  for (int i = 0; i < 100; ++i) EXPECT_THAT(client.attach("n1"), Succeeds());
  silent.clear();
  EXPECT_TRUE(eventually([&] { return client.ping()->sessions == 1; }));
}

TEST_F(Protocol, IgnoresWhatIsNotThePeers) {
  RawPeer peer = RawPeer::greeted(socket());
  const std::vector<std::uint64_t> ids = {0, 1, 77, ~std::uint64_t{0}};
  Builder release;
  release.Finish(wire::CreateRequestDirect(release, wire::RequestBody::Release,
                                           wire::CreateRelease(release).Union(), &ids));
  ASSERT_TRUE(peer.send(bytes_of(release)));
  ASSERT_TRUE(peer.request([](Builder& b) { return wire::CreateUnmapped(b, 77); }));
  EXPECT_EQ(peer.refusal([&](Builder& b) { return wire::CreateAttachDirect(b, nullptr, &ids); }).code,
            Errc::not_found);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateSealArray(b, 77); }).code, Errc::not_holder);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateLeaseSlots(b, 77); }).code, Errc::not_found);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateCommitSlots(b, 77); }).code, Errc::not_found);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateWaitResults(b, 77); }).code, Errc::not_found);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateStatArray(b); }).code, Errc::not_found);
  EXPECT_EQ(peer.refusal([](Builder& b) { return wire::CreateMakeArray(b); }).code, Errc::invalid_dtype);
}

// And not before, or who waits for it would ask all the time.
TEST_F(Protocol, AnswersAWaitForASettledSlotWhenOneIs) {
  const Client client = connect();
  auto set = client.create_ragged("set", 2);
  ASSERT_THAT(set, Succeeds());
  RawPeer peer = RawPeer::greeted(socket());
  ASSERT_TRUE(
      peer.request([&](Builder& b) { return wire::CreateWaitResults(b, set->info()->id, 0, 0, ~0U); }));
  ASSERT_THAT(client.ping(), Succeeds());  // the daemon has seen the wait before it
  ASSERT_THAT((*set->lease())->commit(), Succeeds());
  const auto* reply = peer.receive();
  ASSERT_NE(reply, nullptr);
  const auto* results = reply->body_as<wire::Results>();
  ASSERT_NE(results, nullptr);
  EXPECT_EQ(results->sets()->Get(0)->committed(), 1U);
}

// The memory of a set is its workers' to write: whoever made it can neither seal nor abort it as an array.
TEST_F(Protocol, KeepsTheMakerOfASetFromItsArray) {
  RawPeer peer = RawPeer::greeted(socket());
  const std::vector<std::uint64_t> shape = {8};
  const auto* made = peer.ask<wire::Results>(
      [&](Builder& b) { return wire::CreateMakeResultsDirect(b, "set", "|u1", &shape, 2); });
  ASSERT_NE(made, nullptr);
  const std::uint64_t id = made->sets()->Get(0)->id();
  EXPECT_EQ(peer.refusal([&](Builder& b) { return wire::CreateSealArray(b, id); }).code, Errc::not_holder);
  EXPECT_EQ(peer.refusal([&](Builder& b) { return wire::CreateAbortArray(b, id); }).code, Errc::not_holder);
  const auto* leased = peer.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, id); });
  ASSERT_NE(leased, nullptr);
  ASSERT_EQ(leased->slots()->size(), 1U);
  EXPECT_EQ(leased->slots()->Get(0)->slot(), 0U);
}

// A reply that would not fit a frame is refused, and counts no view.
TEST_F(Protocol, HasNoReplyThatDoesNotFitAFrame) {
  const Client client = connect();
  std::string dtype = "[";
  for (int field = 0; field < 100; ++field)
    dtype += fmt::format("('a_rather_long_name_{:03}','|u1'),", field);
  const auto wide = Dtype::parse(dtype + "]");
  ASSERT_THAT(wide, Succeeds());
  std::vector<std::string> names;
  for (int i = 0; i < 64; ++i) {
    names.push_back(fmt::format("wide {}", i));
    ASSERT_THAT(client.create(names.back(), {*wide, {1}})->seal(), Succeeds());
  }
  const auto refused = client.attach(names);
  EXPECT_THAT(refused, FailsWith(Errc::invalid_argument));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("attach fewer"));
  EXPECT_TRUE(eventually([&] { return client.ping()->viewed_bytes == 0; }));
  names.resize(16);
  EXPECT_THAT(client.attach(names), Succeeds());
}

// A request that is too large for a frame is the caller's mistake: the session, and all it holds, stays.
TEST_F(Protocol, TakesNoRequestThatDoesNotFitAFrame) {
  const Client client = connect();
  const auto array = client.put<std::uint8_t>("a", std::vector<std::uint8_t>{1}, {1});
  const std::vector<std::string> patterns(2000, std::string(100, 'p'));
  EXPECT_THAT(client.evict(patterns), FailsWith(Errc::invalid_argument));
  EXPECT_THAT(client.ping(), Succeeds());
  EXPECT_EQ(client.stat("a")->array.views, 1U);
}

}  // namespace
}  // namespace cowmgr::test
