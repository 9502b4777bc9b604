#include "daemon/config.hpp"

#include <cstdlib>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/version.hpp"

namespace cowmgr {
namespace {

using testing::HasSubstr;
using testing::Optional;

class ConfigTest : public testing::Test {
 protected:
  ConfigTest() {
    for (const auto* name :
         {"COWMGR_SOCKET", "COWMGR_INSTANCE", "COWMGR_CAPACITY", "COWMGR_LOG_LEVEL", "XDG_RUNTIME_DIR"}) {
      if (const char* value = std::getenv(name))
        before_[name] = value;
      else
        before_[name] = std::nullopt;
      ::unsetenv(name);
    }
  }
  ~ConfigTest() override {
    for (const auto& [name, value] : before_) {
      if (value)
        ::setenv(name.c_str(), value->c_str(), 1);
      else
        ::unsetenv(name.c_str());
    }
    ::unlink(file_.c_str());
  }

  static void set(const char* name, const char* value) { ::setenv(name, value, 1); }

  // The arguments that read `text` as the configuration file.
  [[nodiscard]] std::vector<std::string> file(const std::string& text) const {
    std::ofstream(file_) << text;
    return {"--config", file_};
  }

  // Parses; what was printed stands in `out_` and `err_` after it.
  std::optional<int> parse(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "cowmgr");
    std::vector<char*> argv;
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    const auto rc = parse_config(static_cast<int>(arguments.size()), argv.data(), config_);
    out_ = testing::internal::GetCapturedStdout();
    err_ = testing::internal::GetCapturedStderr();
    return rc;
  }
  // Parses what must be fine.
  const Config& parsed(const std::vector<std::string>& arguments) {
    EXPECT_EQ(parse(arguments), std::nullopt) << err_;
    return config_;
  }

  Config config_;
  std::string out_;
  std::string err_;

 private:
  std::map<std::string, std::optional<std::string>> before_;
  std::string file_ = fmt::format("{}/cowmgr-{}.conf", testing::TempDir(), ::getpid());
};

TEST_F(ConfigTest, Defaults) {
  const Config& config = parsed({});
  EXPECT_EQ(config.socket, "/run/cowmgr/cowmgr.sock");
  EXPECT_EQ(config.instance, "default");
  EXPECT_EQ(config.capacity_bytes, 0U);
  EXPECT_EQ(config.log_level, "info");
  EXPECT_FALSE(config.needs_verified);
  EXPECT_EQ(config.socket_mode, 0666);
  EXPECT_EQ(config.quota.owner_bytes, UINT64_MAX);
  EXPECT_EQ(config.quota.owner_arrays, 0U) << "as many as open files allow";
  EXPECT_EQ(config.quota.owner_sessions, 0U);
  EXPECT_EQ(config.parent_fd, -1);
}

TEST_F(ConfigTest, EveryFlag) {
  const Config& config =
      parsed({"--socket=/tmp/s", "--instance=a-b_C9", "--capacity=1.5GiB", "--log-level=debug",
              "--protection=verified", "--socket-mode=0660", "--owner-bytes=200MB", "--owner-arrays=7",
              "--owner-sessions=8", "--parent-fd=3"});
  EXPECT_EQ(config.socket, "/tmp/s");
  EXPECT_EQ(config.instance, "a-b_C9");
  EXPECT_EQ(config.capacity_bytes, 3ULL << 29U);
  EXPECT_EQ(config.log_level, "debug");
  EXPECT_TRUE(config.needs_verified);
  EXPECT_EQ(config.socket_mode, 0660);
  EXPECT_EQ(config.quota.owner_bytes, 200'000'000U);
  EXPECT_EQ(config.quota.owner_arrays, 7U);
  EXPECT_EQ(config.quota.owner_sessions, 8U);
  EXPECT_EQ(config.parent_fd, 3);
}

TEST_F(ConfigTest, TheFlagGoesBeforeTheEnvironmentAndThatBeforeTheFile) {
  auto arguments = file("instance=\"file\"\ncapacity=\"1MiB\"\nsocket=\"/file\"\n");
  EXPECT_EQ(parsed(arguments).instance, "file");
  EXPECT_EQ(config_.capacity_bytes, 1U << 20U);
  EXPECT_EQ(config_.socket, "/file");
  set("COWMGR_INSTANCE", "environment");
  set("COWMGR_CAPACITY", "2MiB");
  set("COWMGR_SOCKET", "/environment");
  EXPECT_EQ(parsed(arguments).instance, "environment");
  EXPECT_EQ(config_.capacity_bytes, 2U << 20U);
  EXPECT_EQ(config_.socket, "/environment");
  arguments.insert(arguments.end(), {"--instance", "flag", "--capacity", "3MiB", "--socket", "/flag"});
  EXPECT_EQ(parsed(arguments).instance, "flag");
  EXPECT_EQ(config_.capacity_bytes, 3U << 20U);
  EXPECT_EQ(config_.socket, "/flag");
}

TEST_F(ConfigTest, TheFileTakesWhatTheFlagsTake) {
  parsed(
      file("socket-mode=\"0640\"\nowner-bytes=\"2G\"\nowner-arrays=5\nprotection=\"verified\"\nlog-level="
           "\"off\"\n"));
  EXPECT_EQ(config_.socket_mode, 0640);
  EXPECT_EQ(config_.quota.owner_bytes, 2ULL << 30U);
  EXPECT_EQ(config_.quota.owner_arrays, 5U);
  EXPECT_TRUE(config_.needs_verified);
  EXPECT_EQ(config_.log_level, "off");
}

TEST_F(ConfigTest, TheUsersOwnSocketLiesInTheRuntimeDirectory) {
  set("XDG_RUNTIME_DIR", "/run/user/1000");
  EXPECT_EQ(parsed({}).socket,
            ::geteuid() == 0 ? "/run/cowmgr/cowmgr.sock" : "/run/user/1000/cowmgr/cowmgr.sock");
}

TEST_F(ConfigTest, HelpAndVersionEndWell) {
  EXPECT_THAT(parse({"--help"}), Optional(0));
  EXPECT_THAT(out_, HasSubstr("--capacity"));
  EXPECT_THAT(out_, testing::Not(HasSubstr("--parent-fd")));
  EXPECT_THAT(parse({"--version"}), Optional(0));
  EXPECT_EQ(out_, fmt::format("cowmgr {}\n", kVersion));
  EXPECT_EQ(err_, "");
}

class BadConfig : public ConfigTest, public testing::WithParamInterface<const char*> {};

TEST_P(BadConfig, IsRefusedWithTwoAndAReason) {
  EXPECT_THAT(parse({GetParam()}), Optional(2));
  EXPECT_NE(err_, "");
  EXPECT_EQ(out_, "");
}

INSTANTIATE_TEST_SUITE_P(
    Flags, BadConfig,
    testing::Values("--nonsense", "positional", "--capacity", "--capacity=", "--capacity=lots",
                    "--capacity=-1", "--capacity=1e3QB", "--instance=", "--instance=a/b", "--instance=a.b",
                    "--log-level=loud", "--protection=none", "--socket-mode=0999", "--socket-mode=77777",
                    "--socket-mode=", "--owner-arrays=-1", "--owner-arrays=many", "--owner-arrays=4294967296",
                    "--owner-sessions=1.5", "--owner-bytes=x", "--config=/does/not/exist"));

TEST_F(ConfigTest, BadValuesOfTheEnvironmentAreRefusedToo) {
  set("COWMGR_CAPACITY", "lots");
  EXPECT_THAT(parse({}), Optional(2));
  ::unsetenv("COWMGR_CAPACITY");
  set("COWMGR_INSTANCE", "../etc");
  EXPECT_THAT(parse({}), Optional(2));
}

TEST_F(ConfigTest, BadValuesOfTheFileAreRefusedToo) {
  EXPECT_THAT(parse(file("capacity=\"lots\"\n")), Optional(2));
  EXPECT_THAT(parse(file("socket-mode=\"rw\"\n")), Optional(2));
}

// Wherever it is, whatever is wrong with it.
TEST_F(ConfigTest, ABadLineOfTheFileIsToldWithFileAndLine) {
  struct Case {
    const char* text;
    int line;
    const char* part;
  };
  for (const auto& [text, line, part] :
       {Case{"instance=\"a\"\n\n# a comment\ncapacity=\"lots\"\n", 4, "--capacity"},
        Case{"no-such-option=1\n", 1, "no-such-option"},
        Case{"socket=\"/s\"\ncapacity 4GiB\n", 2, "capacity"},
        Case{"purge=true\n[section]\nsocket=\"/s\"\n", 2, "section"},
        Case{"grace=1\ngrace=4000\nsocket-mode=9", 2, "--grace"}}) {
    const auto arguments = file(text);
    EXPECT_THAT(parse(arguments), Optional(2)) << text;
    EXPECT_THAT(err_, testing::StartsWith(fmt::format("{}:{}: ", arguments.back(), line))) << text;
    EXPECT_THAT(err_, HasSubstr(part));
    EXPECT_EQ(out_, "");
  }
}

TEST_F(ConfigTest, AGoodFileIsNotBlamed) {
  auto arguments = file("capacity=\"1GiB\"\npurge=true\n");
  arguments.emplace_back("--grace=-1");
  EXPECT_THAT(parse(arguments), Optional(2));
  EXPECT_THAT(err_, testing::Not(HasSubstr(arguments[1])));
  arguments.back() = "--help";
  EXPECT_THAT(parse(arguments), Optional(0));
  EXPECT_EQ(err_, "");
}

}  // namespace
}  // namespace cowmgr
