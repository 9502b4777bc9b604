// The log: nobody waits for whoever reads it, and nobody fills it.
#include <csignal>
#include <fcntl.h>
#include <fstream>
#include <regex>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/daemon_fixture.hpp"
#include "tests/support/forked.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;
using testing::HasSubstr;

class Log : public DaemonLifeTest {
 protected:
  // What the daemon has written to log_file().
  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    out << std::ifstream(log_file()).rdbuf();
    return out.str();
  }
  [[nodiscard]] std::size_t lines_with(const std::string& part) const {
    std::ifstream in(log_file());
    std::size_t count = 0;
    for (std::string line; std::getline(in, line);) {
      if (line.find(part) != std::string::npos) ++count;
    }
    return count;
  }
  [[nodiscard]] std::string log_file() const { return outside_.file("log"); }
  void start_logging(std::vector<std::string> arguments) {
    log_.reset(::open(log_file().c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600));
    arguments.emplace_back("--purge");
    start_keeping(arguments, {.log = log_.get()});
  }
  // What of the doings of this user was left out, as the log says.
  [[nodiscard]] std::size_t left_out() const {
    const std::string all = text();
    const std::regex pattern(
        fmt::format("([0-9]+) line\\(s\\) about what user {} does were left out", ::geteuid()));
    std::size_t count = 0;
    for (std::sregex_iterator at(all.begin(), all.end(), pattern), end; at != end; ++at)
      count += std::stoul((*at)[1]);
    return count;
  }

  TemporaryDirectory outside_;  // what the daemon leaves in its own directory fails the test
  UniqueFd log_;
};

// A pipe on standard error that nobody reads.
TEST_F(Log, ThatNobodyReadsHoldsNobodyUp) {
  const Pipe pipe;
  ASSERT_GT(::fcntl(pipe.writer.get(), F_SETPIPE_SZ, 4096), 0);
  start_keeping({"--purge", "--log-level", "debug"}, {.log = pipe.writer.get()});
  RawPeer peer = RawPeer::greeted(socket());
  for (int i = 0; i < 300 && !HasFailure(); ++i) (void)RawPeer::greeted(socket());
  EXPECT_NE(peer.ask<wire::Pong>([](Builder& b) { return wire::CreatePing(b); }), nullptr);
  EXPECT_EQ(daemon_->stop(SIGTERM), 0) << "its end does not wait for a reader either";
  daemon_.reset();
}

TEST_F(Log, ThatIsReadHasEveryLine) {
  start_logging({"--log-level", "info"});
  const Client client = connect();
  for (int i = 0; i < 100; ++i)
    ASSERT_THAT(client.put<std::uint8_t>(fmt::format("a{}", i), std::vector<std::uint8_t>{1}, {1}),
                Succeeds());
  stop();
  EXPECT_EQ(lines_with(" sealed by process "), 100U);
  EXPECT_THAT(text(), HasSubstr("stopped\n"));
  EXPECT_EQ(left_out(), 0U);
}

// 5,000 workers' failures, each with a long reason: of what one user does some lines are written, and the
// rest is counted.
TEST_F(Log, OfOneUserHasABudget) {
  start_logging({"--log-level", "info"});
  const std::string reason(4000, '\x01');
  constexpr std::size_t kFailures = 5000;
  {
    RawPeer peer = RawPeer::greeted(socket());
    const auto* made = peer.ask<wire::Results>([](Builder& b) {
      return wire::CreateMakeResultsDirect(b, "set", "", nullptr, 1, false, false, 0600, true, ~0U);
    });
    ASSERT_NE(made, nullptr);
    const std::uint64_t set = made->sets()->Get(0)->id();
    for (std::size_t i = 0; i < kFailures; ++i) {
      ASSERT_NE(peer.ask<wire::Leased>([&](Builder& b) { return wire::CreateLeaseSlots(b, set); }), nullptr);
      ASSERT_NE(peer.ask<wire::Done>(
                    [&](Builder& b) { return wire::CreateFailSlotDirect(b, set, 0, reason.c_str()); }),
                nullptr);
    }
  }
  stop();
  const std::size_t written = lines_with(" failed in process ");
  EXPECT_GT(written, 10U);
  EXPECT_LT(written, kFailures / 2);
  EXPECT_EQ(written + left_out(), kFailures) << "nothing is left out in silence";
}

// What somebody was denied is told once, in one place, with who asked and why.
TEST_F(Log, TellsOfRefusals) {
  start_logging({"--log-level", "info", "--owner-bytes", "1MiB"});
  const Client client = connect();
  const std::vector<std::string> kept = {"kept"};
  ASSERT_THAT(client.put<std::uint8_t>("kept", std::vector<std::uint8_t>{1}, {1}), Succeeds());
  ASSERT_THAT(client.pin(kept, true), Succeeds());
  EXPECT_THAT(client.evict(kept), FailsWith(Errc::pinned));
  EXPECT_THAT(client.create("large", {Dtype::of<std::uint8_t>(), {2U << 20U}}),
              FailsWith(Errc::quota_exceeded));
  EXPECT_THAT(client.attach("missing"), FailsWith(Errc::not_found));
  ASSERT_THAT(client.pin(kept, false), Succeeds());
  stop();
  const std::string who = fmt::format("process {} of user {}", ::getpid(), ::geteuid());
  EXPECT_EQ(lines_with(fmt::format("array \"kept\" pinned by {}", who)), 1U) << text();
  EXPECT_EQ(lines_with(fmt::format("array \"kept\" unpinned by {}", who)), 1U);
  EXPECT_EQ(lines_with(fmt::format("Evict of {} is refused (pinned): array \"kept\" is pinned", who)), 1U);
  EXPECT_EQ(lines_with(fmt::format("MakeArray of {} is refused (quota_exceeded): this needs", who)), 1U);
  EXPECT_EQ(lines_with("missing"), 0U) << "who only asks is told at level debug";
}

}  // namespace
}  // namespace cowmgr::test
