// Every system call on shared memory fails once, whichever it is: the request that it was for gets a typed
// error, nothing leaks, and the next request works. So does the start of the next daemon, or it refuses in
// words, and no sealed array is lost.
#include "tests/support/broken_calls.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "proto/segment_file.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

namespace fs = std::filesystem;

using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsSupersetOf;

constexpr std::uint64_t kSmallBytes = 1000;
constexpr std::uint64_t kLargeBytes = 2'200'000;  // a huge page, and small ones
constexpr Milliseconds kGiveUp{500};              // to seal what cannot be sealed as long as a call fails
constexpr std::uint64_t kValueBytes = 10'000;     // a new set has room for one of these, and then grows

ArraySpec bytes_spec(std::uint64_t size_bytes) {
  return {Dtype::of<std::uint8_t>(), {size_bytes}};
}

// The same bytes again and again: made once.
const std::vector<std::byte>& pattern(std::uint64_t size_bytes, unsigned seed) {
  static std::map<std::pair<std::uint64_t, unsigned>, std::vector<std::byte>> made;
  auto& bytes = made[{size_bytes, seed}];
  if (bytes.size() != size_bytes) bytes = pattern_bytes(size_bytes, seed);
  return bytes;
}

bool holds(std::span<const std::byte> bytes, std::uint64_t size_bytes, unsigned seed) {
  return bytes.size() == size_bytes &&
         std::memcmp(bytes.data(), pattern(size_bytes, seed).data(), size_bytes) == 0;
}

void fill(std::span<std::byte> bytes, unsigned seed) {
  const auto& wanted = pattern(bytes.size(), seed);
  std::copy(wanted.begin(), wanted.end(), bytes.begin());
}

std::string name_of_error(int number) {
  return ::strerrorname_np(number);
}

// What a process has of the segments in shared memory: descriptors, and mappings of `instance`'s.
std::vector<std::string> segments_of(pid_t pid, const std::string& instance) {
  const std::string segment = fmt::format("/dev/shm/cowmgr.{}.", instance);
  std::vector<std::string> found;
  const auto add = [&](const std::string& what) {
    if (what.find(segment) != std::string::npos && !what.ends_with(".lock")) found.push_back(what);
  };
  std::error_code ignored;  // a descriptor may be closed by the time that one looks
  for (const auto& fd : fs::directory_iterator(fmt::format("/proc/{}/fd", pid)))
    add(fs::read_symlink(fd.path(), ignored));
  std::ifstream maps(fmt::format("/proc/{}/maps", pid));
  for (std::string line; std::getline(maps, line);) add(line);
  return found;
}

class BrokenCalls : public KeepingDaemonTest {
 protected:
  // How calls fail: with `error`, once, or all of one kind until the test knows of it.
  explicit BrokenCalls(int error, bool lasts = false) : error_(error), lasts_(lasts) {}

  // A scenario that cannot go on.
  struct Stuck : std::runtime_error {
    using std::runtime_error::runtime_error;
  };

  void SetUp() override {}
  [[nodiscard]] Launch broken() const {
    return {.program = "cowmgr-broken",
            .environment = {break_.variable()},
            .log = log_.get(),
            .may_refuse = true};
  }
  [[nodiscard]] std::string lock() const { return fmt::format("cowmgr.{}.lock", instance()); }

  // A step of the scenario. If the broken call was in it, it may be refused, in a way that the client
  // understands; then it is done once more. Returns what it gave.
  template <class Do>
  auto step(const std::string& what, const Do& act) {
    const bool may_fail = !break_.has_failed() || lasts_;
    auto done = act();
    if (!done) {
      const Error error = done.error();
      EXPECT_TRUE(break_.has_failed() && may_fail) << what << ": " << testing::PrintToString(error);
      EXPECT_THAT(error.code, testing::AnyOf(Errc::os_failure, Errc::out_of_memory, Errc::quota_exceeded,
                                             lasts_ ? Errc::still_writable : Errc::slot_failed))
          << what << ": " << error.message;
      EXPECT_TRUE(is_clean_message(error.message)) << what << ": " << error.message;
      break_.mend();
      done = act();
      if (!done) throw Stuck(fmt::format("{}, tried again: {}", what, done.error().message));
    }
    if constexpr (!std::is_void_v<typename decltype(done)::value_type>) return *std::move(done);
  }

  // ---- The requests ----

  Array put(const Client& client, const std::string& name, std::uint64_t size_bytes, unsigned seed,
            bool replace = false) {
    return step("put " + name, [&] {
      return client.put(name, bytes_spec(size_bytes), pattern(size_bytes, seed), {.replace = replace});
    });
  }
  void expect_bytes(const Client& client, const std::string& name, std::uint64_t size_bytes, unsigned seed) {
    const Array array = step("attach " + name, [&] { return client.attach(name); });
    EXPECT_TRUE(holds(array.bytes(), size_bytes, seed)) << name;
  }
  void evict(const Client& client, const std::string& name) {
    const auto evicted = step("evict " + name, [&] { return client.evict(std::vector<std::string>{name}); });
    EXPECT_EQ(evicted.names, std::vector<std::string>{name});
  }
  ArrayDetails stat(const Client& client, const std::string& name) {
    auto details = step("stat " + name, [&] { return client.stat(name); });
    EXPECT_GE(details.resident_bytes, details.array.data_bytes) << "all of it is backed";
    return details;
  }
  void pin(const Client& client, const std::string& name, bool pinned) {
    step("pin " + name, [&] { return client.pin(std::vector<std::string>{name}, pinned); });
    EXPECT_EQ(stat(client, name).array.pinned, pinned);
  }

  void use_arrays(const Client& client) {
    const Array small = put(client, "small", kSmallBytes, 1);
    const Array large = put(client, "large", kLargeBytes, 2);
    expect_bytes(client, "small", kSmallBytes, 1);
    expect_bytes(client, "large", kLargeBytes, 2);
    pin(client, "small", true);
    pin(client, "small", false);
    stat(client, "large");

    const Array newer = put(client, "small", kSmallBytes + 1, 3, true);
    EXPECT_EQ(newer.version(), 2U);
    expect_bytes(client, "small", kSmallBytes + 1, 3);
    EXPECT_TRUE(holds(small.bytes(), kSmallBytes, 1)) << "its view is as it was";
    EXPECT_LE(shm_files(instance()).size(), 4U) << "what is named or viewed, and the lock";

    evict(client, "large");
    EXPECT_THAT(client.attach("large"), FailsWith(Errc::not_found))
        << "its name is gone, though it is viewed";
    EXPECT_TRUE(holds(large.bytes(), kLargeBytes, 2));
    evict(client, "small");

    // Never sealed: it goes with its writer.
    (void)step("create", [&] { return client.create("given up", bytes_spec(kSmallBytes)); });
  }

  void use_dense_set(const Client& client) {
    const auto work = [](ResultSet& set) -> Result<void> {
      for (unsigned slot = 0; slot < set.slots(); ++slot) {
        auto leased = set.lease_slot(slot);
        if (!leased) return error_of(leased);
        fill(leased->bytes(), slot);
        if (auto ok = leased->commit(); !ok) return ok;
      }
      return {};
    };
    // What cannot be sealed is tried again until it can be; here it is given up, and made anew.
    const Array output = step("a dense set", [&]() -> Result<Array> {
      auto set = client.create_results("dense", bytes_spec(2 * kSmallBytes), 2);
      if (!set) return error_of(set);
      const auto worked = work(*set);
      auto array = worked ? set->wait(lasts_ ? kGiveUp : kForever) : Result<Array>(error_of(worked));
      while (lasts_ && !array && array.error().code == Errc::timed_out)
        array = set->wait(kGiveUp);  // not told yet
      if (!array) {
        EXPECT_THAT(set->forget(), Succeeds());
      }
      return array;
    });
    for (unsigned slot = 0; slot < 2; ++slot)
      EXPECT_TRUE(holds(output.bytes().subspan(slot * kSmallBytes, kSmallBytes), kSmallBytes, slot));
    evict(client, "dense");
  }

  static void expect_value(const ResultSet& set, std::uint64_t slot) {
    const auto value = set.value(slot);
    ASSERT_THAT(value, Succeeds());
    EXPECT_TRUE(holds(*value, kValueBytes, static_cast<unsigned>(slot))) << slot;
  }
  void commit_value(ResultSet& set, std::uint64_t slot) {
    step(fmt::format("commit the value of slot {}", slot), [&]() -> Result<void> {
      auto leased = set.lease_slot(slot);
      if (!leased) return error_of(leased);
      if (auto ok = leased->set_value(pattern(kValueBytes, static_cast<unsigned>(slot))); !ok) return ok;
      return leased->commit();
    });
  }
  void commit_array(ResultSet& set, std::uint64_t slot, std::uint64_t size_bytes) {
    step(fmt::format("commit the array of slot {}", slot), [&]() -> Result<void> {
      auto leased = set.lease_slot(slot);
      if (!leased) return error_of(leased);
      if (auto ok = leased->allocate(bytes_spec(size_bytes)); !ok) return ok;
      fill(leased->bytes(), static_cast<unsigned>(slot));
      return leased->commit();
    });
  }

  void use_ragged_set(const Client& client) {
    constexpr std::uint64_t kArraySlot = 3;
    auto set = step("make a ragged set", [&] { return client.create_ragged("ragged", kArraySlot + 2); });
    for (std::uint64_t slot = 0; slot < kArraySlot; ++slot) commit_value(set, slot);
    commit_array(set, kArraySlot, kSmallBytes);
    step("fail a slot", [&]() -> Result<void> {
      auto leased = set.lease_slot(kArraySlot + 1);
      if (!leased) return error_of(leased);
      return leased->fail("no luck");
    });
    EXPECT_THAT(set.wait_settled(), FailsWith(Errc::slot_failed));
    for (std::uint64_t slot = 0; slot < kArraySlot; ++slot) expect_value(set, slot);
    EXPECT_EQ(set.slot(kArraySlot + 1)->reason, "no luck");
    {
      const Array array = step("attach a slot's array", [&] { return set.array(kArraySlot); });
      EXPECT_TRUE(holds(array.bytes(), kSmallBytes, kArraySlot));
    }
    step("forget a set", [&] { return set.forget(); });
  }

  // Some slots of a batch are committed before the set has to grow.
  void use_batches(const Client& client) {
    auto set = step("make a set for batches", [&] { return client.create_ragged("batches", 4); });
    const auto task = [](Slot& slot) {
      return slot.set_value(pattern(kValueBytes, static_cast<unsigned>(slot.index())));
    };
    step("work", [&] { return set.work(task, {.batch = 4}); });
    EXPECT_THAT(set.wait_settled(), Succeeds());
    for (std::uint64_t slot = 0; slot < set.slots(); ++slot) expect_value(set, slot);
    step("forget a set", [&] { return set.forget(); });
  }

  void use_cancelled_set(const Client& client) {
    auto set = step("make a set to cancel", [&] { return client.create_ragged("cancelled", 3); });
    commit_array(set, 0, kSmallBytes);
    auto leased = step("lease", [&] { return set.lease_slot(1); });
    step("allocate", [&] { return leased.allocate(bytes_spec(kSmallBytes)); });
    step("cancel", [&] { return set.cancel(); });
    EXPECT_THAT(leased.commit(), FailsWith(Errc::cancelled));
    step("forget a set", [&] { return set.forget(); });
  }

  void expect_nothing_left(const Client& client) {
    EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
    EXPECT_TRUE(eventually([&] { return segments_of(daemon_->pid(), instance()).empty(); }));
    EXPECT_THAT(segments_of(daemon_->pid(), instance()), IsEmpty());
    EXPECT_THAT(segments_of(::getpid(), instance()), IsEmpty());
    EXPECT_THAT(shm_files(instance()), testing::ElementsAre(lock()));
    EXPECT_EQ(client.ping()->result_sets, 0U);
  }

  // All requests, with one call broken. Whether it came to that call.
  bool make_requests(const Client& client, std::uint64_t call) {
    break_.expect(call, error_, lasts_);
    try {
      use_arrays(client);
      use_dense_set(client);
      use_ragged_set(client);
      use_batches(client);
      use_cancelled_set(client);
      expect_nothing_left(client);
    } catch (const Stuck& stuck) {
      ADD_FAILURE() << stuck.what();
    }
    break_.mend();
    return break_.has_failed();
  }

  // Breaks one call after the other, or every `stride`th, until there are no more or a test of one failed.
  // Returns their kinds.
  template <class Run>
  std::set<std::string> sweep(const Run& run, std::uint64_t first = 1, std::uint64_t stride = 1) {
    std::set<std::string> names;
    std::uint64_t call = first;
    std::uint64_t count = 0;
    for (; run(call) && !HasFailure(); call += stride, ++count) {
      names.insert(break_.name());
      (void)take_log();
    }
    if (HasFailure())
      ADD_FAILURE() << fmt::format("when call {}, {}, failed with {}; the daemon said:\n{}", call,
                                   break_.name(), name_of_error(error_), take_log());
    std::cout << fmt::format("{} calls were broken, one after the other\n", count);
    return names;
  }

  // What broken daemons logged since the last time.
  [[nodiscard]] std::string take_log() const {
    std::string text(static_cast<std::size_t>(::lseek(log_.get(), 0, SEEK_END)), 0);
    EXPECT_EQ(::pread(log_.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
    EXPECT_EQ(::ftruncate(log_.get(), 0), 0);
    ::lseek(log_.get(), 0, SEEK_SET);
    return text;
  }

  BrokenCall break_{instance()};
  UniqueFd log_{::memfd_create("log", MFD_CLOEXEC)};
  const int error_;
  const bool lasts_;
};

class BrokenRequests : public BrokenCalls, public testing::WithParamInterface<int> {
 protected:
  BrokenRequests() : BrokenCalls(GetParam()) {}
};

TEST_P(BrokenRequests, GetATypedErrorAndLeaveNothing) {
  start_keeping({}, broken());
  const Client client = connect();
  const auto names = sweep([&](std::uint64_t call) { return make_requests(client, call); });
  EXPECT_THAT(names, IsSupersetOf({"shm_open", "shm_unlink", "ftruncate", "fallocate", "pwrite", "pread",
                                   "mmap", "madvise(MADV_COLLAPSE)", "madvise(MADV_DONTFORK)",
                                   "madvise(MADV_POPULATE_READ)", "fstat", "fchmod", "dup",
                                   "fcntl(F_DUPFD_CLOEXEC)", "fcntl(F_SETSIG)", "fcntl(F_SETLEASE)"}));
}

INSTANTIATE_TEST_SUITE_P(With, BrokenRequests, testing::Values(ENOSPC, EMFILE, ENOMEM, EINTR, EAGAIN),
                         [](const auto& error) { return name_of_error(error.param); });

class LastingFailures : public BrokenCalls {
 protected:
  LastingFailures() : BrokenCalls(ENOMEM, true) {}
};

// The same call fails again when the daemon cleans up after the first time, or tries another way.
TEST_F(LastingFailures, GetATypedErrorAndLeaveNothing) {
  start_keeping({}, broken());
  const Client client = connect();
  sweep([&](std::uint64_t call) { return make_requests(client, call); });
}

// ---- The start of the next daemon ----

constexpr std::array<int, 3> kStartErrors = {ENOMEM, EINTR, EAGAIN};
// With a sanitizer a start takes half a second: then each call fails with one of these, not with each.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = kStartErrors.size();
#else
constexpr std::uint64_t kStride = 1;
#endif

class BrokenStarts : public BrokenCalls, public testing::WithParamInterface<int> {
 protected:
  BrokenStarts() : BrokenCalls(GetParam()) {}

  struct Known {
    std::string name;
    std::uint64_t size_bytes = 0;
    unsigned seed = 0;
  };
  const std::vector<Known> known_ = {
      {"pinned", kSmallBytes, 1}, {"large", kLargeBytes, 2}, {"replaced", kSmallBytes, 4}};

  void SetUp() override {
    start_keeping();
    const Client client = connect();
    put(client, "replaced", kSmallBytes, 3);
    older_ = shm_path(client.stat("replaced")->array.segment);
    fs::create_hard_link(older_, spare_);
    for (const auto& array : known_) put(client, array.name, array.size_bytes, array.seed, true);
    pin(client, "pinned", true);
    usual_ = *client.ping();
  }
  void TearDown() override {
    fs::remove(spare_);
    BrokenCalls::TearDown();
  }

  [[nodiscard]] static std::string shm_path(const std::string& segment) { return "/dev/shm" + segment; }

  // Of all arrays the right bytes; but for one that the kernel gave no lease of. That is what it does when
  // somebody can write to it, or, of the first one of all, when it gives none.
  void expect_served(const Client& client, bool is_lease_refused = false) const {
    EXPECT_EQ(client.ping()->capacity_bytes, usual_.capacity_bytes);
    EXPECT_TRUE(is_lease_refused || client.ping()->protection == usual_.protection);
    for (const auto& array : known_) {
      const auto view = client.attach(array.name);
      if (!view && view.error().code == Errc::tampered && is_lease_refused) continue;
      ASSERT_THAT(view, Succeeds()) << array.name;
      EXPECT_TRUE(holds(view->bytes(), array.size_bytes, array.seed)) << array.name;
    }
  }

  // A daemon is killed that has all there is to be found: sealed arrays, an older version of one that was not
  // removed any more, what is half made, and what is damaged.
  void kill_busy() {
    const Client client = connect();
    const auto writer = client.create("half", bytes_spec(kSmallBytes));
    const auto set = client.create_ragged("set", 2);
    EXPECT_TRUE(writer && set);
    kill();
    fs::create_hard_link(spare_, older_);
    std::ofstream(damaged_) << std::string(3 * kPageBytes, 'x');
    fs::permissions(damaged_, fs::perms::owner_read | fs::perms::sticky_bit);
  }

  // The next daemon serves what it can, and stops in good order; or it says why it does not start.
  void start_broken(std::uint64_t call) {
    break_.expect(call, error_);
    const auto begin = std::chrono::steady_clock::now();
    start_keeping(no_grace_, broken());
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(40))
        << "it waits until the kernel breaks a lease of its own (proc_sys_fs(5), lease-break-time)";
    if (daemon_->serves()) {
      expect_served(connect(), break_.name().starts_with("fcntl(F_SET") && error_ != ENOMEM);
      EXPECT_EQ(daemon_->stop(SIGTERM), 0);
    } else {
      EXPECT_EQ(daemon_->wait(), 1) << "neither started nor refused";
      const std::string log = take_log();
      EXPECT_THAT(log, testing::AnyOf(HasSubstr(std::strerror(error_)), HasSubstr("say it with --capacity")));
    }
    break_.mend();
  }

  void expect_all_is_there() {
    start_keeping(no_grace_, {.log = log_.get()});
    const Client client = connect();
    // What was half made, or replaced, stays for a moment: somebody might come back to it.
    EXPECT_TRUE(eventually([&] { return arrays_of(client).size() == known_.size(); }));
    const auto arrays = arrays_of(client);
    expect_served(client);
    for (const auto& array : arrays) EXPECT_EQ(array.pinned, array.name == "pinned") << array.name;
    EXPECT_TRUE(fs::remove(aside_)) << "it is moved aside";
    EXPECT_TRUE(eventually([&] { return shm_files(instance()).size() == known_.size() + 1; }))
        << "nothing else, but for the lock";
  }

  bool restart(std::uint64_t call) {
    kill_busy();
    start_broken(call);
    expect_all_is_there();
    return break_.has_failed();
  }

  const std::vector<std::string> no_grace_ = {"--grace", "0"};
  const std::uint64_t damaged_id_ = 0xdeadbeef;
  const std::string damaged_ = shm_path(segment_name(instance(), damaged_id_));
  const std::string aside_ = shm_path(quarantine_name(instance(), damaged_id_));
  DaemonInfo usual_;
  std::string older_;  // where the older version was
  const std::string spare_ = fmt::format("/dev/shm/{}-spare", instance());
};

TEST_P(BrokenStarts, LoseNoArray) {
  const auto which = std::find(kStartErrors.begin(), kStartErrors.end(), error_) - kStartErrors.begin();
  const auto names = sweep([&](std::uint64_t call) { return restart(call); },
                           1 + static_cast<std::uint64_t>(which) % kStride, kStride);
  if (kStride > 1) return;
  EXPECT_THAT(names, IsSupersetOf({"shm_open", "shm_unlink", "rename", "pread", "fstat", "statvfs",
                                   "fdopendir", "readdir", "fcntl(F_SETSIG)", "fcntl(F_SETLEASE)"}));
}

INSTANTIATE_TEST_SUITE_P(With, BrokenStarts, testing::ValuesIn(kStartErrors),
                         [](const auto& error) { return name_of_error(error.param); });

}  // namespace
}  // namespace cowmgr::test
