// What an honest client says in one frame is within the bounds, however full the frame is.
#include "daemon/requests/bounds.hpp"

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "daemon/requests/table.hpp"
#include "proto/fd_socket.hpp"
#include "proto/result_segment.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using Builder = flatbuffers::FlatBufferBuilder;
template <class T>
using Offset = flatbuffers::Offset<T>;

template <class Table>
Result<void> checked(Builder& builder, Offset<Table> table) {
  builder.Finish(wire::CreateRequest(builder, wire::RequestBodyTraits<Table>::enum_value, table.Union()));
  EXPECT_LE(bytes_of(builder).size(), kMaxFrameBytes);
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  EXPECT_NE(request, nullptr);
  if (request == nullptr) return fail(Errc::protocol_error, "it does not verify");
  return check_bounds(*request);
}

// As many entries as a frame holds, each a table of its own.
template <class Entry>
std::vector<Offset<Entry>> frame_full(Builder& builder, const std::function<Offset<Entry>()>& make) {
  std::vector<Offset<Entry>> entries;
  while (builder.GetSize() + 8 * entries.size() + 200 < kMaxFrameBytes && entries.size() < 4000)
    entries.push_back(make());
  return entries;
}

TEST(Bounds, TakeAFrameFullOfTheShortestArrays) {
  Builder builder;
  const auto writing = frame_full<wire::Writing>(
      builder, [&] { return wire::CreateWriting(builder, 1, wire::CreateMakeArrayDirect(builder, "", "")); });
  EXPECT_GT(writing.size(), 2000U);
  EXPECT_THAT(checked(builder, wire::CreateHoldDirect(builder, nullptr, &writing)), Succeeds());
}

TEST(Bounds, TakeAFrameFullOfLongTexts) {
  Builder builder;
  const std::string name(255, 'n');
  const std::string dtype(4000, 'd');
  std::vector<Offset<wire::Writing>> writing;
  while (builder.GetSize() + 5000 < kMaxFrameBytes)
    writing.push_back(
        wire::CreateWriting(builder, 1, wire::CreateMakeArrayDirect(builder, name.c_str(), dtype.c_str())));
  EXPECT_THAT(checked(builder, wire::CreateHoldDirect(builder, nullptr, &writing)), Succeeds());
}

TEST(Bounds, TakeAFrameFullOfSlots) {
  Builder builder;
  const std::vector<std::uint64_t> one_slot = {0};
  const std::vector<std::uint32_t> one_attempt = {1};
  const auto holding = frame_full<wire::Holding>(
      builder, [&] { return wire::CreateHoldingDirect(builder, 0, &one_slot, &one_attempt); });
  EXPECT_GT(holding.size(), 1500U);
  EXPECT_THAT(checked(builder, wire::CreateHoldDirect(builder, nullptr, nullptr, &holding)), Succeeds());
}

TEST(Bounds, AreOfWhatIsSaidNotOfTheFrame) {
  Builder builder;
  const auto one =
      wire::CreateWriting(builder, 1, wire::CreateMakeArrayDirect(builder, std::string(100, 'n').c_str()));
  const std::vector<Offset<wire::Writing>> writing(2000, one);
  EXPECT_THAT(checked(builder, wire::CreateHoldDirect(builder, nullptr, &writing)),
              FailsWith(Errc::invalid_argument));
}

TEST(Bounds, TakeAsManySlotsAsABatchHas) {
  for (const std::size_t count : {std::size_t{kMaxBatch}, std::size_t{kMaxBatch} + 1}) {
    Builder builder;
    const std::vector<std::uint64_t> slots(count);
    const auto ok = checked(builder, wire::CreateCommitSlotsDirect(builder, 1, &slots));
    EXPECT_EQ(ok.has_value(), count == kMaxBatch);
  }
}

TEST(Bounds, TakeAsManyPatternsAsOneRequestMayName) {
  for (const std::size_t count : {kMaxPatterns, kMaxPatterns + 1}) {
    Builder builder;
    const std::vector<std::string> patterns(count, std::string(kMaxPatternBytes, '*'));
    const auto table = wire::CreateEvict(builder, builder.CreateVectorOfStrings(patterns));
    EXPECT_EQ(checked(builder, table).has_value(), count == kMaxPatterns);
  }
}

}  // namespace
}  // namespace cowmgr
