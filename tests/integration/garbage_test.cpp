// Frames that are no frames: each ends its own connection, and nothing else.
#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;
using Bytes = std::vector<std::byte>;

class Garbage : public DaemonTest {
 protected:
  // Sends `bytes` as the first frame, and as one in the middle of a session; both times the daemon hangs up.
  void expect_hang_up(const Bytes& bytes) {
    RawPeer stranger(socket());
    EXPECT_TRUE(stranger.send(bytes));
    EXPECT_TRUE(stranger.is_hung_up());
    RawPeer peer = RawPeer::greeted(socket());
    EXPECT_TRUE(peer.send(bytes));
    EXPECT_TRUE(peer.is_hung_up());
  }
  void TearDown() override {
    EXPECT_THAT(witness_->ping(), Succeeds()) << "a client that behaves goes on undisturbed";
    EXPECT_TRUE(eventually([&] { return witness_->ping()->sessions == 1; }));
    witness_.reset();
    DaemonTest::TearDown();
  }
  void SetUp() override {
    DaemonTest::SetUp();
    witness_ = connect();
  }
  std::optional<Client> witness_;
};

template <class Build>
Bytes frame(const Build& build) {
  Builder builder;
  return copy_of(RawPeer::frame_of(builder, build));
}

Bytes request_of_type(wire::RequestBody type, bool has_table) {
  Builder builder;
  const auto table = has_table ? wire::CreatePing(builder).Union() : flatbuffers::Offset<void>();
  builder.Finish(wire::CreateRequest(builder, type, table));
  return copy_of(bytes_of(builder));
}

TEST_F(Garbage, OfRandomBytes) {
  std::mt19937 random(20240611);
  for (int round = 0; round < 150; ++round) {
    Bytes bytes(
        std::uniform_int_distribution<std::size_t>(1, round % 10 == 0 ? kMaxFrameBytes : 200)(random));
    std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(random()); });
    expect_hang_up(bytes);
  }
}

TEST_F(Garbage, OfFramesCutShort) {
  const Bytes whole = frame([](Builder& b) {
    const std::vector<std::uint64_t> shape = {3, 4};
    return wire::CreateMakeArrayDirect(b, "name", "<f4", &shape);
  });
  for (std::size_t size = 1; size < whole.size(); ++size) {
    Bytes cut = whole;
    cut.resize(size);
    RawPeer peer = RawPeer::greeted(socket());
    EXPECT_TRUE(peer.send(cut));
    // A cut that takes only padding away leaves a frame; it is answered.
    if (const auto* reply = peer.receive()) {
      EXPECT_GT(size + 8, whole.size()) << static_cast<int>(reply->body_type());
    }
  }
}

// Well-formed or not, every frame with one changed byte has some outcome, and the daemon lives.
TEST_F(Garbage, OfFramesWithAByteChanged) {
  std::mt19937 random(7);
  const Bytes whole = frame([](Builder& b) {
    const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString("one"),
                                                                         b.CreateString("two")};
    const std::vector<std::uint64_t> ids = {1, 2, 3};
    return wire::CreateAttachDirect(b, &names, &ids, 0);
  });
  for (std::size_t at = 0; at < whole.size(); ++at) {
    Bytes changed = whole;
    changed[at] ^= static_cast<std::byte>(1U << random() % 8);
    RawPeer peer = RawPeer::greeted(socket());
    EXPECT_TRUE(peer.send(changed));
    EXPECT_TRUE(peer.request([](Builder& b) { return wire::CreatePing(b); }) || peer.is_hung_up());
  }
}

TEST_F(Garbage, OfUnionsWithoutATable) {
  for (int type = 0; type <= static_cast<int>(wire::RequestBody::MAX); ++type) {
    expect_hang_up(request_of_type(static_cast<wire::RequestBody>(type), false));
  }
}

// A newer client may ask for what this daemon does not know: that is refused in words, not by hanging up.
TEST_F(Garbage, IsNotWhatIsOnlyUnknown) {
  for (const int type : {0, static_cast<int>(wire::RequestBody::MAX) + 1, 200, 255}) {
    RawPeer peer = RawPeer::greeted(socket());
    ASSERT_TRUE(peer.send(request_of_type(static_cast<wire::RequestBody>(type), true)));
    const auto* reply = peer.receive();
    ASSERT_NE(reply, nullptr) << type;
    ASSERT_NE(reply->body_as_Failure(), nullptr) << type;
    EXPECT_EQ(static_cast<Errc>(reply->body_as_Failure()->code()), Errc::invalid_argument);
  }
}

TEST_F(Garbage, OfZeros) {
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{4}, std::size_t{8}, std::size_t{4096}, kMaxFrameBytes}) {
    expect_hang_up(Bytes(size));
  }
}

TEST_F(Garbage, OfTooManyBytes) {
  Bytes long_one = frame([](Builder& b) { return wire::CreatePing(b); });
  long_one.resize(kMaxFrameBytes + 1);
  expect_hang_up(long_one);
  expect_hang_up(Bytes(160'000, std::byte{0x55}));
}

TEST_F(Garbage, OfTextWithinAFrame) {
  RawPeer peer = RawPeer::greeted(socket());
  for (const std::string& name :
       {std::string("a\0b", 3), std::string("\xff\xfe"), std::string("\x1b[2J"), std::string(300, 'x')}) {
    const auto make = [&](Builder& b) {
      return wire::CreateMakeArray(b, b.CreateString(name), b.CreateString("|u1"));
    };
    EXPECT_EQ(peer.refusal(make).code, Errc::invalid_name);
  }
  for (const std::string& dtype :
       {std::string("|O"), std::string("<f3"), std::string("|u1\0", 4), std::string(100'000, '(')}) {
    const auto make = [&](Builder& b) {
      return wire::CreateMakeArray(b, b.CreateString("a"), b.CreateString(dtype));
    };
    const Error refused = peer.refusal(make);
    EXPECT_EQ(refused.code, Errc::invalid_dtype);
    EXPECT_TRUE(is_clean_message(refused.message));
  }
}

}  // namespace
}  // namespace cowmgr::test
