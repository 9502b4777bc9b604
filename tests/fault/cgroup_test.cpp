// The daemon in a control group that allows less memory than its capacity: the kernel kills what passes the
// limit, so it must be refused before.
#include <algorithm>
#include <array>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

namespace fs = std::filesystem;

using testing::AllOf;
using testing::HasSubstr;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20U;
constexpr std::uint64_t kLimit = 128 * kMiB;

ArraySpec spec(std::uint64_t size_bytes) {
  return {Dtype::of<std::uint8_t>(), {size_bytes}};
}

void write(const fs::path& file, const std::string& text) {
  std::ofstream(file) << text;
}

// A real group with kLimit, where this user may make one; of the version whose memory controller is there.
class Group {
 public:
  Group() {
    const fs::path root = "/sys/fs/cgroup";
    const bool is_v2 = fs::exists(root / "memory.max") || fs::exists(root / "cgroup.controllers");
    std::error_code error;
    path_ = (is_v2 ? root : root / "memory") / fmt::format("cowmgr-test-{}", ::getpid());
    if (!fs::create_directory(path_, error) || error) return;
    const fs::path limit = path_ / (is_v2 ? "memory.max" : "memory.limit_in_bytes");
    write(limit, std::to_string(kLimit));
    std::uint64_t got = 0;
    std::ifstream(limit) >> got;
    is_there_ = got == kLimit;
  }
  // When nobody is in it any more.
  ~Group() { ::rmdir(path_.c_str()); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  [[nodiscard]] bool is_there() const { return is_there_; }
  [[nodiscard]] std::string path() const { return path_; }

 private:
  fs::path path_;
  bool is_there_ = false;
};

class Cgroup : public DaemonLifeTest {
 protected:
  Group group_;
};

TEST_F(Cgroup, APutThatTheGroupHasNoRoomForIsRefused) {
  if (!group_.is_there()) GTEST_SKIP() << "this user cannot make a control group here";
  start_keeping({"--purge", "--capacity", "1GiB"}, {.group = group_.path()});
  const Client client = connect();
  const auto refused = client.create("large", spec(2 * kLimit));
  ASSERT_THAT(refused, FailsWith(Errc::out_of_memory)) << "the daemon was not killed";
  EXPECT_THAT(refused.error().message,
              AllOf(HasSubstr("control group " + group_.path()), HasSubstr("limit of 128 MiB")));
  EXPECT_THAT(client.create("small", spec(kLimit / 4)), Succeeds());
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(Cgroup, ManySmallOnesDoNotPassItEither) {
  if (!group_.is_there()) GTEST_SKIP() << "this user cannot make a control group here";
  start_keeping({"--purge", "--capacity", "1GiB"}, {.group = group_.path()});
  const Client client = connect();
  std::vector<ArrayWriter> writers;
  for (int i = 0; i < 100; ++i) {
    auto writer = client.create(fmt::format("a{}", i), spec(4 * kMiB));
    if (!writer) {
      EXPECT_THAT(writer, FailsWith(Errc::out_of_memory));
      break;
    }
    writers.push_back(*std::move(writer));
  }
  EXPECT_GT(writers.size(), 10U);
  EXPECT_LT(writers.size(), kLimit / (4 * kMiB));
  EXPECT_THAT(client.ping(), Succeeds());
}

TEST_F(Cgroup, TheDefaultCapacityIsAShareOfTheLimit) {
  const TemporaryDirectory root;
  write(root.file("cgroup.controllers"), "memory\n");
  write(root.file("memory.max"), fmt::format("{}\n", kLimit));
  write(root.file("memory.current"), "0\n");
  start({"--cgroup-root", root.path()});
  EXPECT_EQ(connect().ping()->capacity_bytes, static_cast<std::uint64_t>(static_cast<double>(kLimit) * 0.8));
}

TEST_F(Cgroup, ACapacityAboveTheLimitIsWarnedOf) {
  const TemporaryDirectory root;
  write(root.file("cgroup.controllers"), "memory\n");
  write(root.file("memory.max"), fmt::format("{}\n", kLimit));
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const UniqueFd reader(ends[0]);
  UniqueFd writer(ends[1]);
  start_keeping({"--purge", "--capacity", "1GiB", "--cgroup-root", root.path()}, {.log = writer.get()});
  writer.reset();
  std::array<char, 4096> text{};
  ASSERT_TRUE(wait_readable(reader.get()));
  const auto count = ::read(reader.get(), text.data(), text.size());
  EXPECT_THAT(std::string(text.data(), static_cast<std::size_t>(std::max<ssize_t>(count, 0))),
              HasSubstr("the capacity of 1 GiB is more than the control group " + root.path() +
                        " may use (128 MiB)"));
}

}  // namespace
}  // namespace cowmgr::test
