// Daemons that die of a request, or answer what no daemon would: the caller is told, and nothing worse.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/stand_in.hpp"

namespace cowmgr::test {
namespace {

using testing::HasSubstr;
using Builder = StandIn::Builder;

constexpr int kMostDeaths = 10;
constexpr std::int64_t kThreePages = 12'288;  // header, data, trailer

class StrangeDaemon : public testing::Test {
 protected:
  [[nodiscard]] Client connect(Milliseconds reconnect = std::chrono::seconds(5)) const {
    auto client = Client::connect({.socket = path(), .command = "test", .reconnect = reconnect});
    EXPECT_THAT(client, Succeeds());
    return *std::move(client);
  }
  [[nodiscard]] std::string path() const { return directory_.file("s"); }

  // A sealed array of four bytes, as the daemon describes it.
  static flatbuffers::Offset<wire::ArrayInfo> array(Builder& b, std::uint64_t segment_bytes = kThreePages,
                                                    const char* dtype = "|u1") {
    const std::vector<std::uint64_t> shape = {4};
    return wire::CreateArrayInfoDirect(b, 5, "x", 1, dtype, &shape, wire::ByteOrder::c, 4, segment_bytes);
  }

  TemporaryDirectory directory_;
};

// ---- A request that kills ----

TEST_F(StrangeDaemon, IsNotAskedAThirdTimeWhenTwoDied) {
  StandIn daemon(
      path(), [](const wire::Request&, Builder&) { return StandIn::die(); }, kMostDeaths);
  const auto refused = connect().put("a", {Dtype::of<std::uint8_t>(), {4}}, pattern_bytes(4));
  EXPECT_EQ(daemon.deaths(), 2);
  ASSERT_THAT(refused, FailsWith(Errc::disconnected));
  EXPECT_THAT(refused.error().message, HasSubstr("is not sent a third time"));
}

TEST_F(StrangeDaemon, IsNotAskedToWaitAThirdTimeWhenTwoDied) {
  StandIn daemon(
      path(), [](const wire::Request&, Builder&) { return StandIn::die(); }, kMostDeaths);
  const auto refused = connect().attach("a", {.wait = kForever});
  EXPECT_EQ(daemon.deaths(), 2);
  ASSERT_THAT(refused, FailsWith(Errc::disconnected));
}

// What waits does not kill: it goes on with the next daemon, and the one after that.
TEST_F(StrangeDaemon, LetsAWaiterGoOnWhereOthersWereToBlame) {
  std::atomic<int> waits{0};
  StandIn daemon(
      path(),
      [&](const wire::Request& request, Builder& b) {
        const auto* attach = request.body_as_Attach();
        if (attach == nullptr) return StandIn::die();
        if (attach->wait_ms() > 0 && ++waits < 5) return StandIn::die();
        const auto code = static_cast<std::uint16_t>(waits < 5 ? Errc::not_found : Errc::permission_denied);
        return StandIn::say(wire::CreateFailureDirect(b, code, "as the test wants it"));
      },
      kMostDeaths);
  EXPECT_THAT(connect().attach("a", {.wait = kForever}), FailsWith(Errc::permission_denied));
  EXPECT_EQ(daemon.deaths(), 4);
}

TEST_F(StrangeDaemon, IsAskedAgainWhenTheNextRequestIsAnother) {
  std::atomic<int> pings{0};
  StandIn daemon(
      path(),
      [&](const wire::Request&, Builder& b) {
        return ++pings % 2 == 1 ? StandIn::die() : StandIn::say(wire::CreatePong(b));
      },
      kMostDeaths);
  const Client client = connect();
  for (int i = 0; i < 4; ++i) EXPECT_THAT(client.ping(), Succeeds());
  EXPECT_EQ(daemon.deaths(), 4);
}

// ---- Answers that make no sense ----

// In a process of its own, since the library may take it for a bug of its own.
TEST_F(StrangeDaemon, IsNoReasonToAbort) {
  std::atomic<int> asked{0};
  Child program([&](const Link&) {
    const UniqueFd file(::memfd_create("segment", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(file.get(), kThreePages), 0);
    StandIn daemon(path(), [&](const wire::Request& request, Builder& b) {
      if (request.body_as_Attach() != nullptr) {
        const std::vector<flatbuffers::Offset<wire::ArrayInfo>> arrays = {array(b, asked++ == 0 ? 0 : 4096)};
        return StandIn::say(wire::CreateArraysDirect(b, &arrays), {file.get()});
      }
      if (request.body_as_MakeArray() != nullptr)
        return StandIn::say(wire::CreateCreated(b, array(b, 0)), {file.get(), file.get()});
      return StandIn::say(wire::CreateDone(b));
    });
    const Client client = connect(Milliseconds(0));
    EXPECT_THAT(client.attach("x"), FailsWith(Errc::protocol_error)) << "a segment of no bytes";
    EXPECT_THAT(client.attach("x"), FailsWith(Errc::protocol_error)) << "one that is too small for its data";
    EXPECT_THAT(client.create("x", {Dtype::of<std::uint8_t>(), {4}}), FailsWith(Errc::protocol_error));
  });
  EXPECT_EQ(program.wait(), 0);
}

// A slot that is asked for by its index is leased or refused: this one is neither.
TEST_F(StrangeDaemon, MayNotLeaseWhatItWasAskedFor) {
  Child program([&](const Link&) {
    Daemon real(directory_.file("real"), unique_instance(), {"--purge"});
    const auto helper = Client::connect({.socket = real.socket(), .command = {}});
    const auto made = helper->create_results("set", {Dtype::of<std::uint8_t>(), {4}}, 2);
    ASSERT_THAT(made, Succeeds());
    const auto listed = helper->list_results();
    const UniqueFd segment(::open(("/dev/shm" + listed->front().segment).c_str(), O_RDONLY | O_CLOEXEC));
    ASSERT_TRUE(segment);
    const std::uint64_t id = listed->front().id;
    {
      StandIn daemon(path(), [&](const wire::Request& request, Builder& b) {
        if (request.body_as_OpenResults() == nullptr) return StandIn::say(wire::CreateLeasedDirect(b));
        const std::vector<std::uint64_t> shape = {4};
        const std::vector<flatbuffers::Offset<wire::ResultsInfo>> sets = {
            wire::CreateResultsInfoDirect(b, id, "set", false, "|u1", &shape, 2, 4)};
        return StandIn::say(wire::CreateResultsDirect(b, &sets), {segment.get()});
      });
      const Client client = connect(Milliseconds(0));
      auto set = client.open_results("set");
      ASSERT_THAT(set, Succeeds());
      EXPECT_THAT(set->lease_slot(0), FailsWith(Errc::protocol_error));
    }
    EXPECT_EQ(real.stop(SIGTERM), 0);
  });
  EXPECT_EQ(program.wait(), 0);
}

// Whatever it answers, the next request is answered by the same session, and what was granted goes back.
TEST_F(StrangeDaemon, EndsNoSessionWithItsAnswers) {
  const UniqueFd file(::memfd_create("segment", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(file.get(), kThreePages), 0);
  std::atomic<int> made{0};
  std::atomic<int> aborted{0};
  std::atomic<int> released{0};
  StandIn daemon(path(), [&](const wire::Request& request, Builder& b) {
    if (request.released() != nullptr) released += static_cast<int>(request.released()->size());
    if (request.body_as_Ping() != nullptr) return StandIn::say(wire::CreatePong(b));
    if (request.body_as_AbortArray() != nullptr) ++aborted;
    if (request.body_as_Attach() != nullptr) {
      const std::vector<flatbuffers::Offset<wire::ArrayInfo>> arrays = {array(b, kThreePages, "no dtype")};
      return StandIn::say(wire::CreateArraysDirect(b, &arrays), {file.get()});
    }
    if (request.body_as_StatArray() != nullptr) {  // no frame of the protocol's
      StandIn::Answer nonsense;
      nonsense.bytes = pattern_bytes(100);
      return nonsense;
    }
    if (request.body_as_MakeArray() == nullptr) return StandIn::say(wire::CreateDone(b));
    return ++made == 1 ? StandIn::say(wire::CreateCreated(b, array(b)))  // without its descriptors
                       : StandIn::say(wire::CreateCreated(b, array(b, kThreePages, "no dtype")),
                                      {file.get(), file.get()});
  });
  const Client client = connect(Milliseconds(0));
  const ArraySpec spec{Dtype::of<std::uint8_t>(), {4}};
  EXPECT_THAT(client.create("x", spec), FailsWith(Errc::protocol_error));
  EXPECT_THAT(client.ping(), Succeeds());
  EXPECT_THAT(client.create("x", spec), FailsWith(Errc::invalid_dtype));
  EXPECT_EQ(aborted, 2) << "what it made was given up again";
  EXPECT_THAT(client.attach("x"), FailsWith(Errc::invalid_dtype));
  EXPECT_TRUE(eventually([&] { return client.ping().has_value() && released == 1; }));
  EXPECT_THAT(client.stat("x"), FailsWith(Errc::protocol_error));
  EXPECT_THAT(client.list(), FailsWith(Errc::protocol_error)) << "Done is no list";
  EXPECT_THAT(client.ping(), Succeeds());
}

}  // namespace
}  // namespace cowmgr::test
