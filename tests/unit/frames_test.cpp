#include "proto/frames.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"

namespace cowmgr {
namespace {

using flatbuffers::FlatBufferBuilder;

// A frame of its own, aligned as a receive buffer is.
class Bytes {
 public:
  explicit Bytes(std::span<const std::byte> bytes) : words_(bytes.size() / 8 + 1), size_(bytes.size()) {
    if (!bytes.empty()) std::memcpy(words_.data(), bytes.data(), bytes.size());
  }
  [[nodiscard]] std::span<std::byte> get() { return std::as_writable_bytes(std::span(words_)).first(size_); }

 private:
  std::vector<std::uint64_t> words_;
  std::size_t size_;
};

template <class Root = wire::Request>
const Root* verified(std::span<const std::byte> bytes) {
  Bytes frame(bytes);
  return verified_root<Root>(frame.get()) == nullptr ? nullptr : verified_root<Root>(bytes);
}

FlatBufferBuilder attach_request(const std::vector<std::string>& names) {
  FlatBufferBuilder builder;
  const auto attach = wire::CreateAttach(builder, builder.CreateVectorOfStrings(names), 0, 250);
  builder.Finish(wire::CreateRequest(builder, wire::RequestBody::Attach, attach.Union()));
  return builder;
}

// A reply that lists one array `count` times: the same table, so the frame stays short.
FlatBufferBuilder arrays_reply(std::size_t count) {
  FlatBufferBuilder builder;
  const auto name = builder.CreateString("train/x");
  const auto info = wire::CreateArrayInfo(builder, 1, name);
  const auto arrays = builder.CreateVector(std::vector(count, info));
  builder.Finish(
      wire::CreateReply(builder, wire::ReplyBody::Arrays, wire::CreateArrays(builder, arrays).Union()));
  return builder;
}

TEST(Frames, ReadBackWhatWasBuilt) {
  const auto builder = attach_request({"train/x", "", "\xF0\x9F\x90\x84"});
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  ASSERT_NE(request, nullptr);
  const auto* attach = request->body_as_Attach();
  ASSERT_NE(attach, nullptr);
  EXPECT_EQ(request->body_as_Hello(), nullptr);
  ASSERT_EQ(attach->names()->size(), 3U);
  EXPECT_EQ(view_of(attach->names()->Get(0)), "train/x");
  EXPECT_EQ(view_of(attach->names()->Get(1)), "");
  EXPECT_EQ(view_of(attach->names()->Get(2)), "\xF0\x9F\x90\x84");
  EXPECT_EQ(attach->ids(), nullptr);
  EXPECT_EQ(attach->wait_ms(), 250U);
}

TEST(Frames, KeepAnEmbeddedNul) {
  FlatBufferBuilder builder;
  const auto name = builder.CreateString(std::string("a\0b", 3));
  builder.Finish(wire::CreateRequest(builder, wire::RequestBody::StatArray,
                                     wire::CreateStatArray(builder, name).Union()));
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(view_of(request->body_as_StatArray()->name()), std::string_view("a\0b", 3));
}

TEST(Frames, ReadAnAbsentStringAsAnEmptyOne) {
  EXPECT_EQ(view_of(nullptr), "");
}

TEST(Frames, AreRefusedWhenTheyEndAnywhere) {
  const auto builder = attach_request({"train/x", "train/y"});
  const auto whole = bytes_of(builder);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(verified<wire::Request>(whole.first(size)), nullptr) << size;
  }
}

TEST(Frames, AreRefusedWhenTheyAreNoise) {
  for (const auto fill :
       {std::byte{0x00}, std::byte{0x01}, std::byte{0x7F}, std::byte{0x80}, std::byte{0xFF}}) {
    for (const std::size_t size : {1U, 2U, 3U, 4U, 5U, 7U, 8U, 9U, 100U, 4096U}) {
      const std::vector<std::byte> noise(size, fill);
      EXPECT_EQ(verified<wire::Request>(noise), nullptr) << size;
      EXPECT_EQ(verified<wire::Reply>(noise), nullptr) << size;
    }
  }
}

TEST(Frames, AreRefusedWhenAnOffsetOrLengthPointsOutside) {
  const auto builder = attach_request({"train/x"});
  const auto whole = bytes_of(builder);
  int refused = 0;
  for (std::size_t at = 0; at + 4 <= whole.size(); at += 4) {
    Bytes frame(whole);
    std::memset(frame.get().data() + at, 0x7F, 4);
    if (verified_root<wire::Request>(frame.get()) == nullptr) ++refused;
  }
  EXPECT_GE(refused, 6) << "root, table, union, vector, string and its length";
}

TEST(Frames, AreRefusedWhenAStringHasNoEnd) {
  const auto builder = attach_request({"train/x"});
  Bytes frame(bytes_of(builder));
  const auto text = std::string_view(reinterpret_cast<const char*>(frame.get().data()), frame.get().size());
  const auto end = text.find("train/x") + 7;
  ASSERT_EQ(frame.get()[end], std::byte{0});
  frame.get()[end] = std::byte{'!'};
  EXPECT_EQ(verified_root<wire::Request>(frame.get()), nullptr);
}

TEST(Frames, MayListAsManyArraysAsAFrameHolds) {
  const auto builder = arrays_reply(8000);
  ASSERT_LE(bytes_of(builder).size(), kMaxFrameBytes);
  EXPECT_NE(verified_root<wire::Reply>(bytes_of(builder)), nullptr);
}

TEST(Frames, AreRefusedWhenOneTableStandsForTooMany) {
  const auto builder = arrays_reply(20'000);
  ASSERT_LE(bytes_of(builder).size(), kMaxFrameBytes);
  EXPECT_EQ(verified_root<wire::Reply>(bytes_of(builder)), nullptr);
}

// ---- What the verifier lets through: readers have to expect it ----

TEST(Frames, MayHaveNoBodyAtAll) {
  FlatBufferBuilder builder;
  builder.Finish(wire::CreateRequest(builder));
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(request->body_type(), wire::RequestBody::NONE);
}

TEST(Frames, MayNameABodyThatIsNotThere) {
  FlatBufferBuilder builder;
  builder.Finish(wire::CreateRequest(builder, wire::RequestBody::Ping, 0));
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(request->body_type(), wire::RequestBody::Ping);
  EXPECT_EQ(request->body_as_Ping(), nullptr);
}

TEST(Frames, MayHaveABodyOfANewerPeer) {
  FlatBufferBuilder builder;
  const auto body = wire::CreatePing(builder);
  builder.Finish(wire::CreateRequest(builder, static_cast<wire::RequestBody>(200), body.Union()));
  const auto* request = verified_root<wire::Request>(bytes_of(builder));
  ASSERT_NE(request, nullptr);
  EXPECT_EQ(request->body_as_Ping(), nullptr);
}

}  // namespace
}  // namespace cowmgr
