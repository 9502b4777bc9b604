// Arrays whose dtype takes more words than the one page of a header holds: the data starts a page later. They
// are served like any other, by the next daemon too; a client that does not know of it gets no wrong data.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using testing::HasSubstr;

// So many fields of 4 bytes each.
Dtype many_fields(int count) {
  std::string fields;
  for (int i = 0; i < count; ++i) fields += fmt::format("('field_{:04}', '<f4'), ", i);
  return Dtype::parse("[" + fields + "]").value();
}

class Layout2 : public KeepingDaemonTest {
 protected:
  const ArraySpec spec_{many_fields(200), {5000}};
  const std::vector<std::byte> data_ = pattern_bytes(data_bytes(spec_).value());

  void expect_served(const Client& client) const {
    const auto view = client.attach("x");
    ASSERT_THAT(view, Succeeds());
    EXPECT_EQ(view->spec(), spec_);
    EXPECT_TRUE(copy_of(view->bytes()) == data_);
  }
};

TEST_F(Layout2, IsServedByThisDaemonAndTheNext) {
  {
    const Client client = connect();
    ASSERT_THAT(client.put("x", spec_, data_, {.checksum = true}), Succeeds());
    const ArrayInfo info = client.stat("x")->array;
    EXPECT_EQ(info.data_offset, 8192U);
    EXPECT_EQ(info.segment_bytes, segment_bytes(data_.size(), 8192));
    EXPECT_EQ(std::filesystem::file_size("/dev/shm" + info.segment), info.segment_bytes);
    expect_served(client);
  }
  kill_and_start();
  expect_served(connect());
  EXPECT_TRUE(eventually([&] { return connect().stat("x")->array.state == ArrayState::sealed; }));
}

TEST_F(Layout2, IsWrittenAnewWhenItsFileIsGone) {
  const Client client = connect();
  ASSERT_THAT(client.put("x", spec_, data_), Succeeds());
  const std::filesystem::path file = "/dev/shm" + client.stat("x")->array.segment;
  std::filesystem::remove(file);
  EXPECT_TRUE(eventually(
      [&] { return client.stat("x")->array.state == ArrayState::sealed && std::filesystem::exists(file); }));
  expect_served(client);
  kill_and_start();
  expect_served(connect());
}

TEST_F(Layout2, OneThatIsBeingWrittenGoesOnWithTheNextDaemon) {
  const Client client = connect("test", Milliseconds(30'000));
  auto writer = client.create("x", spec_);
  ASSERT_THAT(writer, Succeeds());
  std::ranges::copy(data_, writer->bytes().begin());
  kill_and_start();
  ASSERT_THAT(writer->seal(), Succeeds());
  expect_served(client);
}

TEST_F(Layout2, IsTheOutputOfAResultSetThatOutlivesADaemon) {
  const Client client = connect("test", Milliseconds(30'000));
  ResultSet set = client.create_results("x", spec_, 10).value();
  const auto fill = [&](Slot& slot) -> Result<void> {
    const std::uint64_t row_bytes = spec_.dtype.item_bytes();
    const auto rows = slot.rows();
    EXPECT_EQ(slot.bytes().size(), rows.count() * row_bytes);
    std::memcpy(slot.bytes().data(), data_.data() + rows.begin * row_bytes, slot.bytes().size());
    return {};
  };
  for (int i = 0; i < 5; ++i) {
    auto slot = set.lease();
    ASSERT_THAT(slot, Succeeds());
    ASSERT_THAT(fill(**slot), Succeeds());
    ASSERT_THAT((*slot)->commit(), Succeeds());
  }
  kill_and_start();
  ASSERT_THAT(set.work(fill), Succeeds());
  EXPECT_TRUE(eventually([&] { return set.info()->state == ResultsState::done; }));
  expect_served(client);
}

TEST_F(Layout2, IsRefusedToAClientThatDoesNotSayThatItReadsIt) {
  ASSERT_THAT(connect().put("x", spec_, data_), Succeeds());
  ASSERT_THAT(connect().put("y", {Dtype::of<float>(), {3}}, pattern_bytes(12)), Succeeds());
  auto old = RawPeer::greeted(socket());  // its Hello has no `layout`
  const auto attach = [](const std::string& name) {
    return [name](RawPeer::Builder& b) {
      const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString(name)};
      return wire::CreateAttachDirect(b, &names);
    };
  };
  const Error refused = old.refusal(attach("x"));
  EXPECT_EQ(refused.code, Errc::unsupported);
  EXPECT_THAT(refused.message, HasSubstr("upgrade the client"));
  EXPECT_NE(old.ask<wire::Arrays>(attach("y")), nullptr) << "layout 1";
  const Error not_made = old.refusal([&](RawPeer::Builder& b) {
    const std::vector<std::uint64_t> shape = {3};
    return wire::CreateMakeArrayDirect(b, "z", spec_.dtype.str().c_str(), &shape);
  });
  EXPECT_EQ(not_made.code, Errc::unsupported);
}

TEST_F(Layout2, HasTwoPagesAndNoMore) {
  const auto refused = connect().create("x", {many_fields(400), {3}});
  ASSERT_THAT(refused, FailsWith(Errc::invalid_dtype));
  EXPECT_THAT(refused.error().message, HasSubstr("two pages that NumPy reads in place"));
}

}  // namespace
}  // namespace cowmgr::test
