#include "proto/errors.hpp"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <set>
#include <string>
#include <sys/resource.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/forked.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

constexpr auto kLastCode = static_cast<std::uint16_t>(Errc::no_workers);

TEST(ErrorCode, HasAStableNameOfItsOwn) {
  std::set<std::string_view> names;
  for (std::uint16_t code = 1; code <= kLastCode; ++code) {
    const auto name = to_string(static_cast<Errc>(code));
    EXPECT_TRUE(names.insert(name).second) << name;
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string_view::npos) << name;
  }
  EXPECT_FALSE(names.contains("unknown_error"));
}

TEST(ErrorCode, IsNamedAsItIsSpelled) {
  EXPECT_EQ(to_string(Errc::invalid_name), "invalid_name");
  EXPECT_EQ(to_string(Errc::invalid_file), "invalid_file");
  EXPECT_EQ(to_string(Errc::out_of_memory), "out_of_memory");
  EXPECT_EQ(to_string(Errc::already_committed), "already_committed");
  EXPECT_EQ(to_string(Errc::protocol_mismatch), "protocol_mismatch");
  EXPECT_EQ(to_string(Errc::unsupported), "unsupported");
  EXPECT_EQ(to_string(Errc::cancelled), "cancelled");
  EXPECT_EQ(to_string(Errc::no_workers), "no_workers");
}

TEST(ErrorCode, OfANewerPeerIsUnknown) {
  EXPECT_EQ(to_string(static_cast<Errc>(kLastCode + 1)), "unknown_error");
  EXPECT_EQ(to_string(static_cast<Errc>(0xFFFF)), "unknown_error");
}

TEST(OsError, NamesTheCallAndItsObject) {
  const auto error = os_error("shm_open", "/cowmgr.default.1", EIO);
  EXPECT_EQ(error.code, Errc::os_failure);
  EXPECT_EQ(error.message, "shm_open /cowmgr.default.1: Input/output error");
}

// The error number alone would send people to look for memory.
TEST(OsError, NamesTheLimitOfTheProcess) {
  const std::string said = say_in_fork([] {
    for (const auto resource : {RLIMIT_AS, RLIMIT_FSIZE}) {
      const rlimit limit{std::uint64_t{1} << 50U, RLIM_INFINITY};
      if (::setrlimit(resource, &limit) != 0) return std::string("no limit can be set");
    }
    return os_error("mmap", "x", ENOMEM).message + "\n" + os_error("fallocate", "x", EFBIG).message + "\n" +
           os_error("open", "x", EMFILE).message + "\n" + os_error("open", "x", ENOSPC).message;
  });
  EXPECT_THAT(said,
              testing::MatchesRegex("mmap x: Cannot allocate memory .*1125899906842624: `ulimit -v`\\)\n"
                                    "fallocate x: File too large .*1125899906842624: `ulimit -f`\\)\n"
                                    "open x: Too many open files .*: `ulimit -n`\\)\n"
                                    "open x: No space left on device"));
}

TEST(OsError, TellsTheOutcomesThatCallersActOn) {
  struct Case {
    int number;
    Errc expected;
  };
  for (const auto& [number, expected] :
       {Case{ENOSPC, Errc::out_of_memory}, Case{ENOMEM, Errc::out_of_memory},
        Case{EACCES, Errc::permission_denied}, Case{EPERM, Errc::permission_denied},
        Case{ENOENT, Errc::not_found}, Case{EMFILE, Errc::quota_exceeded}, Case{ENFILE, Errc::quota_exceeded},
        Case{EFBIG, Errc::out_of_memory}, Case{EIO, Errc::os_failure}}) {
    EXPECT_EQ(os_error("open", "x", number).code, expected) << number;
  }
}

TEST(Result, HandsItsErrorOn) {
  const Result<int> refused = fail(Errc::busy, "somebody reads it");
  const Result<std::string> handed_on = error_of(refused);
  EXPECT_EQ(handed_on.error(), (Error{Errc::busy, "somebody reads it"}));
}

TEST(Assertion, StopsTheProcessAndSaysWhere) {
  COWMGR_ASSERT(1 + 1 == 2);
  EXPECT_EXIT(COWMGR_ASSERT(1 + 1 == 3), testing::KilledBySignal(SIGABRT),
              "internal error: 1 \\+ 1 == 3 does not hold .*errors_test.cpp");
}

}  // namespace
}  // namespace cowmgr
