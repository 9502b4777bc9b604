#include "daemon/shm/shm_env.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/fd_socket.hpp"
#include "proto/mapping.hpp"
#include "tests/support/forked.hpp"
#include "tests/support/shm_fixture.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Optional;

constexpr std::uint64_t kMib = std::uint64_t{1} << 20U;

struct stat stat_of(int fd) {
  struct stat info {};
  EXPECT_EQ(::fstat(fd, &info), 0);
  return info;
}

std::string result_of(const Result<Segment>& result) {
  return std::string(result ? "made" : to_string(result.error().code));
}

class ShmEnvTest : public ShmTest {
 protected:
  [[nodiscard]] Result<Segment> try_create(std::uint64_t size_bytes) const {
    return env_.create(1, size_bytes, header_, {}, never_);
  }
  [[nodiscard]] Segment create(std::uint64_t size_bytes) const {
    auto segment = try_create(size_bytes);
    EXPECT_THAT(segment, Succeeds());
    return *std::move(segment);
  }

  const ShmEnv env_{instance_, test_lease_signal()};
  const std::string header_ = *make_npy_header(bytes_spec(kPageBytes), kDataOffset);
  const std::atomic<bool> never_{false};
};

// ---- Making segments ----

class ShmEnvSizes : public ShmEnvTest, public testing::WithParamInterface<std::uint64_t> {};

TEST_P(ShmEnvSizes, AFreshSegmentIsBackedAndZeroBehindItsHeader) {
  auto segment = create(GetParam());
  EXPECT_EQ(segment.size_bytes, GetParam());
  const auto info = stat_of(segment.reader.get());
  EXPECT_EQ(static_cast<std::uint64_t>(info.st_size), GetParam());
  EXPECT_GE(static_cast<std::uint64_t>(info.st_blocks) * 512, GetParam());
  const auto mapped = Mapping::map(segment.reader.get(), GetParam(), Access::read_only);
  ASSERT_THAT(mapped, Succeeds());
  const auto* bytes = reinterpret_cast<const char*>(mapped->data());
  EXPECT_EQ(std::string(bytes, header_.size()), header_);
  EXPECT_TRUE(std::all_of(bytes + header_.size(), bytes + GetParam(), [](char byte) { return byte == 0; }));
  const auto usage = env_.usage(segment);
  ASSERT_THAT(usage, Succeeds());
  EXPECT_GE(usage->resident_bytes, GetParam());
  EXPECT_LE(usage->huge_bytes, GetParam());
  EXPECT_EQ(usage->huge_bytes % kHugePageBytes, 0U);
  env_.remove(std::move(segment));
}

INSTANTIATE_TEST_SUITE_P(AroundPagesHugePagesAndSteps, ShmEnvSizes,
                         testing::Values(2 * kPageBytes, 3 * kPageBytes, 2 * kMib - kPageBytes, 2 * kMib,
                                         2 * kMib + kPageBytes, 4 * kMib - kPageBytes, 32 * kMib,
                                         32 * kMib + kPageBytes, 35 * kMib));

TEST_F(ShmEnvTest, OnlyTheFirstDescriptorCanWrite) {
  auto segment = create(3 * kPageBytes);
  EXPECT_EQ(segment.name, segment_name(instance_, 1));
  EXPECT_EQ(stat_of(segment.writer.get()).st_mode & 07777U, 0400U);
  EXPECT_EQ(::fcntl(segment.writer.get(), F_GETFL) & O_ACCMODE, O_RDWR);
  for (const int fd : {segment.reader.get(), segment.lease.get()}) {
    EXPECT_EQ(::fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
    EXPECT_EQ(::mmap(nullptr, kPageBytes, PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  }
  for (const int fd : {segment.reader.get(), segment.lease.get(), segment.writer.get()}) {
    EXPECT_EQ(::fcntl(fd, F_GETFD), FD_CLOEXEC);
  }
  env_.remove(std::move(segment));
}

TEST_F(ShmEnvTest, ReaderAndLeaseAreOpenedApart) {
  auto segment = create(3 * kPageBytes);
  ASSERT_EQ(::lseek(segment.reader.get(), 5, SEEK_SET), 5);
  EXPECT_EQ(::lseek(segment.lease.get(), 0, SEEK_CUR), 0);  // a peer that gets one has no hand on the other
  EXPECT_EQ(::lseek(segment.writer.get(), 0, SEEK_CUR), 0);
  env_.remove(std::move(segment));
}

TEST_F(ShmEnvTest, ANameThatExistsIsLeftAlone) {
  auto segment = create(3 * kPageBytes);
  EXPECT_THAT(try_create(4 * kPageBytes), FailsWith(Errc::os_failure));
  EXPECT_TRUE(has_name(1));
  EXPECT_EQ(stat_of(segment.reader.get()).st_size, static_cast<off_t>(3 * kPageBytes));
  env_.remove(std::move(segment));
}

TEST_F(ShmEnvTest, GivesUpWhenThePeerGoes) {
  const std::atomic<bool> gone{true};
  EXPECT_THAT(env_.create(1, 64 * kMib, header_, {}, gone), FailsWith(Errc::disconnected));
  EXPECT_THAT(names_of(instance_), IsEmpty());
}

TEST_F(ShmEnvTest, RemoveTakesTheNameAndUnlinkLeavesTheMemory) {
  auto segment = create(3 * kPageBytes);
  env_.unlink(segment);
  EXPECT_FALSE(has_name(1));
  EXPECT_EQ(stat_of(segment.reader.get()).st_size, static_cast<off_t>(3 * kPageBytes));
  env_.remove(std::move(segment));
}

TEST_F(ShmEnvTest, RemovesTheLeftoversOfItsOwnInstanceAlone) {
  const ShmEnv neighbour(instance_ + "x", test_lease_signal());
  auto own = create(3 * kPageBytes);
  auto foreign = neighbour.create(1, 3 * kPageBytes, header_, {}, never_);
  ASSERT_THAT(foreign, Succeeds());
  const std::string lock = shm_path(fmt::format("/cowmgr.{}.lock", instance_));
  const UniqueFd held(::open(lock.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  EXPECT_EQ(env_.remove_leftovers().value(), 1U);
  EXPECT_THAT(names_of(instance_), ElementsAre(fmt::format("cowmgr.{}.lock", instance_)));
  EXPECT_THAT(names_of(instance_ + "x"), testing::SizeIs(1));
  EXPECT_EQ(env_.remove_leftovers().value(), 0U);
  neighbour.remove(*std::move(foreign));
  EXPECT_EQ(::unlink(lock.c_str()), 0);
}

TEST_F(ShmEnvTest, TheProbeOfADaemonThatWasKilledIsInNobodysWay) {
  const std::string probe = shm_path(segment_name(instance_, 0x123456789ab));  // as any segment
  const UniqueFd left(::open(probe.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0400));
  const ShmEnv next(instance_, test_lease_signal());
  EXPECT_EQ(next.has_leases(), env_.has_leases());
  EXPECT_THAT(names_of(instance_), testing::SizeIs(1));  // its own is gone
  EXPECT_EQ(next.remove_leftovers().value(), 1U);
  EXPECT_THAT(names_of(instance_), IsEmpty());
}

// ---- Making segments longer ----

TEST_F(ShmEnvTest, WhatIsAddedIsBackedAndZeroAndSeenThroughOlderMappings) {
  auto segment = create(3 * kPageBytes);
  const auto mapped = Mapping::map(segment.reader.get(), 40 * kPageBytes, Access::read_only);
  ASSERT_THAT(mapped, Succeeds());
  ASSERT_EQ(::pwrite(segment.writer.get(), "!", 1, 3 * kPageBytes - 1), 1);
  for (const std::uint64_t pages : {std::uint64_t{4}, std::uint64_t{40}}) {
    ASSERT_THAT(env_.grow(segment, pages * kPageBytes), Succeeds());
    segment.size_bytes = pages * kPageBytes;
    const auto info = stat_of(segment.reader.get());
    EXPECT_EQ(static_cast<std::uint64_t>(info.st_size), segment.size_bytes);
    EXPECT_GE(static_cast<std::uint64_t>(info.st_blocks) * 512, segment.size_bytes);
    const auto* bytes = reinterpret_cast<const char*>(mapped->data());
    EXPECT_EQ(std::string(bytes, header_.size()), header_);
    EXPECT_EQ(bytes[3 * kPageBytes - 1], '!');
    EXPECT_TRUE(
        std::all_of(bytes + 3 * kPageBytes, bytes + segment.size_bytes, [](char byte) { return byte == 0; }));
  }
  env_.remove(std::move(segment));
}

TEST_F(ShmEnvTest, WhatCannotGrowIsAsLongAsBefore) {
  const auto said = say_in_small_shm(8 * kMib, [&] {
    auto segment = create(3 * kMib);
    const auto free_bytes = env_.space().free_bytes;
    const auto refused = env_.grow(segment, 9 * kMib);
    std::string text = std::string(refused ? "grown" : to_string(refused.error().code));
    text += fmt::format(", {} MiB, free as before {}, ",
                        stat_of(segment.reader.get()).st_size / static_cast<off_t>(kMib),
                        env_.space().free_bytes == free_bytes);
    return text + (env_.grow(segment, 8 * kMib) ? "then grown" : "then refused");
  });
  if (!said) GTEST_SKIP() << "no file system of its own for this user";
  EXPECT_EQ(*said, "out_of_memory, 3 MiB, free as before true, then grown");
}

// ---- Giving back what others may have ----

TEST_F(ShmEnvTest, WhatNobodyElseHasIsFreeAtOnce) {
  auto segment = create(3 * kPageBytes);
  EXPECT_TRUE(env_.try_remove(segment));
  EXPECT_FALSE(segment.lease);
  EXPECT_THAT(names_of(instance_), testing::IsEmpty());
}

TEST_F(ShmEnvTest, WhatSomebodyHasKeepsItsNameAndOneDescriptorUntilTheyLetItGo) {
  const auto way_to_have_it = [&](Segment& segment) -> std::vector<std::function<void()>> {
    const auto keep_fd = [](int fd) {
      auto kept = std::make_shared<UniqueFd>(fd);
      return [kept] { kept->reset(); };
    };
    auto mapping =
        std::make_shared<Mapping>(*Mapping::map(segment.reader.get(), segment.size_bytes, Access::read_only));
    return {
        keep_fd(::open(shm_path(segment.name).c_str(), O_RDONLY | O_CLOEXEC)),
        keep_fd(::fcntl(segment.reader.get(), F_DUPFD_CLOEXEC, 0)),  // as a reader gets it
        keep_fd(::fcntl(segment.writer.get(), F_DUPFD_CLOEXEC, 0)),  // as a writer gets it
        [mapping] { *mapping = Mapping(); },
    };
  };
  auto segment = create(3 * kPageBytes);
  for (const auto& let_go : way_to_have_it(segment)) {
    EXPECT_FALSE(env_.try_remove(segment));
    EXPECT_TRUE(segment.lease);
    EXPECT_EQ(names_of(instance_).size(), 1U);
    let_go();
  }
  EXPECT_TRUE(env_.try_remove(segment));
  EXPECT_THAT(names_of(instance_), testing::IsEmpty());
}

TEST_F(ShmEnvTest, AMappingOfASetsSegmentCountsThoughTheSetHasNoLease) {
  auto segment = create(3 * kPageBytes);
  segment.lease.reset();
  env_.unlink(segment);
  auto mapped = Mapping::map(segment.reader.get(), segment.size_bytes, Access::read_only);
  ASSERT_THAT(mapped, Succeeds());
  EXPECT_FALSE(env_.try_remove(segment));
  *mapped = Mapping();
  EXPECT_TRUE(env_.try_remove(segment));
}

// ---- When something runs out ----

TEST_F(ShmEnvTest, AFullFileSystemIsOutOfMemoryAndNothingIsLeft) {
  const auto said = say_in_small_shm(8 * kMib, [&] {
    const auto before = env_.space();
    std::string text = result_of(try_create(9 * kMib)) + ", ";
    const auto after = env_.space();
    text += fmt::format("left {}, free as before {}, ", names_of(instance_).size(),
                        after.free_bytes == before.free_bytes);
    return text + result_of(try_create(8 * kMib));
  });
  if (!said) GTEST_SKIP() << "no file system of its own for this user";
  EXPECT_EQ(*said, "out_of_memory, left 0, free as before true, made");
}

TEST_F(ShmEnvTest, HugePagesAreStillHadAfterTheMemoryWasFullOnce) {
  const auto said = say_in_small_shm(8 * kMib, [&] {
    // One attempt may fail for once, when the kernel has a page in its hands (EAGAIN), or no huge one free.
    const auto huge_bytes = [&] {
      std::uint64_t most = 0;
      for (int i = 0; i < 100 && most < 4 * kMib; ++i) {
        auto segment = create(4 * kMib);
        const auto usage = env_.usage(segment);
        env_.remove(std::move(segment));
        if (!usage) return std::uint64_t{1};
        most = std::max(most, usage->huge_bytes);
      }
      return most;
    };
    const auto before = huge_bytes();
    auto most = env_.create(2, 7 * kMib, header_, {}, never_);
    const std::string full = result_of(try_create(2 * kMib));  // there is room for a page, not for a huge one
    if (most) env_.remove(*std::move(most));
    return fmt::format("{}, {}", full,
                       huge_bytes() == before ? "as before" : fmt::format("not as before: {}", before));
  });
  if (!said) GTEST_SKIP() << "no file system of its own for this user";
  EXPECT_EQ(*said, "out_of_memory, as before");
}

TEST_F(ShmEnvTest, WithoutDescriptorsNothingIsLeft) {
  const std::string said = say_in_fork([&] {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const auto spare = static_cast<rlim_t>(open_files().size()) + 16;
    int failures = 0;
    for (rlim_t allowed = 3; allowed < spare; ++allowed) {
      const rlimit tight{allowed, limit.rlim_max};
      ::setrlimit(RLIMIT_NOFILE, &tight);
      const auto segment = try_create(3 * kPageBytes);
      ::setrlimit(RLIMIT_NOFILE, &limit);
      if (segment) return fmt::format("{} failures, then made", failures >= 4 ? "several" : "too few");
      ++failures;
      if (segment.error().code != Errc::quota_exceeded) return segment.error().message;
      if (!names_of(instance_).empty()) return fmt::format("left something: {}", segment.error().message);
    }
    return std::string("never made");
  });
  env_.remove_leftovers();
  EXPECT_EQ(said, "several failures, then made");
}

// ---- Sealing ----

class SealTest : public ShmEnvTest {
 protected:
  static constexpr std::uint64_t kSize = 5 * kPageBytes;

  void SetUp() override {
    if (!env_.has_leases()) GTEST_SKIP() << "the kernel gives no leases here";
    segment_ = create(kSize);
  }
  void TearDown() override {
    if (!segment_.name.empty()) env_.remove(std::move(segment_));
    ShmEnvTest::TearDown();
  }

  Result<bool> seal() { return env_.seal(segment_, header_, trailer_); }
  [[nodiscard]] UniqueFd dup_writer() const {
    return UniqueFd(::fcntl(segment_.writer.get(), F_DUPFD_CLOEXEC, 0));
  }
  [[nodiscard]] Mapping map_writable() const {
    auto mapped = Mapping::map(segment_.writer.get(), kSize, Access::read_write);
    EXPECT_THAT(mapped, Succeeds());
    return *std::move(mapped);
  }
  [[nodiscard]] std::string path() const { return shm_path(segment_.name); }

  Segment segment_;
  const TrailerPage trailer_ =
      encode_trailer({.name = "x", .id = 1, .version = 1, .data_bytes = kSize - kDataOffset - kTrailerBytes});
};

TEST_F(SealTest, WritesTheTrailerAndGivesUpTheWritableDescriptor) {
  EXPECT_THAT(seal(), Optional(true));
  EXPECT_FALSE(segment_.writer);
  TrailerPage page;
  ASSERT_EQ(::pread(segment_.reader.get(), page.data(), page.size(), kSize - kTrailerBytes),
            static_cast<ssize_t>(page.size()));
  EXPECT_EQ(page, trailer_);
  EXPECT_EQ(::fcntl(segment_.lease.get(), F_GETLEASE), F_RDLCK);
  EXPECT_FALSE(ShmEnv::is_lease_broken(segment_.lease.get()));
}

TEST_F(SealTest, ADescriptorWithoutALeaseIsAsGoodAsBroken) {
  EXPECT_TRUE(ShmEnv::is_lease_broken(segment_.lease.get()));
  ASSERT_THAT(seal(), Optional(true));
  EXPECT_FALSE(ShmEnv::is_lease_broken(segment_.lease.get()));
  EXPECT_TRUE(ShmEnv::is_lease_broken(segment_.reader.get()));
  ShmEnv::end_lease(segment_.lease.get());
  EXPECT_TRUE(ShmEnv::is_lease_broken(segment_.lease.get()));
}

TEST_F(SealTest, WaitsForAWritableMapping) {
  auto mapped = map_writable();
  EXPECT_THAT(seal(), Optional(false));
  EXPECT_THAT(seal(), Optional(false));
  mapped = Mapping();
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, AMappingThatIsOnlyProtectedIsStillAWriter) {
  const auto mapped = map_writable();
  ASSERT_EQ(::mprotect(mapped.data(), kSize, PROT_READ), 0);
  EXPECT_THAT(seal(), Optional(false));
}

TEST_F(SealTest, AMappingThatWasReplacedIsNoWriter) {
  auto mapped = map_writable();
  ASSERT_THAT(mapped.make_read_only(segment_.reader.get()), Succeeds());
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, APrivateMappingIsNoWriter) {
  const auto mapped = Mapping::map(segment_.reader.get(), kSize, Access::copy_on_write);
  ASSERT_THAT(mapped, Succeeds());
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, WaitsForADescriptor) {
  auto writer = dup_writer();
  EXPECT_THAT(seal(), Optional(false));
  writer.reset();
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, WaitsForADescriptorOnItsWayThroughASocket) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
  UniqueFd sender(ends[0]);
  UniqueFd receiver(ends[1]);
  const std::array<int, 1> fds = {segment_.writer.get()};
  ASSERT_THAT(send_frame(sender.get(), std::array<std::byte, 1>{}, fds), Optional(true));
  EXPECT_THAT(seal(), Optional(false));
  receiver.reset();
  sender.reset();
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, WaitsForAnotherProcess) {
  Pipe ready;
  Forked child([&] {
    const auto mapped = Mapping::map(segment_.writer.get(), kSize, Access::read_write);
    segment_.writer.reset();
    write_all(ready.writer.get(), "r");
    ::pause();
    return std::string();
  });
  ready.writer.reset();
  ASSERT_EQ(read_some(ready.reader.get()), "r");
  EXPECT_THAT(seal(), Optional(false));
  const auto writers = env_.writers_of(segment_);
  ASSERT_EQ(writers.size(), 1U);
  EXPECT_EQ(writers[0].pid, child.pid());
  child.kill();
  EXPECT_THAT(env_.writers_of(segment_), IsEmpty());
  EXPECT_THAT(seal(), Optional(true));
}

TEST_F(SealTest, RefusesAHeaderThatItsWriterOverwrote) {
  ASSERT_EQ(::pwrite(segment_.writer.get(), "X", 1, 20), 1);
  const auto sealed = seal();
  ASSERT_THAT(sealed, FailsWith(Errc::corrupted));
  EXPECT_THAT(sealed.error().message, HasSubstr("the header"));
}

TEST_F(SealTest, RefusesWhatWasOverwrittenAfterTheTrailerWasWritten) {
  for (const std::uint64_t offset : {std::uint64_t{0}, kDataOffset - 1, kSize - kTrailerBytes, kSize - 1}) {
    auto mapped = map_writable();
    EXPECT_THAT(seal(), Optional(false));
    mapped.data()[offset] ^= std::byte{1};
    mapped = Mapping();
    EXPECT_THAT(seal(), FailsWith(Errc::corrupted)) << offset;
    env_.remove(std::exchange(segment_, Segment()));
    segment_ = create(kSize);
  }
}

TEST_F(SealTest, RefusesAFileThatWasCutShortOrGrew) {
  for (const std::uint64_t size_bytes : {std::uint64_t{0}, kPageBytes, kSize - 1, kSize + 1, 2 * kSize}) {
    auto writer = dup_writer();
    EXPECT_THAT(seal(), Optional(false));
    ASSERT_EQ(::ftruncate(writer.get(), static_cast<off_t>(size_bytes)), 0);
    writer.reset();
    const auto sealed = seal();
    ASSERT_THAT(sealed, FailsWith(Errc::corrupted)) << size_bytes;
    EXPECT_THAT(sealed.error().message, HasSubstr("the size"));
    env_.remove(std::exchange(segment_, Segment()));
    segment_ = create(kSize);
  }
}

TEST_F(SealTest, RefusesAFileThatWasCutShortBeforeTheTrailerMadeItLongAgain) {
  ASSERT_EQ(::ftruncate(segment_.writer.get(), kPageBytes), 0);
  EXPECT_THAT(seal(), FailsWith(Errc::corrupted));
}

TEST_F(SealTest, RefusesAFileWithAHole) {
  const int flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  ASSERT_EQ(::fallocate(segment_.writer.get(), flags, kDataOffset, kPageBytes), 0);
  const auto sealed = seal();
  ASSERT_THAT(sealed, FailsWith(Errc::corrupted));
  EXPECT_THAT(sealed.error().message, HasSubstr("the backing memory"));
}

// A reader that touches the hole while the file system is full would die of SIGBUS.
TEST_F(SealTest, RefusesAHoleThatMemoryBehindTheEndMakesUpFor) {
  const auto blocks = stat_of(segment_.writer.get()).st_blocks;
  ASSERT_EQ(
      ::fallocate(segment_.writer.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, kDataOffset, kPageBytes),
      0);
  ASSERT_EQ(::fallocate(segment_.writer.get(), FALLOC_FL_KEEP_SIZE, kSize, kPageBytes), 0);
  ASSERT_EQ(stat_of(segment_.writer.get()).st_blocks, blocks);
  EXPECT_THAT(seal(), FailsWith(Errc::corrupted));
}

TEST_F(SealTest, NamesThisProcessForADescriptorAndForAMapping) {
  const auto own_pid = [&] {
    const auto writers = env_.writers_of(segment_);
    return writers.size() == 1 ? writers[0].pid : 0;
  };
  EXPECT_EQ(own_pid(), ::getpid());
  EXPECT_EQ(env_.writers_of(segment_)[0].command, "daemon_test");
  auto mapped = map_writable();
  segment_.writer.reset();
  EXPECT_EQ(own_pid(), ::getpid());
  mapped = Mapping();
  EXPECT_EQ(own_pid(), 0);
}

TEST_F(SealTest, NamesThisProcessForAMappingThatCanBeExecutedToo) {
  void* mapped =
      ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, segment_.writer.get(), 0);
  if (mapped == MAP_FAILED) GTEST_SKIP() << "/dev/shm is mounted noexec";
  segment_.writer.reset();
  EXPECT_THAT(env_.writers_of(segment_), testing::SizeIs(1));
  ::munmap(mapped, kSize);
  EXPECT_THAT(env_.writers_of(segment_), IsEmpty());
}

// ---- After the seal ----

TEST_F(SealTest, ASealedSegmentCannotBeOpenedByWhoeverIsNotRoot) {
  ASSERT_THAT(seal(), Optional(true));
  const std::string said = say_in_fork([&] {
    const bool is_other = ::geteuid() == 0 && ::setgid(65534) == 0 && ::setuid(65534) == 0;
    const bool can_write = ::open(path().c_str(), O_RDWR) >= 0 || errno != EACCES;
    const bool can_read = is_other && (::open(path().c_str(), O_RDONLY) >= 0 || errno != EACCES);
    return std::string(can_write ? "can write" : can_read ? "can read" : "cannot");
  });
  EXPECT_EQ(said, "cannot");
}

TEST_F(SealTest, WhoOpensASealedSegmentForWritingIsToldOnAndWaits) {
  ASSERT_THAT(seal(), Optional(true));
  ASSERT_EQ(::chmod(path().c_str(), 0600), 0);  // its owner may, and then open it
  auto opener =
      std::async(std::launch::async, [this] { return UniqueFd(::open(path().c_str(), O_RDWR | O_CLOEXEC)); });
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, test_lease_signal());
  siginfo_t info{};
  const timespec patience{.tv_sec = 20, .tv_nsec = 0};
  ASSERT_EQ(::sigtimedwait(&set, &info, &patience), test_lease_signal());
  EXPECT_EQ(info.si_fd, segment_.lease.get());
  EXPECT_TRUE(ShmEnv::is_lease_broken(info.si_fd));
  EXPECT_EQ(opener.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  ShmEnv::end_lease(segment_.lease.get());
  EXPECT_TRUE(opener.get());
}

TEST_F(SealTest, ReadersDoNotBreakTheLease) {
  ASSERT_THAT(seal(), Optional(true));
  const UniqueFd again(::open(path().c_str(), O_RDONLY | O_CLOEXEC));
  const auto shared = Mapping::map(segment_.reader.get(), kSize, Access::read_only);
  const auto own = Mapping::map(segment_.reader.get(), kSize, Access::copy_on_write);
  EXPECT_THAT(shared, Succeeds());
  EXPECT_THAT(own, Succeeds());
  env_.unlink(segment_);
  EXPECT_EQ(::fcntl(segment_.lease.get(), F_GETLEASE), F_RDLCK);
  EXPECT_FALSE(ShmEnv::is_lease_broken(segment_.lease.get()));
}

}  // namespace
}  // namespace cowmgr
