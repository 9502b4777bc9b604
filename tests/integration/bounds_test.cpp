// What one request may cost, and how long its reply may be: both are bounded before anything is done.
#include <fstream>
#include <set>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/result_segment.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;
template <class T>
using Offset = flatbuffers::Offset<T>;

class Bounds : public DaemonTest {
 protected:
  // Memory of the daemon's own, without what it shares with others.
  [[nodiscard]] std::uint64_t own_bytes() const {
    std::ifstream statm(fmt::format("/proc/{}/statm", daemon_->pid()));
    std::uint64_t size = 0;
    std::uint64_t resident = 0;
    std::uint64_t shared = 0;
    statm >> size >> resident >> shared;
    return (resident - shared) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  }
};

// A valid type of about that many bytes of text.
std::string long_dtype(std::size_t text_bytes) {
  std::string text = "[";
  for (int field = 0; text.size() < text_bytes; ++field) text += fmt::format("('f{}', '|u1'), ", field);
  return text + "]";
}

// One long text, to be read 4,000 times: the frame has 110 KB, what it says 360 MB.
TEST_F(Bounds, OfTablesThatAFrameRefersToAgainAndAgain) {
  RawPeer peer = RawPeer::greeted(socket());
  const auto writing = [dtype = long_dtype(90'000)](Builder& b) {
    const auto one = wire::CreateWriting(b, 1, wire::CreateMakeArrayDirect(b, "a", dtype.c_str()));
    const std::vector<Offset<wire::Writing>> all(4000, one);
    return wire::CreateHoldDirect(b, nullptr, &all, nullptr, true);
  };
  EXPECT_EQ(peer.refusal(writing).code, Errc::invalid_argument);
  const auto holding = [](Builder& b) {
    const std::vector<std::uint64_t> slots(8000);
    const std::vector<std::uint32_t> attempts(8000);
    const std::vector<Offset<wire::Holding>> all(7000, wire::CreateHoldingDirect(b, 1, &slots, &attempts));
    return wire::CreateHoldDirect(b, nullptr, nullptr, &all, true);
  };
  EXPECT_EQ(peer.refusal(holding).code, Errc::invalid_argument);
  const auto attach = [](Builder& b) {
    const std::vector<Offset<flatbuffers::String>> names(64, b.CreateString(std::string(100'000, 'x')));
    return wire::CreateAttachDirect(b, &names);
  };
  EXPECT_EQ(peer.refusal(attach).code, Errc::invalid_argument);
  EXPECT_NE(peer.ask<wire::Pong>([](Builder& b) { return wire::CreatePing(b); }), nullptr);
}

TEST_F(Bounds, OfLongTextsAndLists) {
  RawPeer peer = RawPeer::greeted(socket());
  const auto make = [dtype = long_dtype(90'000)](Builder& b) {
    return wire::CreateMakeArrayDirect(b, "a", dtype.c_str());
  };
  const Error refused = peer.refusal(make);
  EXPECT_EQ(refused.code, Errc::invalid_dtype);
  EXPECT_THAT(refused.message, testing::HasSubstr("at most 10000 bytes"));
  const auto give_back = [](Builder& b) {
    const std::vector<std::uint64_t> slots(kMaxBatch + 1);
    return wire::CreateGiveBackSlotsDirect(b, 1, &slots);
  };
  EXPECT_EQ(peer.refusal(give_back).code, Errc::invalid_argument);
}

// What the daemon may grow by. The address sanitizer keeps what was freed for a while, as a connection's
// buffers after each full frame.
#ifdef __SANITIZE_ADDRESS__
constexpr std::uint64_t kRoomBytes = std::uint64_t{48} << 20U;
#else
constexpr std::uint64_t kRoomBytes = std::uint64_t{16} << 20U;
#endif

// A peer says that it writes 800,000 arrays that there are not, and never comes to an end with it.
TEST_F(Bounds, OfWhatASessionMaySayThatItHas) {
  RawPeer peer = RawPeer::greeted(socket());
  ASSERT_NE(peer.ask<wire::Pong>([](Builder& b) { return wire::CreatePing(b); }), nullptr);
  const std::uint64_t before = own_bytes();
  std::uint64_t id = 1;
  for (int frame = 0; frame < 200; ++frame) {
    const auto hold = [&](Builder& b) {
      std::vector<Offset<wire::Writing>> all;
      for (int i = 0; i < 4000; ++i) all.push_back(wire::CreateWriting(b, id++));
      return wire::CreateHoldDirect(b, nullptr, &all);
    };
    ASSERT_NE(peer.ask<wire::Done>(hold), nullptr);
  }
  EXPECT_LT(own_bytes(), before + kRoomBytes);
}

// ---- Replies ----

// A batch as large as a batch may be, all of it refused, with as many slots asked for as there may be.
TEST_F(Bounds, OfAReplyThatTellsOfEverySlotThatWasRefused) {
  const Client client = connect();
  auto set = client.create_ragged("set", std::uint64_t{2} * kMaxBatch);
  ASSERT_THAT(set, Succeeds());
  const std::uint64_t id = set->info()->id;
  RawPeer peer = RawPeer::greeted(socket());
  std::vector<std::uint64_t> slots(kMaxBatch);
  for (std::uint64_t i = 0; i < kMaxBatch; ++i) slots[i] = i;
  const auto commit = [&](std::uint32_t next) {
    return [&, next](Builder& b) {
      return wire::CreateCommitSlotsDirect(b, id, &slots, nullptr, nullptr, next, false, true);
    };
  };
  ASSERT_NE(peer.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, id, -1, kMaxBatch); }),
            nullptr);
  ASSERT_EQ(peer.ask<wire::Leased>(commit(0))->refused(), nullptr);
  const auto* reply = peer.ask<wire::Leased>(commit(kMaxBatch));
  ASSERT_NE(reply, nullptr) << "the connection lives";
  ASSERT_NE(reply->refused(), nullptr);
  std::set<std::uint64_t> told;
  for (const auto* refused : *reply->refused()) {
    told.insert(refused->slot());
    EXPECT_EQ(static_cast<Errc>(refused->code()), Errc::already_committed);
    EXPECT_THAT(std::string(view_of(refused->message())), testing::HasSubstr("is committed already"));
  }
  EXPECT_EQ(told.size(), kMaxBatch);
  EXPECT_EQ(set->info()->leased, reply->slots()->size()) << "no slot is leased that the peer was not told of";
}

// A worker that was stopped until all its leases were over, as its client lives through it.
TEST_F(Bounds, OfAReplyToAWorkerThatComesTooLate) {
  constexpr std::uint64_t kSlots = kMaxBatch;
  const Client client = connect();
  auto set = client.create_results("set", {Dtype::of<std::uint64_t>(), {kSlots}}, kSlots,
                                   {.lease = std::chrono::seconds(2)});
  ASSERT_THAT(set, Succeeds());
  bool was_late = false;
  const auto task = [&](Slot& slot) -> Result<void> {
    slot.as<std::uint64_t>()->front() = slot.index() + 1;
    if (slot.index() == 0 && !std::exchange(was_late, true)) {
      EXPECT_TRUE(eventually([&] { return set->info()->leased == 0; }));
    }
    return {};
  };
  const auto worked = set->work(task, {.batch = kMaxBatch});
  ASSERT_THAT(worked, Succeeds());
  EXPECT_EQ(*worked, kSlots);
  const auto array = set->wait();
  ASSERT_THAT(array, Succeeds());
  for (std::uint64_t i = 0; i < kSlots; ++i) ASSERT_EQ((*array->as<std::uint64_t>())[i], i + 1);
}

}  // namespace
}  // namespace cowmgr::test
