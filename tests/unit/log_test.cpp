#include "daemon/core/log.hpp"

#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <regex>
#include <string>

#include <boost/asio/io_context.hpp>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include "daemon/core/peer_log.hpp"
#include "tests/support/forked.hpp"

namespace cowmgr {
namespace {

using namespace std::chrono_literals;

using testing::HasSubstr;
using testing::IsEmpty;

// A pipe that holds about seventy lines.
struct SmallPipe : Pipe {
  SmallPipe() { COWMGR_ASSERT(::fcntl(writer.get(), F_SETPIPE_SZ, 4096) == 4096); }
};

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// ---- Log ----

TEST(Log, WritesLinesAsTheyAre) {
  Pipe pipe;
  {
    const Log log({.level = "info", .fd = pipe.writer.get()});
    spdlog::debug("unsaid");
    spdlog::info("said");
    spdlog::error("{}", std::string(10'000, 'x'));
  }
  pipe.writer.reset();
  const std::string text = read_all(pipe.reader.get());
  EXPECT_THAT(text, testing::MatchesRegex("20..-..-..T..:..:..[.]...[+-]..:.. info said\n20.* error x+\n"));
  EXPECT_EQ(count_of(text, "x"), 10'000U);
}

// Whoever logs goes on, the newest lines are kept, and the next line that is written tells what went.
TEST(Log, CountsWhatNobodyReads) {
  SmallPipe pipe;
  constexpr std::size_t kLines = 500;
  std::string text;
  {
    const Log log({.fd = pipe.writer.get(), .max_lines = 8, .patience = 60s});
    for (std::size_t i = 0; i < kLines; ++i) spdlog::info("line {} of many", i);
    spdlog::info("the last line");
    while (text.find("the last line") == std::string::npos) text += read_some(pipe.reader.get());
  }
  std::size_t told = 0;
  const std::regex note("warning ([0-9]+) line\\(s\\) before this one were left out");
  for (std::sregex_iterator at(text.begin(), text.end(), note), end; at != end; ++at)
    told += std::stoul((*at)[1]);
  EXPECT_GT(told, 0U);
  EXPECT_EQ(told + count_of(text, " of many\n"), kLines);
}

TEST(Log, EndsAlthoughNobodyReads) {
  SmallPipe pipe;
  {
    const Log log({.fd = pipe.writer.get(), .patience = 1ms});
    for (int i = 0; i < 500; ++i) spdlog::info("line {} of many", i);
  }
  EXPECT_NE(read_some(pipe.reader.get()), "");
}

TEST(Log, EndsAlthoughItsReaderIsGone) {
  ASSERT_NE(std::signal(SIGPIPE, SIG_IGN), SIG_ERR);
  Pipe pipe;
  pipe.reader.reset();
  const Log log({.fd = pipe.writer.get()});
  for (int i = 0; i < 500; ++i) spdlog::info("line {} of many", i);
}

// ---- Budget ----

class BudgetTest : public testing::Test {
 protected:
  std::size_t written(uid_t uid, std::size_t lines) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < lines; ++i) count += budget_.take(uid, now_) ? 1U : 0U;
    return count;
  }

  LogBudget budget_{{.lines = 10, .per_second = 2}};
  LogBudget::Tick now_{};
};

TEST_F(BudgetTest, IsEachUsersOwn) {
  EXPECT_EQ(written(1000, 100), 10U);
  EXPECT_EQ(written(1001, 5), 5U);
}

TEST_F(BudgetTest, GrowsWithTimeUpToItsLimit) {
  EXPECT_EQ(written(1000, 100), 10U);
  now_ += 1s;
  EXPECT_EQ(written(1000, 100), 2U);
  now_ += 1500ms;
  EXPECT_EQ(written(1000, 100), 3U);
  now_ += 24h;
  EXPECT_EQ(written(1000, 100), 10U);
}

TEST_F(BudgetTest, CountsWhatIsLeftOutAndTellsItOnce) {
  (void)written(1001, 13);
  (void)written(1000, 17);
  (void)written(1002, 10);
  const auto left_out = budget_.take_left_out();
  ASSERT_EQ(left_out.size(), 2U);
  EXPECT_EQ(left_out[0].uid, 1000U);
  EXPECT_EQ(left_out[0].lines, 7U);
  EXPECT_EQ(left_out[1].uid, 1001U);
  EXPECT_EQ(left_out[1].lines, 3U);
  EXPECT_THAT(budget_.take_left_out(), IsEmpty());
}

TEST_F(BudgetTest, ForgetsUsersWhoHaveBeenQuiet) {
  for (uid_t uid = 0; uid < 100'000; ++uid) {
    EXPECT_EQ(written(uid, 1), 1U);
    now_ += 1ms;
  }
  EXPECT_LT(budget_.users(), 2000U);
}

// ---- What peers do ----

TEST(PeerLog, MakesNoLineThatIsNotWritten) {
  Pipe pipe;
  std::size_t made = 0;
  constexpr std::size_t kLines = 3000;
  {
    const Log log({.level = "info", .fd = pipe.writer.get(), .max_lines = 2 * kLines});
    boost::asio::io_context io;
    PeerLog peers(io);
    const auto line = [&] {
      ++made;
      return std::string("a line");
    };
    for (std::size_t i = 0; i < kLines; ++i) peers.debug(1000, line);
    EXPECT_EQ(made, 0U);
    for (std::size_t i = 0; i < kLines; ++i) peers.info(1000, line);
    EXPECT_LT(made, kLines / 2);
    peers.stop();
    EXPECT_EQ(io.run(), 1U) << "nothing is left to wait for but the end of the timer";
  }
  pipe.writer.reset();
  const std::string text = read_all(pipe.reader.get());
  EXPECT_EQ(count_of(text, "a line\n"), made);
  EXPECT_THAT(text,
              HasSubstr(fmt::format("{} line(s) about what user 1000 does were left out", kLines - made)));
}

}  // namespace
}  // namespace cowmgr
