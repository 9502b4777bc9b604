// Somebody removes the files of arrays from /dev/shm, as a session manager's clean-up does, or changes their
// bytes while no daemon looks. What can be served is; what cannot be trusted is not.
#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/checksum.hpp"
#include "proto/segment.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/service_manager.hpp"

namespace cowmgr::test {
namespace {

namespace fs = std::filesystem;

using testing::HasSubstr;
using testing::IsEmpty;

constexpr std::uint64_t kBytes = 3'000'000;  // a huge page, and small ones

class OutsideHands : public KeepingDaemonTest {
 protected:
  static Array put(const Client& client, const std::string& name, unsigned seed = 1,
                   const CreateOptions& options = {}) {
    auto array =
        client.put(name, {Dtype::of<std::uint8_t>(), {kBytes}}, pattern_bytes(kBytes, seed), options);
    EXPECT_THAT(array, Succeeds());
    return *std::move(array);
  }
  static void expect_bytes(const Array& array, unsigned seed = 1) {
    EXPECT_TRUE(copy_of(array.bytes()) == pattern_bytes(kBytes, seed)) << array.name();
  }
  static void expect_served(const Client& client, const std::string& name, unsigned seed = 1) {
    const auto array = client.attach(name);
    ASSERT_THAT(array, Succeeds());
    expect_bytes(*array, seed);
  }
  [[nodiscard]] static ArrayInfo info_of(const Client& client, const std::string& name) {
    const auto details = client.stat(name);
    EXPECT_THAT(details, Succeeds());
    return details->array;
  }
  [[nodiscard]] static ArrayState state_of(const Client& client, const std::string& name) {
    return info_of(client, name).state;
  }
  [[nodiscard]] static fs::path file_of(const Client& client, const std::string& name) {
    return "/dev/shm" + info_of(client, name).segment;
  }
  // Until it is served from a file that has its name again.
  static void expect_rewritten(const Client& client, const std::string& name) {
    const fs::path file = file_of(client, name);
    EXPECT_TRUE(eventually([&] { return state_of(client, name) == ArrayState::sealed && fs::exists(file); }))
        << name;
  }
  // Array "a" has lost its file, which is returned, and "in the way" takes the room for another one; the
  // daemon has room_for() these two.
  [[nodiscard]] static fs::path unlink_without_room(const Client& client) {
    put(client, "a", 1);
    put(client, "in the way", 2);
    fs::path file = file_of(client, "a");
    fs::remove(file);
    EXPECT_TRUE(eventually([&] {
      return state_of(client, "a") == ArrayState::unlinked && info_of(client, "in the way").views == 0;
    }));
    return file;
  }
  // As many bytes of capacity as `arrays` of this size take, and not one page more.
  [[nodiscard]] static std::vector<std::string> room_for(std::uint64_t arrays) {
    return {"--capacity", std::to_string(arrays * segment_bytes(kBytes))};
  }
};

TEST_F(OutsideHands, AnArrayWhoseFileWasRemovedGetsANewOne) {
  const Client client = connect();
  const Array view = put(client, "a");
  const ArrayInfo before = info_of(client, "a");
  fs::remove(file_of(client, "a"));
  expect_rewritten(client, "a");
  const ArrayInfo after = info_of(client, "a");
  EXPECT_EQ(after.id, before.id);
  EXPECT_EQ(after.version, before.version);
  EXPECT_EQ(after.sealed, before.sealed);
  expect_bytes(view);
  expect_served(client, "a");
  kill_and_start();
  expect_served(connect(), "a");
}

// Anybody may make files in /dev/shm, of any name.
TEST_F(OutsideHands, NamesThatAreTakenInAdvanceStopNobody) {
  const Client client = connect();
  put(client, "a");
  const std::uint64_t last = info_of(client, "a").id;
  std::vector<fs::path> taken;
  for (std::uint64_t id = last + 1; id <= last + 2000; ++id) {
    taken.push_back("/dev/shm" + segment_name(instance(), id));
    const UniqueFd file(::open(taken.back().c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600));
    ASSERT_TRUE(file);
    ASSERT_TRUE(::geteuid() != 0 || ::fchown(file.get(), 65534, 65534) == 0);
  }
  const auto write = [](const Client& by, const std::string& suffix) {
    EXPECT_THAT(by.put("a", {Dtype::of<std::uint8_t>(), {10}}, pattern_bytes(10), {.replace = true}),
                Succeeds());
    EXPECT_THAT(by.create_results("dense" + suffix, {Dtype::of<std::uint8_t>(), {10}}, 2), Succeeds());
    auto ragged = by.create_ragged("ragged" + suffix, 2);
    ASSERT_THAT(ragged, Succeeds());
    auto slot = ragged->lease();
    ASSERT_THAT(slot, Succeeds());
    EXPECT_THAT((*slot)->allocate({Dtype::of<std::uint8_t>(), {100'000}}), Succeeds());
  };
  write(client, " before");
  EXPECT_GT(info_of(client, "a").id, last + 2000) << "in order of creation";
  const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
  kill();
  start_keeping({}, {.log = log.get()});
  write(connect(), " after");
  std::array<char, 65536> text{};
  const auto bytes = ::pread(log.get(), text.data(), text.size(), 0);
  const auto lines = std::count(text.begin(), text.begin() + bytes, '\n');
  EXPECT_LE(lines, 20) << "one line for all of them";
  for (const auto& file : taken) fs::remove(file);
}

TEST_F(OutsideHands, TheOldMemoryGoesWithItsViews) {
  const Client client = connect();
  {
    const Array view = put(client, "a");
    fs::remove(file_of(client, "a"));
    expect_rewritten(client, "a");
    EXPECT_EQ(client.ping()->used_bytes, 2 * segment_bytes(kBytes)) << "the view keeps what it was made of";
    expect_bytes(view);
  }
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == segment_bytes(kBytes); }));
}

TEST_F(OutsideHands, APinAndAMarkSurviveTheNewFile) {
  {
    const Client client = connect();
    put(client, "pinned", 1, {.mode = 0640});
    EXPECT_THAT(client.pin(std::vector<std::string>{"pinned"}), Succeeds());
    fs::remove(file_of(client, "pinned"));
    expect_rewritten(client, "pinned");
  }
  kill_and_start();
  const Client client = connect();
  EXPECT_TRUE(info_of(client, "pinned").pinned);
  EXPECT_EQ(info_of(client, "pinned").mode, 0640U);
  EXPECT_THAT(client.evict(std::vector<std::string>{"pinned"}), FailsWith(Errc::pinned));
}

TEST_F(OutsideHands, AFileThatIsMovedAwayCountsAsRemoved) {
  const Client client = connect();
  put(client, "a");
  const fs::path aside = fmt::format("/dev/shm/{}-aside", instance());
  fs::rename(file_of(client, "a"), aside);
  expect_rewritten(client, "a");
  expect_served(client, "a");
  fs::remove(aside);
}

TEST_F(OutsideHands, WithoutRoomAnArrayIsShownAsUnlinkedAndServedOn) {
  kill_and_start(room_for(2));
  const Client client = connect();
  const fs::path file = unlink_without_room(client);
  EXPECT_FALSE(fs::exists(file));
  expect_served(client, "a", 1);
  // As soon as there is.
  EXPECT_THAT(client.evict(std::vector<std::string>{"in the way"}), Succeeds());
  expect_rewritten(client, "a");
  expect_served(client, "a", 1);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == segment_bytes(kBytes); }));
}

TEST_F(OutsideHands, AnUnlinkedArrayCanBeReplacedAndEvicted) {
  kill_and_start(room_for(2));
  const Client client = connect();
  put(client, "a", 1);
  put(client, "b", 2);
  for (const auto* name : {"a", "b"}) fs::remove(file_of(client, name));
  EXPECT_TRUE(eventually([&] {
    return state_of(client, "b") == ArrayState::unlinked && info_of(client, "a").views == 0 &&
           info_of(client, "b").views == 0;
  }));
  EXPECT_THAT(client.evict(std::vector<std::string>{"a"}), Succeeds());
  put(client, "b", 3, {.replace = true});
  expect_served(client, "b", 3);
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == segment_bytes(kBytes); }));
}

TEST_F(OutsideHands, AnotherFileUnderTheNameIsLeftAlone) {
  kill_and_start(room_for(2));
  const Client client = connect();
  const fs::path file = unlink_without_room(client);
  std::ofstream(file) << "somebody else's";
  EXPECT_THAT(client.evict(std::vector<std::string>{"in the way"}), Succeeds());
  put(client, "later", 3);  // whoever waits for room gets it after the attempt to write a new file
  EXPECT_EQ(state_of(client, "a"), ArrayState::unlinked);
  expect_served(client, "a", 1);
  EXPECT_EQ(fs::file_size(file), 15U);
}

TEST_F(OutsideHands, NobodyWhoWorksNoticesThatEverythingWasRemoved) {
  const Client client = connect();
  put(client, "sealed", 1);
  const Array viewed = put(client, "viewed", 2);
  EXPECT_THAT(client.evict(std::vector<std::string>{"viewed"}), Succeeds());
  auto writer = *client.create("written", {Dtype::of<std::uint8_t>(), {kBytes}});
  auto set = *client.create_results("set", {Dtype::of<std::uint8_t>(), {2}}, 2);
  auto ragged = *client.create_ragged("ragged", 1);
  for (const auto& file : shm_files(instance())) {
    if (!file.ends_with(".lock")) fs::remove("/dev/shm/" + file);
  }
  expect_rewritten(client, "sealed");
  expect_bytes(viewed, 2);
  std::ranges::copy(pattern_bytes(kBytes, 3), writer.bytes().begin());
  EXPECT_THAT(writer.seal(), Succeeds());
  expect_rewritten(client, "written");
  expect_served(client, "written", 3);
  for (int slot = 0; slot < 2; ++slot) {
    auto leased = *set.lease();
    leased->bytes()[0] = std::byte{7};
    EXPECT_THAT(leased->commit(), Succeeds());
  }
  EXPECT_EQ(set.wait(kDeadline)->bytes()[1], std::byte{7});
  expect_rewritten(client, "set");
  auto leased = *ragged.lease();
  EXPECT_THAT(leased->set_value(pattern_bytes(100)), Succeeds());
  EXPECT_THAT(leased->commit(), Succeeds());
  EXPECT_TRUE(copy_of(*ragged.value(0)) == pattern_bytes(100));
}

TEST_F(OutsideHands, WhoWritesToTheOldFileIsSeenAndDoesNotWaitLong) {
  const Client client = connect();
  if (client.ping()->protection == Protection::advisory) return;
  const Array view = put(client, "a");
  const fs::path aside = fmt::format("/dev/shm/{}-aside", instance());
  fs::rename(file_of(client, "a"), aside);
  expect_rewritten(client, "a");
  EXPECT_EQ(::chmod(aside.c_str(), 0600), 0);
  const auto start = std::chrono::steady_clock::now();
  const UniqueFd opened(::open(aside.c_str(), O_RDWR | O_CLOEXEC));
  EXPECT_TRUE(opened);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(40))
      << "until the kernel breaks it";
  EXPECT_TRUE(eventually([&] { return state_of(client, "a") == ArrayState::tampered; }));
  fs::remove(aside);
}

TEST_F(OutsideHands, ARemovalWhileTheNextDaemonStartsIsNoticed) {
  for (int removal = 0; removal < 20; ++removal) {
    const std::string name = fmt::format("a{}", removal);
    fs::path file;
    {
      const Client client = connect();
      put(client, name);
      file = file_of(client, name);
    }
    kill();
    std::thread remover([&] { fs::remove(file); });
    start_keeping();
    remover.join();
    const Client client = connect();
    // It is gone with its file, or it has one.
    if (client.attach(name)) expect_rewritten(client, name);
  }
}

TEST_F(OutsideHands, TheLogSaysWhatWasRemoved) {
  kill();
  const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
  start_keeping({}, {.log = log.get()});
  const Client client = connect();
  put(client, "a");
  fs::remove(file_of(client, "a"));
  expect_rewritten(client, "a");
  std::string text(static_cast<std::size_t>(::lseek(log.get(), 0, SEEK_END)), 0);
  EXPECT_EQ(::pread(log.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
  EXPECT_THAT(text, HasSubstr("somebody removed /cowmgr."));
  EXPECT_THAT(text, HasSubstr("the file of array \"a\""));
}

// ---- Under a service manager ----

class FdStored : public OutsideHands {
 protected:
  void SetUp() override { start_stored(); }
  void start_stored(std::vector<std::string> arguments = {}) {
    arguments.emplace_back("--fd-store");
    start_keeping(arguments, {.manager = &manager_});
  }
  [[nodiscard]] static std::string stored_name(const ArrayInfo& array) { return array.segment.substr(1); }
  void expect_stored(const std::vector<std::string>& names) {
    EXPECT_TRUE(eventually([&] { return manager_.names() == names; }))
        << testing::PrintToString(manager_.names());
  }

  TemporaryDirectory elsewhere_;
  ServiceManager manager_{elsewhere_.file("notify")};
};

TEST_F(FdStored, EachArrayHasADescriptorThereAsLongAsItIsThere) {
  const Client client = connect();
  put(client, "a", 1);
  const auto a = stored_name(info_of(client, "a"));
  expect_stored({a});
  std::optional<Array> view = put(client, "b", 2);
  const auto b = stored_name(info_of(client, "b"));
  expect_stored({a, b});
  put(client, "a", 3, {.replace = true});
  const auto newer = stored_name(info_of(client, "a"));
  expect_stored({b, newer});
  EXPECT_THAT(client.evict(std::vector<std::string>{"b"}), Succeeds());
  put(client, "c", 4);
  const auto c = stored_name(info_of(client, "c"));
  expect_stored({b, newer, c});  // b is viewed
  view.reset();
  expect_stored({newer, c});
}

TEST_F(FdStored, AnArrayWhoseFileWasRemovedSurvivesTheDaemon) {
  const Client reader = connect("reader", kDeadline);
  const Array view = put(reader, "a", 1);
  put(reader, "b", 2);
  EXPECT_THAT(reader.pin(std::vector<std::string>{"b"}), Succeeds());
  const ArrayInfo before = info_of(reader, "a");
  const std::vector<std::string> names = {stored_name(before), stored_name(info_of(reader, "b"))};
  expect_stored(names);
  kill();
  for (const auto& name : names) fs::remove("/dev/shm/" + name);
  start_stored();
  expect_served(reader, "a", 1);
  expect_served(reader, "b", 2);
  EXPECT_EQ(info_of(reader, "a").id, before.id);
  EXPECT_TRUE(info_of(reader, "b").pinned);
  expect_rewritten(reader, "a");
  expect_rewritten(reader, "b");
  // What is in store is the new memory: the old one would stay there for nothing.
  EXPECT_TRUE(eventually([&] {
    const auto& stored = manager_.stored();
    return stored.size() == 2 && std::ranges::all_of(stored, [](const auto& entry) {
             struct stat info {};
             return ::fstat(entry.second.get(), &info) == 0 && info.st_nlink == 1;
           });
  }));
  expect_bytes(view, 1);
}

TEST_F(FdStored, AnArrayThatIsUnlinkedAtTheKillIsServedUnlinkedUntilThereIsRoom) {
  kill();
  start_stored(room_for(2));
  {
    const Client client = connect();
    (void)unlink_without_room(client);
    EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 2; }));
  }
  kill();
  start_stored(room_for(2));
  const Client client = connect();
  EXPECT_EQ(state_of(client, "a"), ArrayState::unlinked);
  expect_served(client, "a", 1);
  EXPECT_THAT(client.evict(std::vector<std::string>{"in the way"}), Succeeds());
  EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; })) << "the manager lets go of it, too";
  expect_rewritten(client, "a");
}

TEST_F(FdStored, ARestartStoresNothingTwice) {
  {
    const Client client = connect();
    put(client, "a");
    EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
  }
  for (int restarts = 0; restarts < 2; ++restarts) {
    kill();
    start_stored();
    const Client client = connect();
    put(client, fmt::format("new {}", restarts));
    EXPECT_TRUE(
        eventually([&] { return manager_.names().size() == static_cast<std::size_t>(restarts) + 2; }));
    expect_served(client, "a");
  }
}

TEST_F(FdStored, WhatIsEvictedWhileTheFileWasElsewhereDoesNotComeBack) {
  {
    const Client client = connect();
    put(client, "a");
    EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
    EXPECT_THAT(client.evict(std::vector<std::string>{"a"}), Succeeds());
    EXPECT_TRUE(eventually([&] { return manager_.stored().empty(); }));
  }
  kill();
  start_stored();
  EXPECT_THAT(arrays_of(connect()), IsEmpty());
}

// The daemon is killed before it could tell the service manager.
TEST_F(FdStored, WhatWasEvictedDoesNotComeBackFromTheStore) {
  UniqueFd old;
  std::string name;
  {
    const Client client = connect();
    put(client, "a", 1);
    EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
    name = manager_.names().front();
    old = UniqueFd(::dup(manager_.stored().front().second.get()));
    EXPECT_THAT(client.evict(std::vector<std::string>{"a"}), Succeeds());
    put(client, "a", 2);
    EXPECT_TRUE(eventually([&] { return manager_.names() != std::vector<std::string>{name}; }));
  }
  kill();
  manager_.store(name, old);
  start_stored({"--grace", "0"});
  const Client client = connect();
  expect_served(client, "a", 2);
  EXPECT_TRUE(eventually([&] { return arrays_of(client).size() == 1; }));
  expect_served(client, "a", 2);
  EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
}

TEST_F(FdStored, APurgeAtTheStartEmptiesTheStore) {
  put(connect(), "a");
  EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
  kill();
  start_stored({"--purge"});
  EXPECT_THAT(manager_.names(), IsEmpty());
  EXPECT_THAT(arrays_of(connect()), IsEmpty());
}

TEST_F(FdStored, APurgeEmptiesTheStore) {
  put(connect(), "a");
  EXPECT_TRUE(eventually([&] { return manager_.stored().size() == 1; }));
  EXPECT_THAT(connect().shutdown(true), Succeeds());
  EXPECT_EQ(daemon_->wait(), 0);
  daemon_.reset();
  EXPECT_THAT(manager_.names(), IsEmpty());
  EXPECT_THAT(shm_files(instance()), IsEmpty());
}

TEST_F(FdStored, WhatIsNoArrayOfThisInstanceIsTakenOut) {
  kill();
  // A file that says nothing of itself, under a name of ours: as if its memory had been put there by
  // somebody.
  const std::string name = fmt::format("cowmgr.{}.{:016x}", instance(), 0xabcdef);
  {
    const ServiceManager::Stored& stored = manager_.stored();
    EXPECT_THAT(stored, IsEmpty());
  }
  manager_.store(name, UniqueFd(::memfd_create("other", MFD_CLOEXEC)));
  start_stored();
  EXPECT_THAT(arrays_of(connect()), IsEmpty());
  expect_stored({});
}

// ---- Contents ----

class Checksums : public OutsideHands {
 protected:
  // Changes a byte of the data of a sealed array, as a bad memory module might.
  static void flip_a_byte(const fs::path& file) {
    ASSERT_EQ(::chmod(file.c_str(), 01600), 0);
    const UniqueFd fd(::open(file.c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_TRUE(fd);
    char byte = 0;
    const off_t offset = kDataOffset + kBytes / 2;
    EXPECT_EQ(::pread(fd.get(), &byte, 1, offset), 1);
    byte = static_cast<char>(byte ^ 1);
    EXPECT_EQ(::pwrite(fd.get(), &byte, 1, offset), 1);
    ASSERT_EQ(::chmod(file.c_str(), 01400), 0);
  }
};

TEST_F(Checksums, AreTakenWhereOneWasAskedFor) {
  const Client client = connect();
  const Array with = put(client, "with", 1, {.checksum = true});
  const Array without = put(client, "without", 2);
  EXPECT_EQ(info_of(client, "with").checksum, checksum_of(pattern_bytes(kBytes, 1)));
  EXPECT_EQ(info_of(client, "without").checksum, 0U);
  std::uint64_t shown = 0;
  EXPECT_THAT(with.verify([&](std::uint64_t done) { shown = done; }), Succeeds());
  EXPECT_EQ(shown, kBytes);
  EXPECT_THAT(client.attach("with")->verify(), Succeeds());
  EXPECT_THAT(without.verify(), FailsWith(Errc::unsupported));
}

TEST_F(Checksums, OfAnEmptyArrayMatch) {
  const auto empty = connect().put<double>("empty", std::span<const double>(), {0}, {.checksum = true});
  ASSERT_THAT(empty, Succeeds());
  EXPECT_THAT(empty->verify(), Succeeds());
}

TEST_F(Checksums, FindAByteThatChangedWhileNoDaemonRan) {
  std::vector<fs::path> files;
  {
    const Client client = connect();
    for (const auto* name : {"bad", "good"}) {
      put(client, name, 1, {.checksum = true});
      files.push_back(file_of(client, name));
    }
    put(client, "unknown", 1);
    files.push_back(file_of(client, "unknown"));
  }
  kill();
  flip_a_byte(files[0]);
  flip_a_byte(files[2]);
  start_keeping();
  const Client client = connect();
  EXPECT_TRUE(eventually([&] { return state_of(client, "bad") == ArrayState::tampered; }));
  const auto refused = client.attach("bad");
  EXPECT_THAT(refused, FailsWith(Errc::tampered));
  EXPECT_THAT(refused.error().message, HasSubstr("does not match its checksum"));
  EXPECT_THAT(client.attach("good")->verify(), Succeeds());
  EXPECT_EQ(state_of(client, "unknown"), ArrayState::sealed) << "nobody asked for a checksum of this one";
  ASSERT_THAT(
      client.put("bad", {Dtype::of<std::uint8_t>(), {kBytes}}, pattern_bytes(kBytes, 5), {.replace = true}),
      Succeeds());
  expect_served(client, "bad", 5);
}

TEST_F(Checksums, FindAByteThatChangedUnderAView) {
  const Client client = connect();
  const Array view = put(client, "a", 1, {.checksum = true});
  const fs::path file = file_of(client, "a");
  kill();  // nobody holds the lease
  flip_a_byte(file);
  EXPECT_THAT(view.verify(), FailsWith(Errc::corrupted));
  start_keeping();
  EXPECT_TRUE(eventually([&] { return state_of(connect(), "a") == ArrayState::tampered; }));
}

TEST_F(Checksums, StayWithAFileThatIsWrittenAnew) {
  const Client client = connect();
  put(client, "a", 1, {.checksum = true});
  fs::remove(file_of(client, "a"));
  expect_rewritten(client, "a");
  kill_and_start();
  EXPECT_THAT(connect().attach("a")->verify(), Succeeds());
}

}  // namespace
}  // namespace cowmgr::test
