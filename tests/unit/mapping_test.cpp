#include "proto/mapping.hpp"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <fcntl.h>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "proto/unique_fd.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kHasThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kHasThreadSanitizer = true;
#else
constexpr bool kHasThreadSanitizer = false;
#endif
#else
constexpr bool kHasThreadSanitizer = false;
#endif

constexpr std::uint64_t kMi = std::uint64_t{1} << 20U;

// A file in /dev/shm as the daemon makes one: whoever is not the creating descriptor can only read. Its name
// is gone before the constructor returns, so nothing stays behind however a test ends.
struct ShmFile {
  explicit ShmFile(std::uint64_t size_bytes) {
    static int count = 0;
    const auto name = fmt::format("/cowmgr-mapping-test.{}.{}", ::getpid(), ++count);
    writable = UniqueFd(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0400));
    readable = UniqueFd(::shm_open(name.c_str(), O_RDONLY, 0));
    ::shm_unlink(name.c_str());
    EXPECT_TRUE(writable && readable);
    EXPECT_EQ(::ftruncate(writable.get(), static_cast<off_t>(size_bytes)), 0);
  }

  UniqueFd writable;
  UniqueFd readable;
};

Mapping mapped(int fd, std::uint64_t size_bytes, Access access) {
  auto mapping = Mapping::map(fd, size_bytes, access);
  EXPECT_THAT(mapping, Succeeds());
  return mapping ? *std::move(mapping) : Mapping();
}

char byte_of(const ShmFile& file, std::uint64_t offset) {
  char byte = 0;
  EXPECT_EQ(::pread(file.readable.get(), &byte, 1, static_cast<off_t>(offset)), 1);
  return byte;
}

// How a child that runs `body` ends, as waitpid(2) tells it. A fault kills it, sanitizer or not.
template <class Body>
int status_of_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit no_core{0, 0};
    ::setrlimit(RLIMIT_CORE, &no_core);
    std::signal(SIGSEGV, SIG_DFL);
    ::_exit(body());
  }
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

bool dies_of_writing_to(std::byte* address) {
  const int status = status_of_child([&] {
    *const_cast<volatile std::byte*>(address) = std::byte{1};
    return 0;
  });
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV;
}

// Whether this process maps one of this test's files at `address`.
bool has_file_at(const std::byte* address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    std::istringstream(line) >> std::hex >> begin >> dash >> end;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (begin <= at && at < end) return line.find("cowmgr-mapping-test") != std::string::npos;
  }
  return false;
}

bool child_has_file_at(const std::byte* address) {
  const int status = status_of_child([&] { return has_file_at(address) ? 1 : 0; });
  EXPECT_TRUE(WIFEXITED(status));
  return WEXITSTATUS(status) == 1;
}

// The kernel's word that nobody can write to the file (fcntl(2), F_SETLEASE).
bool gets_read_lease(const ShmFile& file) {
  if (::fcntl(file.readable.get(), F_SETLEASE, F_RDLCK) == 0) return true;
  EXPECT_EQ(errno, EAGAIN);
  return false;
}

bool kernel_gives_leases() {
  ShmFile file(kPageBytes);
  file.writable.reset();
  return ::fcntl(file.readable.get(), F_SETLEASE, F_RDLCK) == 0;
}

std::int64_t address_space_bytes() {
  std::int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<std::int64_t>(kPageBytes);
}

bool is_huge_aligned(const Mapping& mapping) {
  return reinterpret_cast<std::uintptr_t>(mapping.data()) % kHugePageBytes == 0;
}

// ---- Access ----

TEST(ReadOnlyMapping, ShowsTheFileAndWhatIsWrittenLater) {
  ShmFile file(kPageBytes);
  const auto view = mapped(file.readable.get(), kPageBytes, Access::read_only);
  EXPECT_EQ(view.data()[5], std::byte{0});
  ASSERT_EQ(::pwrite(file.writable.get(), "x", 1, 5), 1);
  EXPECT_EQ(view.data()[5], std::byte{'x'});
}

TEST(ReadOnlyMapping, FaultsOnAWrite) {
  ShmFile file(4 * kMi);
  const auto view = mapped(file.readable.get(), 4 * kMi, Access::read_only);
  EXPECT_TRUE(dies_of_writing_to(view.data()));
  EXPECT_TRUE(dies_of_writing_to(view.data() + 4 * kMi - 1));
  EXPECT_EQ(byte_of(file, 0), 0);
}

TEST(ReadOnlyMapping, CannotBeMadeWritable) {
  ShmFile file(kPageBytes);
  const auto view = mapped(file.readable.get(), kPageBytes, Access::read_only);
  EXPECT_EQ(::mprotect(view.data(), kPageBytes, PROT_READ | PROT_WRITE), -1);
  EXPECT_EQ(errno, EACCES);
}

TEST(ReadOnlyMapping, IsThereInAForkedChild) {
  ShmFile file(kPageBytes);
  const auto view = mapped(file.readable.get(), kPageBytes, Access::read_only);
  EXPECT_TRUE(child_has_file_at(view.data()));
}

TEST(WriterMapping, WritesToTheFile) {
  ShmFile file(2 * kPageBytes);
  const auto writer = mapped(file.writable.get(), 2 * kPageBytes, Access::read_write);
  const auto view = mapped(file.readable.get(), 2 * kPageBytes, Access::read_only);
  writer.data()[kPageBytes] = std::byte{'w'};
  EXPECT_EQ(view.data()[kPageBytes], std::byte{'w'});
  EXPECT_EQ(byte_of(file, kPageBytes), 'w');
}

TEST(WriterMapping, NeedsAWritableDescriptor) {
  ShmFile file(kPageBytes);
  EXPECT_THAT(Mapping::map(file.readable.get(), kPageBytes, Access::read_write),
              FailsWith(Errc::permission_denied));
}

TEST(WriterMapping, StaysBehindWhenTheProcessForks) {
  ShmFile file(4 * kMi);
  const auto small = mapped(file.writable.get(), kPageBytes, Access::read_write);
  const auto large = mapped(file.writable.get(), 4 * kMi, Access::read_write);
  for (auto* address : {small.data(), large.data(), large.data() + 4 * kMi - kPageBytes}) {
    EXPECT_FALSE(child_has_file_at(address));
  }
}

TEST(CopyOnWriteMapping, KeepsItsWritesToItself) {
  ShmFile file(4 * kMi);
  const auto own = mapped(file.readable.get(), 4 * kMi, Access::copy_on_write);
  const auto view = mapped(file.readable.get(), 4 * kMi, Access::read_only);
  for (const std::uint64_t offset : {std::uint64_t{0}, kMi + 1, 4 * kMi - 1}) {
    own.data()[offset] = std::byte{'p'};
    EXPECT_EQ(own.data()[offset], std::byte{'p'});
    EXPECT_EQ(view.data()[offset], std::byte{0});
    EXPECT_EQ(byte_of(file, offset), 0);
  }
}

TEST(CopyOnWriteMapping, ShowsTheFileWhereItWasNotWritten) {
  ShmFile file(2 * kPageBytes);
  ASSERT_EQ(::pwrite(file.writable.get(), "f", 1, kPageBytes), 1);
  const auto own = mapped(file.readable.get(), 2 * kPageBytes, Access::copy_on_write);
  own.data()[0] = std::byte{'p'};
  EXPECT_EQ(own.data()[kPageBytes], std::byte{'f'});
}

// ---- Lifetime ----

TEST(Mapping, OutlivesItsDescriptor) {
  ShmFile file(kPageBytes);
  const auto view = mapped(file.readable.get(), kPageBytes, Access::read_only);
  ASSERT_EQ(::pwrite(file.writable.get(), "x", 1, 0), 1);
  file.readable.reset();
  file.writable.reset();
  EXPECT_EQ(view.data()[0], std::byte{'x'});
}

TEST(Mapping, UnmapsWhenItGoes) {
  ShmFile file(kPageBytes);
  std::byte* address = nullptr;
  {
    const auto view = mapped(file.readable.get(), kPageBytes, Access::read_only);
    address = view.data();
    EXPECT_TRUE(has_file_at(address));
  }
  EXPECT_FALSE(has_file_at(address));
}

TEST(Mapping, MovesWithoutRemapping) {
  ShmFile file(kPageBytes);
  auto first = mapped(file.readable.get(), kPageBytes, Access::read_only);
  auto* const address = first.data();
  auto second = std::move(first);
  EXPECT_EQ(second.data(), address);
  EXPECT_EQ(second.size_bytes(), kPageBytes);
  second = mapped(file.readable.get(), kPageBytes, Access::read_only);
  EXPECT_NE(second.data(), address) << "the new mapping was made before the old one went";
  EXPECT_FALSE(has_file_at(address));
}

TEST(Mapping, IsNothingAtFirst) {
  const Mapping none;
  EXPECT_EQ(none.data(), nullptr);
  EXPECT_EQ(none.size_bytes(), 0U);
}

TEST(Mapping, KnowsTheSizeItWasAskedFor) {
  ShmFile file(4 * kMi);
  for (const std::uint64_t size : {std::uint64_t{1}, kPageBytes, kPageBytes + 1, 2 * kMi + 3, 4 * kMi}) {
    EXPECT_EQ(mapped(file.readable.get(), size, Access::read_only).size_bytes(), size);
  }
}

TEST(Mapping, RefusesWhatTheKernelRefuses) {
  EXPECT_THAT(Mapping::map(-1, kPageBytes, Access::read_only), FailsWith(Errc::os_failure));
  EXPECT_THAT(Mapping::map(-1, 4 * kMi, Access::read_only), FailsWith(Errc::os_failure));
  ShmFile file(kPageBytes);
  for (const unsigned shift : {48U, 62U, 63U}) {
    EXPECT_THAT(Mapping::map(file.readable.get(), std::uint64_t{1} << shift, Access::read_only),
                FailsWith(Errc::out_of_memory))
        << shift;
  }
  EXPECT_THAT(Mapping::map(file.readable.get(), ~std::uint64_t{0} - kHugePageBytes, Access::read_only),
              FailsWith(Errc::out_of_memory));
  EXPECT_THAT(Mapping::map(file.readable.get(), kPageBytes, Access::read_only), Succeeds())
      << "and is none the worse";
}

TEST(Mapping, IsNeverEmpty) {
  ShmFile file(kPageBytes);
  EXPECT_DEATH(static_cast<void>(Mapping::map(file.readable.get(), 0, Access::read_only)), "does not hold");
}

// ---- Sealing ----

TEST(MakeReadOnly, KeepsAddressAndContent) {
  for (const std::uint64_t size : {kPageBytes, kPageBytes + 1, 4 * kMi}) {
    ShmFile file(segment_bytes(size));
    auto array = mapped(file.writable.get(), size, Access::read_write);
    auto* const address = array.data();
    array.data()[0] = std::byte{'a'};
    array.data()[size - 1] = std::byte{'z'};
    ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
    EXPECT_EQ(array.data(), address);
    EXPECT_EQ(array.size_bytes(), size);
    EXPECT_EQ(array.data()[0], std::byte{'a'});
    EXPECT_EQ(array.data()[size - 1], std::byte{'z'});
  }
}

TEST(MakeReadOnly, LeavesNoWayToWrite) {
  ShmFile file(kPageBytes);
  auto array = mapped(file.writable.get(), kPageBytes, Access::read_write);
  array.data()[0] = std::byte{'a'};
  ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
  EXPECT_TRUE(dies_of_writing_to(array.data()));
  EXPECT_EQ(::mprotect(array.data(), kPageBytes, PROT_READ | PROT_WRITE), -1);
}

TEST(MakeReadOnly, LetsForkedChildrenRead) {
  ShmFile file(kPageBytes);
  auto array = mapped(file.writable.get(), kPageBytes, Access::read_write);
  EXPECT_FALSE(child_has_file_at(array.data()));
  ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
  EXPECT_TRUE(child_has_file_at(array.data()));
}

TEST(MakeReadOnly, StillUnmapsWhenTheMappingGoes) {
  ShmFile file(kPageBytes);
  std::byte* address = nullptr;
  {
    auto array = mapped(file.writable.get(), kPageBytes, Access::read_write);
    ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
    address = array.data();
  }
  EXPECT_FALSE(has_file_at(address));
}

TEST(MakeReadOnly, LeavesTheMappingAsItWasWhereItFails) {
  ShmFile file(kPageBytes);
  auto array = mapped(file.writable.get(), kPageBytes, Access::read_write);
  array.data()[0] = std::byte{'a'};
  EXPECT_THAT(array.make_read_only(-1), FailsWith(Errc::os_failure));
  array.data()[0] = std::byte{'b'};
  EXPECT_EQ(byte_of(file, 0), 'b');
}

TEST(MakeReadOnly, IsWhatTheKernelWantsForAReadLease) {
  if (!kernel_gives_leases()) GTEST_SKIP() << "this kernel gives no leases on /dev/shm";
  for (const std::uint64_t size : {kPageBytes, 4 * kMi}) {
    ShmFile file(size);
    auto array = mapped(file.writable.get(), size, Access::read_write);
    EXPECT_FALSE(gets_read_lease(file)) << "a writable descriptor and a writable mapping";
    file.writable.reset();
    EXPECT_FALSE(gets_read_lease(file)) << "a writable mapping";
    ASSERT_EQ(::mprotect(array.data(), size, PROT_READ), 0);
    EXPECT_FALSE(gets_read_lease(file)) << "mprotect is not enough";
    ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
    EXPECT_TRUE(gets_read_lease(file));
  }
}

TEST(MakeReadOnly, DoesNotHideAnotherWriter) {
  if (!kernel_gives_leases()) GTEST_SKIP() << "this kernel gives no leases on /dev/shm";
  ShmFile file(kPageBytes);
  auto array = mapped(file.writable.get(), kPageBytes, Access::read_write);
  auto other = mapped(file.writable.get(), kPageBytes, Access::read_write);
  file.writable.reset();
  ASSERT_THAT(array.make_read_only(file.readable.get()), Succeeds());
  EXPECT_FALSE(gets_read_lease(file));
  other = Mapping();
  EXPECT_TRUE(gets_read_lease(file));
}

TEST(CopyOnWriteMapping, IsNoWriterInTheKernelsEyes) {
  if (!kernel_gives_leases()) GTEST_SKIP() << "this kernel gives no leases on /dev/shm";
  ShmFile file(kPageBytes);
  file.writable.reset();
  const auto own = mapped(file.readable.get(), kPageBytes, Access::copy_on_write);
  own.data()[0] = std::byte{'p'};
  EXPECT_TRUE(gets_read_lease(file));
}

// ---- Alignment ----

TEST(LargeMappings, StartAtAMultipleOfTheHugePageSize) {
  ShmFile file(kPageBytes);  // mapping past the end is allowed; nothing is touched there
  std::vector<Mapping> kept;
  for (int round = 0; round < 3; ++round) {
    for (const std::uint64_t size : {2 * kMi, 2 * kMi + 1, 2 * kMi + kPageBytes, 3 * kMi,
                                     5 * kMi + 3 * kPageBytes, 64 * kMi, 1024 * kMi, 2 * kMi}) {
      for (const auto access : {Access::read_only, Access::read_write, Access::copy_on_write}) {
        const bool writes = access == Access::read_write;
        kept.push_back(mapped((writes ? file.writable : file.readable).get(), size, access));
        if (!kHasThreadSanitizer) {
          EXPECT_TRUE(is_huge_aligned(kept.back())) << size << ", round " << round;
        }
      }
    }
    for (std::size_t i = 0; i < kept.size(); i += 2) kept[i] = Mapping();  // holes for the next round
  }
}

TEST(LargeMappings, AreAlignedAmongSmallOnes) {
  ShmFile file(kPageBytes);
  std::vector<Mapping> kept;
  for (int i = 0; i < 200; ++i) {
    kept.push_back(
        mapped(file.readable.get(), kPageBytes * (1 + static_cast<std::uint64_t>(i) % 7), Access::read_only));
    kept.push_back(
        mapped(file.readable.get(), 2 * kMi + kPageBytes * static_cast<std::uint64_t>(i), Access::read_only));
    if (!kHasThreadSanitizer) {
      EXPECT_TRUE(is_huge_aligned(kept.back())) << i;
    }
  }
}

TEST(LargeMappings, AreAlignedInAWornAddressSpace) {
  ShmFile file(kPageBytes);
  std::minstd_rand random(1);
  std::vector<Mapping> kept(100);
  int unaligned = 0;
  for (int i = 0; i < 3000; ++i) {
    auto& place = kept[random() % kept.size()];
    place = mapped(file.readable.get(), 2 * kMi + random() % 4096 * kPageBytes, Access::read_only);
    if (!is_huge_aligned(place)) ++unaligned;
  }
  if (!kHasThreadSanitizer) {
    EXPECT_EQ(unaligned, 0);
  }
}

TEST(LargeMappings, TakeNoMoreAddressSpaceThanTheyNeed) {
  ShmFile file(kPageBytes);
  const auto before = address_space_bytes();
  std::vector<Mapping> kept;
  for (int i = 0; i < 20; ++i) {
    kept.push_back(mapped(file.readable.get(), 2 * kMi + 1, Access::read_only));
    EXPECT_THAT(Mapping::map(-1, 2 * kMi + 1, Access::read_only), FailsWith(Errc::os_failure));
  }
  if (!kHasThreadSanitizer) {
    EXPECT_LT(address_space_bytes() - before, std::int64_t{60 * kMi});
  }
  kept.clear();
  EXPECT_LT(address_space_bytes() - before, std::int64_t{20 * kMi});
}

TEST(LargeMappings, DoNotOverlap) {
  ShmFile file(64 * kMi);
  std::vector<Mapping> kept;
  for (unsigned i = 0; i < 8; ++i) {
    kept.push_back(mapped(file.readable.get(), 8 * kMi, Access::copy_on_write));
    kept.back().data()[0] = kept.back().data()[8 * kMi - 1] = std::byte(i + 1);
  }
  for (unsigned i = 0; i < 8; ++i) {
    EXPECT_EQ(kept[i].data()[0], std::byte(i + 1));
    EXPECT_EQ(kept[i].data()[8 * kMi - 1], std::byte(i + 1));
  }
}

TEST(LargeMappings, MayBeMadeByManyThreadsAtOnce) {
  ShmFile file(4 * kMi);
  ASSERT_EQ(::pwrite(file.writable.get(), "x", 1, 4 * kMi - 1), 1);
  std::atomic<int> good = 0;
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      std::vector<Mapping> kept;
      for (int i = 0; i < 50; ++i) {
        auto view = Mapping::map(file.readable.get(), 4 * kMi, Access::read_only);
        if (view && view->data()[4 * kMi - 1] == std::byte{'x'}) ++good;
        if (view && i % 2 == 0) kept.push_back(*std::move(view));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, 200);
}

}  // namespace
}  // namespace cowmgr
