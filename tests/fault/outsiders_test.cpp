// Processes that map or open a segment without the library, as numpy.load does: their memory is not free,
// whatever became of the array. The kernel is asked, and what they hold is told.
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/mapping.hpp"
#include "proto/segment.hpp"
#include "proto/text.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

using testing::HasSubstr;

constexpr std::uint64_t kBytes = 8'000'000;
const std::uint64_t kSegmentBytes = segment_bytes(kBytes);

// A segment as a program has it that knows nothing of the daemon.
class Outsider {
 public:
  explicit Outsider(const std::string& segment)
      : fd_(::open(("/dev/shm" + segment).c_str(), O_RDONLY | O_CLOEXEC)) {
    auto mapped = Mapping::map(fd_.get(), kSegmentBytes, Access::read_only);
    EXPECT_THAT(mapped, Succeeds());
    mapping_ = *std::move(mapped);
  }
  // The memory that stands behind it.
  [[nodiscard]] std::uint64_t resident_bytes() const {
    struct stat info {};
    EXPECT_EQ(::fstat(fd_.get(), &info), 0);
    return static_cast<std::uint64_t>(info.st_blocks) * 512;
  }

 private:
  UniqueFd fd_;
  Mapping mapping_;
};

class Outsiders : public KeepingDaemonTest {
 protected:
  // Room for one array, and not for two.
  void SetUp() override { start_keeping({"--capacity", std::to_string(kSegmentBytes + (1U << 20U))}); }

  // Puts an array that may be evicted; then nobody views it.
  static Result<std::string> put(const Client& client, const std::string& name) {
    {
      const auto array =
          client.put(name, {Dtype::of<std::uint8_t>(), {kBytes}}, pattern_bytes(kBytes), {.evictable = true});
      if (!array) return tl::unexpected(array.error());
    }
    EXPECT_TRUE(eventually([&] { return client.stat(name)->array.views == 0; }));
    return client.stat(name)->array.segment;
  }
  static std::uint64_t outside(const Client& client) { return client.ping()->memory.outside_bytes; }
  static std::uint64_t sum(const DaemonMemory& memory) {
    return memory.free_bytes + memory.writing_bytes + memory.draining_bytes + memory.pinned_bytes +
           memory.viewed_bytes + memory.evictable_bytes + memory.kept_bytes + memory.results_bytes +
           memory.reclaiming_bytes + memory.outside_bytes;
  }
};

TEST_F(Outsiders, DoNotMakeTheDaemonExceedItsCapacity) {
  const Client client = connect();
  std::vector<Outsider> outsiders;
  std::uint64_t resident_bytes = 0;
  for (int i = 0; i < 5; ++i) {
    const auto segment = put(client, fmt::format("a{}", i));
    if (!segment) continue;
    outsiders.emplace_back(*segment);
    resident_bytes += outsiders.back().resident_bytes();
  }
  EXPECT_LE(resident_bytes, client.ping()->capacity_bytes);
}

TEST_F(Outsiders, AreNamedWhereTheyLeaveNoRoomAndForgottenWhenTheyGo) {
  const Client client = connect();
  {
    const Outsider outsider(put(client, "a").value());
    const auto refused = put(client, "b");
    ASSERT_THAT(refused, FailsWith(Errc::out_of_memory));
    EXPECT_THAT(refused.error().message, HasSubstr(format_size(kSegmentBytes) +
                                                   " gone but held by processes that map it without a view"));
    const DaemonInfo daemon = *client.ping();
    EXPECT_EQ(daemon.memory.outside_bytes, kSegmentBytes);
    EXPECT_EQ(daemon.used_bytes, kSegmentBytes);
    EXPECT_EQ(sum(daemon.memory), daemon.capacity_bytes);
  }
  EXPECT_TRUE(eventually([&] { return put(client, "b").has_value(); }))
      << "who lacks room has the kernel asked again";
  EXPECT_EQ(outside(client), 0U);
}

TEST_F(Outsiders, GiveBackAlsoWhereNobodyAsks) {
  const Client client = connect();
  {
    const Outsider outsider(put(client, "a").value());
    EXPECT_EQ(client.evict(std::vector<std::string>{"a"})->freed_bytes, 0U);
    EXPECT_TRUE(eventually([&] { return outside(client) == kSegmentBytes; }));
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
  EXPECT_THAT(shm_files(instance_), testing::SizeIs(1)) << "the lock";
}

TEST_F(Outsiders, AreKnownToTheNextDaemon) {
  const std::string segment = put(connect(), "a").value();
  {
    const Outsider outsider(segment);
    EXPECT_THAT(connect().evict(std::vector<std::string>{"a"}), Succeeds());
    kill_and_start({"--grace", "0", "--capacity", std::to_string(kSegmentBytes + (1U << 20U))});
    const Client client = connect();
    EXPECT_EQ(client.ping()->used_bytes, kSegmentBytes);
    EXPECT_THAT(put(client, "b"), FailsWith(Errc::out_of_memory));
    EXPECT_THAT(client.attach("a"), FailsWith(Errc::not_found));
  }
  EXPECT_TRUE(eventually([&] { return connect().ping()->used_bytes == 0; }));
}

TEST_F(Outsiders, HoldWhatWasNeverSealedToo) {
  const Client client = connect();
  std::optional<ArrayWriter> writer = client.create("a", {Dtype::of<std::uint8_t>(), {kBytes}}).value();
  const Outsider outsider(client.stat("a")->array.segment);
  writer.reset();
  EXPECT_EQ(client.ping()->used_bytes, kSegmentBytes);
  EXPECT_THAT(put(client, "b"), FailsWith(Errc::out_of_memory));
}

TEST_F(Outsiders, AreThoseToWhomAResultSetIsGone) {
  const Client client = connect();
  {
    const ResultSet set = client.create_ragged("set", 100).value();
    EXPECT_THAT(set.cancel(), Succeeds());
    EXPECT_GT(client.ping()->used_bytes, 0U) << "this process has its slots mapped";
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

}  // namespace
}  // namespace cowmgr::test
