// The harness of the storm: see storm.hpp. `bin/storm --kills N --seed S` runs one of any length.
#include "tests/fault/storm.hpp"

#include <array>
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

// The command line.
struct StormPlan {
#ifdef __SANITIZE_ADDRESS__
  std::uint64_t kills = 150;  // a process takes ten times as long to start
#else
  std::uint64_t kills = 750;
#endif
  unsigned seed = 1;
};
StormPlan& storm_plan() {
  static StormPlan plan;
  return plan;
}

// Of so many kills one is the daemon's, roughly.
constexpr std::uint64_t kDaemonShare = 3;

class Storm : public DaemonLifeTest {
 protected:
  void SetUp() override {
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    reader_ = UniqueFd(ends[0]);
    writer_ = UniqueFd(ends[1]);
    ASSERT_EQ(::fcntl(reader_.get(), F_SETFL, O_NONBLOCK), 0);
    void* memory =
        ::mmap(nullptr, sizeof *is_over_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    is_over_ = ::new (memory) std::atomic<bool>(false);
    start_keeping();
    client_.emplace(connect("harness", kDeadline));
  }
  void TearDown() override {
    clients_ = {};
    client_.reset();
    DaemonLifeTest::TearDown();
    ::munmap(is_over_, sizeof *is_over_);
  }

  std::uint64_t pick(std::uint64_t end) {
    return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_);
  }

  // ---- Records ----

  void drain(const std::function<void()>& after_each = [] {}) {
    Record record;
    while (::read(reader_.get(), &record, sizeof record) == static_cast<ssize_t>(sizeof record)) {
      model_.note(record);
      after_each();
    }
  }
  // Goes on until the clients have done that much more, and then for less than a request takes: any instant.
  void let_run(std::uint64_t records) {
    const std::uint64_t until = model_.records() + records;
    for (drain(); model_.records() < until; drain()) {
      ASSERT_TRUE(wait_readable(reader_.get())) << "the clients do nothing any more";
      for (auto& child : clients_) expect_alive(child);
      if (HasFailure()) return;
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(pick(400));
    while (std::chrono::steady_clock::now() < end) {
    }
  }

  // ---- Clients ----

  struct Running {
    std::unique_ptr<Child> child;
    UniqueFd pidfd;
  };

  void start_client(std::uint32_t number) {
    StormClientPlan plan{.socket = socket(),
                         .number = number,
                         .seed = static_cast<unsigned>(random_()),
                         .records = writer_.get(),
                         .is_over = is_over_,
                         .last_set = model_.last_set(number)};
    for (std::uint32_t i = 0; i < kArraysEach; ++i) {
      const std::uint32_t array = number * kArraysEach + i;
      plan.own[array] = *model_.possible(array).begin();
      plan.last_put[array] = model_.last_put(array);
    }
    for (const auto& [set, known] : model_.sets()) {
      // Another goes with the process that made it, whenever the daemon learns that it is gone.
      if (set.maker == number && set.is_detached()) plan.left = set;
    }
    Running& running = clients_.at(number);
    running.child = std::make_unique<Child>([&](const Link& link) {
      if (const std::string problem = run_storm_client(plan); !problem.empty()) {
        link.say(problem);
        ADD_FAILURE() << problem;
      }
    });
    running.pidfd = open_pidfd(running.child->pid());
  }

  void expect_alive(const Running& running) {
    pollfd event{running.pidfd.get(), POLLIN, 0};
    if (::poll(&event, 1, 0) > 0) ADD_FAILURE() << "a client ended: " << running.child->hear();
  }

  void kill_client(std::uint32_t number) {
    Running& running = clients_.at(number);
    const pid_t pid = running.child->pid();
    running.child->kill();
    // What it had asked for is done or not done from here on.
    ASSERT_TRUE(eventually([&] {
      const auto clients = client_->clients();
      return clients && std::ranges::none_of(*clients, [&](const ClientInfo& one) { return one.pid == pid; });
    }));
    drain();
    model_.client_died(number);
    for (std::uint32_t i = 0; i < kArraysEach; ++i) settle(number * kArraysEach + i);
    for (const auto& set : sets_of(number)) settle(set);
    start_client(number);
  }

  // ---- What must hold ----

  [[nodiscard]] StormModel::Shown shown(std::uint32_t array) {
    const auto view = client_->attach(array_name(array));
    if (!view && view.error().code == Errc::not_found) return std::nullopt;
    if (!view) {
      ADD_FAILURE() << view.error().message;
      return std::nullopt;
    }
    const auto put = put_of(array, view->bytes());
    if (!put) ADD_FAILURE() << array_name(array) << " holds wrong bytes";
    return put;
  }

  // Nobody writes it just now: it is what was acknowledged, or what the dead one had asked for.
  void settle(std::uint32_t array) {
    const auto put = shown(array);
    EXPECT_TRUE(model_.possible(array).contains(put))
        << array_name(array) << " shows " << put.value_or(0) << " after "
        << model_.possible(array).begin()->value_or(0);
    model_.settle(array, put);
  }

  [[nodiscard]] std::vector<StormSet> sets_of(std::uint32_t maker) const {
    std::vector<StormSet> sets;
    for (const auto& [set, known] : model_.sets()) {
      if (set.maker == maker) sets.push_back(set);
    }
    return sets;
  }

  // Its maker is dead.
  void settle(const StormSet& set) {
    if (!client_->open_results(set.name())) {
      const auto& known = model_.sets().at(set);
      EXPECT_TRUE(!known.is_made || known.may_be_gone) << set.name() << " is gone";
      model_.forget(set);
    }
  }

  // What was acknowledged before the look must show, or anything that was asked for from then until after it.
  void look_at_everything() {
    drain();
    for (std::uint32_t array = 0; array < kStormClients * kArraysEach; ++array) {
      auto possible = model_.possible(array);
      const auto put = shown(array);
      drain([&] { possible.merge(model_.possible(array)); });
      EXPECT_TRUE(possible.contains(put)) << array_name(array) << " shows " << put.value_or(0);
    }
    const auto sets = model_.sets();
    for (const auto& [set, known] : sets) {
      if (!known.is_made || known.may_be_gone) continue;
      const auto open = client_->open_results(set.name());
      const auto wrong = open ? check_all(set, known, *open) : open.error().message;
      drain();
      const auto still = model_.sets().find(set);
      if (still == model_.sets().end() || still->second.may_be_gone) continue;  // it went while we looked
      EXPECT_EQ(wrong, "") << set.name();
    }
  }
  static std::string check_all(const StormSet& set, const StormModel::Set& known, const ResultSet& open) {
    for (const std::uint64_t slot : known.committed) {
      if (auto wrong = check_slot(set, open, slot); !wrong.empty()) return wrong;
    }
    return {};
  }

  // ---- The end ----

  void end_clients() {
    *is_over_ = true;
    for (auto& running : clients_) {
      const std::string problem = running.child->hear();
      EXPECT_EQ(problem, "");
      EXPECT_EQ(running.child->wait(), 0);
    }
    drain();
    for (std::uint32_t client = 0; client < kStormClients; ++client) {
      model_.client_died(client);
      for (std::uint32_t i = 0; i < kArraysEach; ++i) settle(client * kArraysEach + i);
      for (const auto& set : sets_of(client)) settle(set);
    }
  }

  void take_everything_away() {
    // What was replaced while somebody viewed it who is dead by now: the daemon gives him time to come back.
    EXPECT_TRUE(eventually([&] {
      const auto arrays = arrays_of(*client_);
      return std::ranges::none_of(
          arrays, [](const auto& one) { return one.state == ArrayState::draining || one.views > 0; });
    }));
    for (const auto& array : arrays_of(*client_)) {
      const bool is_of_set = array.name.starts_with("set ");  // a detached one goes on without its maker
      EXPECT_TRUE(is_of_set || array.name.starts_with("array ")) << array.name;
      EXPECT_TRUE(is_of_set || array.state == ArrayState::sealed) << array.name;
      EXPECT_EQ(array.views, 0U) << array.name;
    }
    const auto sets = client_->list_results();
    ASSERT_THAT(sets, Succeeds());
    for (const auto& info : *sets) EXPECT_THAT(client_->open_results(info.name)->forget(), Succeeds());
    for (const auto& array : arrays_of(*client_)) {
      const std::vector<std::string> names = {array.name};
      EXPECT_THAT(client_->pin(names, false), Succeeds());
      EXPECT_THAT(client_->evict(names), Succeeds());
    }
    EXPECT_TRUE(eventually([&] { return client_->ping()->used_bytes == 0; })) << client_->ping()->used_bytes;
    EXPECT_EQ(shm_files(instance()).size(), 1U) << "the lock";
    client_.reset();
    EXPECT_THAT(connect().shutdown(true), Succeeds());
    EXPECT_EQ(daemon_->wait(), 0);
    daemon_.reset();
    EXPECT_EQ(shm_files(instance()).size(), 0U);
    expect_no_descriptors();
  }

  // No process that we may look at has a segment of the instance open.
  void expect_no_descriptors() const {
    namespace fs = std::filesystem;
    std::error_code ignored;
    for (const auto& process : fs::directory_iterator("/proc", ignored)) {
      for (const auto& fd : fs::directory_iterator(process.path() / "fd", ignored)) {
        const std::string target = fs::read_symlink(fd.path(), ignored);
        EXPECT_EQ(target.find("/dev/shm/cowmgr." + instance() + "."), std::string::npos)
            << fd.path() << target;
      }
    }
  }

  UniqueFd reader_;
  UniqueFd writer_;
  std::atomic<bool>* is_over_ = nullptr;
  std::mt19937 random_{storm_plan().seed};
  StormModel model_;
  std::optional<Client> client_;
  std::array<Running, kStormClients> clients_;
};

TEST_F(Storm, LosesNothing) {
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t daemon_kills = 0;
  std::uint64_t client_kills = 0;
  for (std::uint32_t number = 0; number < kStormClients; ++number) start_client(number);
  while (daemon_kills + client_kills < storm_plan().kills && !HasFailure()) {
    let_run(1 + pick(40));
    if (HasFailure()) break;
    if (pick(kDaemonShare) == 0) {
      ++daemon_kills;
      EXPECT_EQ(daemon_->stop(SIGKILL), -SIGKILL);
      start_keeping();
      look_at_everything();
    } else {
      ++client_kills;
      kill_client(static_cast<std::uint32_t>(pick(kStormClients)));
    }
  }
  if (HasFailure()) {
    ADD_FAILURE() << "seed " << storm_plan().seed << ", kill " << daemon_kills + client_kills;
    return;
  }
  end_clients();
  take_everything_away();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << fmt::format(
      "{} kills of the daemon and {} of clients in {:.1f} s: {:.1f} a second, {} requests that changed "
      "something; seed {}\n",
      daemon_kills, client_kills, seconds.count(),
      static_cast<double>(daemon_kills + client_kills) / seconds.count(), model_.records(),
      storm_plan().seed);
}

}  // namespace
}  // namespace cowmgr::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  CLI::App app("Kills a daemon and its clients at random instants, and checks that nothing is lost", "storm");
  app.add_option("--kills", cowmgr::test::storm_plan().kills, "How many; a third of them the daemon's")
      ->capture_default_str();
  app.add_option("--seed", cowmgr::test::storm_plan().seed, "Other seeds kill at other instants")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return RUN_ALL_TESTS();
}
