// The daemon ends, whichever way, and another one of its instance goes on: what was sealed is there, what was
// half made is not, and nobody who reads notices.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/forked.hpp"

namespace cowmgr::test {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

class Restart : public KeepingDaemonTest {
 protected:
  [[nodiscard]] static ArraySpec bytes_spec(std::uint64_t size_bytes) {
    return {Dtype::of<std::uint8_t>(), {size_bytes}};
  }
  static Array put(const Client& client, const std::string& name, std::uint64_t size_bytes,
                   const CreateOptions& options = {}, unsigned seed = 1) {
    auto array = client.put(name, bytes_spec(size_bytes), pattern_bytes(size_bytes, seed), options);
    EXPECT_THAT(array, Succeeds());
    return *std::move(array);
  }
  static void expect_bytes(const Client& client, const std::string& name, std::uint64_t size_bytes,
                           unsigned seed = 1) {
    const auto array = client.attach(name);
    ASSERT_THAT(array, Succeeds());
    EXPECT_TRUE(copy_of(array->bytes()) == pattern_bytes(size_bytes, seed)) << name;
  }
  [[nodiscard]] static std::vector<std::string> names_of(const Client& client) {
    std::vector<std::string> names;
    for (const auto& array : arrays_of(client)) names.push_back(array.name);
    return names;
  }
  [[nodiscard]] std::string file_of(const Client& client, const std::string& name) const {
    return "/dev/shm" + client.stat(name)->array.segment;
  }
  // Writes to a segment behind everybody's back, as the daemon's user may.
  static void overwrite(const std::string& file, std::uint64_t offset, const std::string& bytes) {
    ASSERT_EQ(::chmod(file.c_str(), 01600), 0);
    const UniqueFd fd(::open(file.c_str(), O_WRONLY | O_CLOEXEC));
    ASSERT_TRUE(fd);
    EXPECT_EQ(::pwrite(fd.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)),
              static_cast<ssize_t>(bytes.size()));
    ASSERT_EQ(::chmod(file.c_str(), 01400), 0);
  }
};

TEST_F(Restart, AfterAKillServesEverySealedArray) {
  {
    const Client client = connect();
    put(client, "small", 100, {.mode = 0640}, 1);
    put(client, "large", 5'000'000, {.evictable = true}, 2);
    (void)client.put<double>("numbers", std::vector<double>{1, 2, 3, 4, 5, 6}, {2, 3});
    put(client, "empty", 0);
    EXPECT_THAT(client.pin(std::vector<std::string>{"small"}), Succeeds());
  }
  const auto before = arrays_of(connect());
  kill_and_start();
  const Client client = connect();
  const auto after = arrays_of(client);
  ASSERT_THAT(after, SizeIs(4));
  for (std::size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].id, before[i].id);
    EXPECT_EQ(after[i].name, before[i].name);
    EXPECT_EQ(after[i].version, before[i].version);
    EXPECT_EQ(after[i].spec, before[i].spec);
    EXPECT_EQ(after[i].state, ArrayState::sealed);
    EXPECT_EQ(after[i].protection, before[i].protection);
    EXPECT_EQ(after[i].pinned, before[i].name == "small");
    EXPECT_EQ(after[i].evictable, before[i].name == "large");
    EXPECT_EQ(after[i].owner_uid, before[i].owner_uid);
    EXPECT_EQ(after[i].mode, before[i].mode);
    EXPECT_EQ(after[i].created, before[i].created);
    EXPECT_EQ(after[i].sealed, before[i].sealed);
    EXPECT_EQ(after[i].views, 0U);
  }
  expect_bytes(client, "small", 100, 1);
  expect_bytes(client, "large", 5'000'000, 2);
  EXPECT_THAT(*client.attach("numbers")->as<double>(), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(client.ping()->used_bytes, before[0].segment_bytes + before[1].segment_bytes +
                                           before[2].segment_bytes + before[3].segment_bytes);
}

TEST_F(Restart, OfManyArraysServesThemAll) {
  constexpr int kArrays = 1000;
  {
    const Client client = connect();
    for (int i = 0; i < kArrays; ++i) put(client, fmt::format("array {}", i), static_cast<std::uint64_t>(i));
  }
  kill_and_start();
  const Client client = connect();
  EXPECT_EQ(client.ping()->arrays, static_cast<std::uint32_t>(kArrays));
  for (const int i : {0, 1, 500, 999})
    expect_bytes(client, fmt::format("array {}", i), static_cast<std::uint64_t>(i));
}

TEST_F(Restart, IsNotNoticedByWhoReads) {
  const Client before = connect();
  const Array view = put(before, "read", 3'000'000);
  kill_and_start();
  EXPECT_TRUE(copy_of(view.bytes()) == pattern_bytes(3'000'000)) << "the view is as it was";
  expect_bytes(connect(), "read", 3'000'000);
  EXPECT_TRUE(copy_of(view.bytes()) == pattern_bytes(3'000'000));
}

TEST_F(Restart, GoesOnAsIfNothingHadHappened) {
  put(connect(), "x", 1000, {}, 1);
  kill_and_start();
  const Client client = connect();
  EXPECT_THAT(client.put("x", bytes_spec(1), pattern_bytes(1)), FailsWith(Errc::already_exists));
  EXPECT_EQ(put(client, "x", 2000, {.replace = true}, 2).version(), 2U);
  kill_and_start();
  expect_bytes(connect(), "x", 2000, 2);
  EXPECT_THAT(connect().evict(std::vector<std::string>{"x"}), Succeeds());
  kill_and_start();
  EXPECT_THAT(names_of(connect()), IsEmpty());
  EXPECT_THAT(shm_files(instance()), SizeIs(1)) << "the lock";
}

TEST_F(Restart, RemovesWhatWasHalfMadeAndNobodyComesBackTo) {
  {
    const Client client = connect();
    put(client, "whole", 100);
    const auto writer = client.create("half", bytes_spec(100'000));
    std::fill(writer->bytes().begin(), writer->bytes().end(), std::byte{1});
    const auto dense = client.create_results("dense", bytes_spec(100), 4);
    const auto ragged = client.create_ragged("ragged", 4);
    kill_and_start({"--grace", "0"});
    const Client other = connect();
    EXPECT_THAT(names_of(other), ElementsAre("whole"));
    EXPECT_TRUE(eventually([&] { return other.ping()->memory.outside_bytes > 0; })) << "still mapped";
  }
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 2; })) << "the array and the lock";
}

TEST_F(Restart, RemovesAtOnceWhatWasHalfMadeByWhoIsGone) {
  Child maker([&](const Link& test) {
    const Client client = connect();
    const auto writer = client.create("half", bytes_spec(100'000));
    const auto dense = client.create_results("dense", bytes_spec(100), 4);
    const auto ragged = client.create_ragged("ragged", 4);
    test.say("made");
    ::kill(daemon_->pid(), SIGKILL);
    ::kill(::getpid(), SIGKILL);
  });
  maker.expect("made");
  EXPECT_EQ(maker.wait(), -SIGKILL);
  EXPECT_EQ(daemon_->wait(), -SIGKILL);
  start_keeping({"--grace", "3600"});
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 1; })) << "the lock";
  EXPECT_THAT(names_of(connect()), IsEmpty());
}

// The highest version counts, though the older one was viewed until the daemon died.
TEST_F(Restart, ServesTheNewestVersionAlone) {
  const Client client = connect();
  const Array old = put(client, "x", 100, {}, 1);
  EXPECT_THAT(client.pin(std::vector<std::string>{"x"}), Succeeds());
  put(client, "x", 200, {.replace = true}, 2);
  kill_and_start({"--grace", "0"});
  ASSERT_TRUE(eventually([&] { return arrays_of(connect()).size() == 1; }))
      << "nobody comes back to the old one";
  const auto arrays = arrays_of(connect());
  EXPECT_EQ(arrays[0].version, 2U);
  EXPECT_TRUE(arrays[0].pinned) << "the name is pinned, whatever its version";
  expect_bytes(connect(), "x", 200, 2);
  EXPECT_TRUE(copy_of(old.bytes()) == pattern_bytes(100, 1));
}

TEST_F(Restart, RemembersThatAPinWasUndone) {
  put(connect(), "x", 100);
  EXPECT_THAT(connect().pin(std::vector<std::string>{"x"}), Succeeds());
  EXPECT_THAT(connect().pin(std::vector<std::string>{"x"}, false), Succeeds());
  kill_and_start();
  EXPECT_FALSE(arrays_of(connect()).at(0).pinned);
}

TEST_F(Restart, TakesAdoptedArraysIntoAccount) {
  put(connect(), "x", 900'000);
  kill_and_start({"--capacity", "1MiB"});
  const Client client = connect();
  EXPECT_THAT(client.create("y", bytes_spec(900'000)), FailsWith(Errc::out_of_memory));
  EXPECT_THAT(client.evict(std::vector<std::string>{"x"}), Succeeds());
  EXPECT_THAT(client.create("y", bytes_spec(900'000)), Succeeds());
  kill_and_start({"--capacity", "4KiB"});  // less than there is: it is served all the same
  EXPECT_THAT(names_of(connect()), IsEmpty());
}

// ---- Stopping ----

TEST_F(Restart, AfterAStopServesEverySealedArrayToo) {
  put(connect(), "x", 3'000'000);
  std::optional writer = connect().create("half", bytes_spec(100));
  const auto ragged = connect().create_ragged("ragged", 4, {.is_detached = true});
  EXPECT_EQ(daemon_->stop(SIGTERM), 0);
  start_keeping({"--grace", "0"});
  writer.reset();  // what it had mapped goes with that
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 3; })) << "array, set and lock";
  EXPECT_THAT(names_of(connect()), ElementsAre("x"));
  EXPECT_THAT(connect().open_results("ragged"), Succeeds());
  expect_bytes(connect(), "x", 3'000'000);
}

TEST_F(Restart, IsNothingAfterAStopThatPurges) {
  put(connect(), "x", 100);
  EXPECT_THAT(connect().shutdown(true), Succeeds());
  EXPECT_EQ(daemon_->wait(), 0);
  EXPECT_THAT(shm_files(instance()), IsEmpty());
  start_keeping();
  EXPECT_THAT(names_of(connect()), IsEmpty());
}

TEST_F(Restart, OfADaemonThatPurgesBeginsWithNothing) {
  put(connect(), "x", 100);
  EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
  start();
  EXPECT_THAT(names_of(connect()), IsEmpty());
  EXPECT_THAT(shm_files(instance()), SizeIs(1)) << "the lock";
}

// ---- Files of an older daemon ----

// Segments of layout version 1, as a daemon left them: a pinned array, and a set of three slots. Whatever the
// layout becomes, a daemon serves these.
TEST_F(Restart, ServesSegmentsOfLayout1) {
  kill();
  namespace fs = std::filesystem;
  for (const auto& file : fs::directory_iterator(COWMGR_LAYOUT_1)) {
    const fs::path segment =
        fmt::format("/dev/shm/cowmgr.{}.{}", instance(), file.path().filename().native());
    fs::copy_file(file.path(), segment);
    const bool is_array = fs::file_size(file) == segment_bytes(48);
    ASSERT_EQ(::chmod(segment.c_str(), is_array ? 01500 : 01400), 0);
  }
  start_keeping();
  const Client client = connect();
  const auto array = client.attach("kept/array");
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(array->shape(), (Shape{2, 3}));
  EXPECT_THAT(*array->as<double>(), ElementsAre(1.5, 2.5, 3.5, 4.5, 5.5, 6.5));
  EXPECT_TRUE(client.stat("kept/array")->array.pinned);
  EXPECT_EQ(client.stat("kept/array")->array.mode, 0644U);
  auto set = client.open_results("kept/set");
  ASSERT_THAT(set, Succeeds());
  EXPECT_EQ(text_of(set->job()), "the job");
  EXPECT_EQ(text_of(*set->value(1)), "a value");
  EXPECT_EQ(set->slot(2)->reason, "a reason");
  EXPECT_EQ(set->info()->queue, "kept");
  EXPECT_EQ(set->info()->attempts, 2U);
  EXPECT_EQ((*set->lease())->index(), 0U);
}

// ---- Attacks, and damage ----

TEST_F(Restart, MovesAsideWhatIsDamaged) {
  struct Damage {
    std::string name;
    std::uint64_t offset;
  };
  const std::uint64_t trailer = segment_bytes(1000) - kTrailerBytes;
  const std::vector<Damage> all = {{"magic of the header", 0},
                                   {"shape in the header", 60},
                                   {"trailer's magic", trailer},
                                   {"trailer's id", trailer + 16},
                                   {"trailer's name", trailer + 104}};
  std::vector<std::string> files;
  {
    const Client client = connect();
    put(client, "whole", 1000);
    for (const auto& damage : all) {
      put(client, damage.name, 1000);
      files.push_back(file_of(client, damage.name));
    }
    put(client, "cut short", 1000);
    files.push_back(file_of(client, "cut short"));
  }
  EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
  for (std::size_t i = 0; i < all.size(); ++i) overwrite(files[i], all[i].offset, "damage");
  ASSERT_EQ(::chmod(files.back().c_str(), 01600), 0);
  EXPECT_EQ(::truncate(files.back().c_str(), 100), 0);
  ASSERT_EQ(::chmod(files.back().c_str(), 01400), 0);
  start_keeping();
  EXPECT_THAT(names_of(connect()), ElementsAre("whole"));
  const auto left = shm_files(instance());
  const auto is_aside = [](const std::string& file) {
    return file.find(".quarantine.") != std::string::npos;
  };
  EXPECT_EQ(std::count_if(left.begin(), left.end(), is_aside), static_cast<std::ptrdiff_t>(files.size()));
  for (const auto& file : left) {
    if (!is_aside(file)) continue;
    EXPECT_EQ(::unlink(("/dev/shm/" + file).c_str()), 0);
  }
}

// A writer can put anything into its segment, a whole trailer too; but not what the daemon notes about the
// file.
TEST_F(Restart, DoesNotBelieveATrailerThatAWriterForged) {
  const Client client = connect();
  std::optional writer = client.create("mine", bytes_spec(1000));
  const auto id = std::stoull(arrays_of(client).at(0).segment.substr(instance().size() + 9), nullptr, 16);
  const auto forged = encode_trailer({.name = "somebody else's",
                                      .id = id,
                                      .version = 7,
                                      .data_bytes = 1000,
                                      .sealed_us = 1,
                                      .owner_uid = 4711,
                                      .mode = 0666});
  std::memcpy((*writer)->bytes().data() + kPageBytes, forged.data(), forged.size());
  kill_and_start({"--grace", "0"});
  writer.reset();
  EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == 1; })) << "the lock";
  EXPECT_THAT(names_of(connect()), IsEmpty());
}

TEST_F(Restart, DoesNotServeWhatSomebodyCanWriteByThen) {
  put(connect(), "open", 1000);
  put(connect(), "closed", 1000);
  const std::string file = file_of(connect(), "open");
  EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
  ASSERT_EQ(::chmod(file.c_str(), 01600), 0);
  UniqueFd fd(::open(file.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(fd);
  ASSERT_EQ(::chmod(file.c_str(), 01400), 0);
  start_keeping();
  const Client client = connect();
  EXPECT_THAT(client.attach("open"), FailsWith(Errc::tampered));
  EXPECT_EQ(client.stat("open")->array.state, ArrayState::tampered);
  expect_bytes(client, "closed", 1000);
}

TEST_F(Restart, LeavesTheFilesOfOthersAlone) {
  if (::geteuid() != 0) return;  // nobody else to be
  put(connect(), "x", 100);
  EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
  const std::string name = "/dev/shm" + segment_name(instance(), 42);
  const UniqueFd fd(::open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 01400));
  ASSERT_EQ(::fchown(fd.get(), 65534, 65534), 0);
  start_keeping();
  EXPECT_THAT(names_of(connect()), ElementsAre("x"));
  EXPECT_EQ(::access(name.c_str(), F_OK), 0);
  EXPECT_EQ(::unlink(name.c_str()), 0);
}

// ---- At any instant ----

// One client puts, replaces and evicts; the daemon dies at some instant of that. Every array that was
// acknowledged is there, with its bytes; nothing else is but what the last, unanswered, request may have
// done.
TEST_F(Restart, AtAnyInstantLosesNothingThatWasAcknowledged) {
  constexpr int kKills = 60;
  struct Known {
    std::uint64_t size_bytes = 0;
    unsigned seed = 0;
  };
  std::mt19937 random(4242);
  std::map<std::string, Known> known;
  unsigned seed = 0;
  for (int kills = 0; kills < kKills; ++kills) {
    std::string last;  // what the request without an answer was about
    {
      const Client client = connect();
      Child killer([&, delay_us = random() % 3000](const Link& test) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(delay_us);
        test.say("go");
        while (std::chrono::steady_clock::now() < end) {
        }
        ::kill(daemon_->pid(), SIGKILL);
      });
      killer.expect("go");
      for (;;) {
        last = fmt::format("array {}", random() % 8);
        if (random() % 4 == 0) {
          const auto evicted = client.evict(std::vector<std::string>{last});
          if (!evicted && evicted.error().code == Errc::disconnected) break;
          known.erase(last);
          continue;
        }
        const Known wanted{random() % 3 == 0 ? 2'500'000U : random() % 9000, ++seed};
        const auto array = client.put(last, bytes_spec(wanted.size_bytes),
                                      pattern_bytes(wanted.size_bytes, wanted.seed), {.replace = true});
        if (!array) {
          EXPECT_EQ(array.error().code, Errc::disconnected) << array.error().message;
          break;
        }
        known[last] = wanted;
      }
      EXPECT_EQ(killer.wait(), 0);
    }
    EXPECT_EQ(daemon_->wait(), -SIGKILL);
    start_keeping({"--grace", "0"});
    const Client client = connect();
    for (const auto& [name, array] : known) {
      if (name != last) expect_bytes(client, name, array.size_bytes, array.seed);
    }
    const auto there = names_of(client);
    for (const auto& name : there) {
      EXPECT_TRUE(known.contains(name) || name == last) << name;
    }
    // Whichever it is of the two, it is whole: what it was, or what was asked for.
    known.erase(last);
    if (std::find(there.begin(), there.end(), last) != there.end()) {
      const auto array = client.attach(last);
      ASSERT_THAT(array, Succeeds());
      const auto bytes = copy_of(array->bytes());
      const auto first = bytes.empty() ? 0U : static_cast<unsigned>(bytes[0]);
      EXPECT_TRUE(bytes == pattern_bytes(bytes.size(), first)) << "no half of an array";
      EXPECT_THAT(client.evict(std::vector<std::string>{last}), Succeeds());
    }
    EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == client.list()->size() + 1; }))
        << "and the lock";
  }
}

}  // namespace
}  // namespace cowmgr::test
