#include "tests/support/daemon_fixture.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include <fmt/format.h>

#include "tests/support/service_manager.hpp"

namespace cowmgr::test {
namespace {

namespace fs = std::filesystem;

// `stored` are the descriptors that a service manager hands to it: their process number must be the daemon's
// own (sd_listen_fds(3)), which the shell knows that becomes the daemon.
pid_t spawn_daemon(const std::vector<std::string>& arguments, const std::string& notify, const Launch& launch,
                   const ServiceManager::Stored& stored = {}) {
  std::vector<std::string> words = {program_path(launch.program)};
  if (!stored.empty()) {
    const std::string script = "LISTEN_PID=$$ exec \"$0\" \"$@\"";
    words.insert(words.begin(), {"/bin/sh", "-c", script});
  }
  words.insert(words.end(), arguments.begin(), arguments.end());
  if (!launch.group.empty()) {
    const std::string script = "echo $$ > \"$0\"/cgroup.procs && exec \"$@\"";
    words.insert(words.begin(), {"/bin/sh", "-c", script, launch.group});
  }
  std::vector<char*> argv;
  for (auto& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<std::string> variables = launch.environment;
  variables.push_back("NOTIFY_SOCKET=" + notify);
  std::string names;
  for (const auto& [name, fd] : stored) names += (names.empty() ? "" : ":") + name;
  if (!stored.empty()) {
    variables.push_back(fmt::format("LISTEN_FDS={}", stored.size()));
    variables.push_back("LISTEN_FDNAMES=" + names);
  }
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::string_view(*entry).substr(0, 7) != "COWMGR_") environment.push_back(*entry);
  }
  for (auto& variable : variables) environment.push_back(variable.data());
  environment.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  if (launch.log >= 0) ::posix_spawn_file_actions_adddup2(&actions, launch.log, STDERR_FILENO);
  if (launch.log == kClosed) ::posix_spawn_file_actions_addclose(&actions, STDERR_FILENO);
  int number = STDERR_FILENO;
  for (const auto& [name, fd] : stored) ::posix_spawn_file_actions_adddup2(&actions, fd.get(), ++number);
  pid_t pid = -1;
  const int rc = ::posix_spawn(&pid, argv.front(), &actions, nullptr, argv.data(), environment.data());
  ::posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(rc, 0) << argv.front() << ": " << std::strerror(rc);
  return pid;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// The sanitizers of gcc 12 do not take their locks at a fork: what another thread has locked just then, in
// its allocator say, stays so in the child for ever. A thread that sleeps has none. Those that never rest are
// not waited for.
void wait_until_others_sleep() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  const auto sleeps = [](const fs::path& task) {
    std::ifstream in(task / "stat");
    std::string text;
    std::getline(in, text);
    const auto state = text.rfind(") ");  // "pid (name) S ..." (proc(5)); of a thread that has ended, nothing
    return state == std::string::npos || text[state + 2] == 'S';
  };
  const auto others_sleep = [&] {
    const std::string self = std::to_string(::gettid());
    const fs::directory_iterator tasks("/proc/self/task");
    return std::all_of(tasks, fs::directory_iterator(), [&](const auto& task) {
      return task.path().filename() == self || sleeps(task.path());
    });
  };
  while (!others_sleep() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}
const int waits_at_forks = ::pthread_atfork(wait_until_others_sleep, nullptr, nullptr);
#endif

}  // namespace

TemporaryDirectory::TemporaryDirectory() : path_("/tmp/cowmgr-test-XXXXXX") {
  EXPECT_NE(::mkdtemp(path_.data()), nullptr);
  EXPECT_EQ(::chmod(path_.c_str(), 0755), 0);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::vector<std::string> TemporaryDirectory::files() const {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path_)) names.push_back(entry.path().filename());
  return names;
}

std::string program_path(std::string_view name) {
  const char* given = std::getenv("COWMGR_BIN_DIR");
  const fs::path directory =
      given != nullptr ? fs::path(given) : fs::read_symlink("/proc/self/exe").parent_path();
  return directory / name;
}

std::string unique_instance() {
  static std::atomic<int> last{0};
  return fmt::format("test-{}-{}", ::getpid(), ++last);
}

std::vector<std::string> shm_files(const std::string& instance) {
  std::vector<std::string> names;
  const std::string prefix = fmt::format("cowmgr.{}.", instance);
  for (const auto& entry : fs::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename();
    if (name.compare(0, prefix.size(), prefix) == 0) names.push_back(name);
  }
  return names;
}

UniqueFd open_pidfd(pid_t pid) {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

bool wait_readable(int fd) {
  pollfd event{fd, POLLIN, 0};
  int rc = 0;
  do rc = ::poll(&event, 1, static_cast<int>(std::chrono::milliseconds(kDeadline).count()));
  while (rc < 0 && errno == EINTR);
  return rc == 1;
}

int reap(pid_t pid) {
  const UniqueFd pidfd = open_pidfd(pid);
  int status = 0;
  if (!wait_readable(pidfd.get()) || ::waitpid(pid, &status, 0) != pid) {
    ADD_FAILURE() << "process " << pid << " does not end";
    return -1000;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

std::vector<std::byte> pattern_bytes(std::size_t size_bytes, unsigned seed) {
  std::vector<std::byte> bytes(size_bytes);
  for (std::size_t i = 0; i < size_bytes; ++i)
    bytes[i] = static_cast<std::byte>(i * 31 + i / 4096 * 7 + seed);
  return bytes;
}

std::vector<std::byte> copy_of(std::span<const std::byte> bytes) {
  return {bytes.begin(), bytes.end()};
}

// ---- Daemon ----

Daemon::Daemon(std::string socket, std::string instance, const std::vector<std::string>& arguments,
               const Launch& launch)
    : socket_(std::move(socket)), instance_(std::move(instance)) {
  std::optional<ServiceManager> own;
  ServiceManager& manager = launch.manager != nullptr ? *launch.manager : own.emplace(socket_ + ".notify");
  std::vector<std::string> all = {"--socket", socket_, "--instance", instance_, "--log-level", "warning"};
  all.insert(all.end(), arguments.begin(), arguments.end());
  pid_ = spawn_daemon(all, manager.path(), launch, manager.stored());
  serves_ = manager.await_ready(pid_);
  EXPECT_TRUE(serves_ || launch.may_refuse) << "the daemon does not start";
}

Daemon::~Daemon() {
  if (pid_ > 0) stop(SIGKILL);
}

int Daemon::stop(int signal) {
  ::kill(pid_, signal);
  return wait();
}

int Daemon::wait() {
  return reap(std::exchange(pid_, -1));
}

Ended run_daemon(const std::vector<std::string>& arguments) {
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const UniqueFd reader(ends[0]);
  UniqueFd writer(ends[1]);
  const pid_t pid = spawn_daemon(arguments, "", {.log = writer.get()});
  writer.reset();
  Ended ended;
  std::array<char, 4096> text{};
  while (wait_readable(reader.get())) {
    const auto count = ::read(reader.get(), text.data(), text.size());
    if (count <= 0) break;
    ended.log.append(text.data(), static_cast<std::size_t>(count));
  }
  ended.exit_code = reap(pid);
  return ended;
}

// ---- The fixtures ----

Daemon& DaemonLifeTest::start(std::vector<std::string> arguments) {
  arguments.emplace_back("--purge");
  return start_keeping(arguments);
}

Daemon& DaemonLifeTest::start_keeping(const std::vector<std::string>& arguments, const Launch& launch) {
  daemon_ = std::make_unique<Daemon>(socket(), instance_, arguments, launch);
  return *daemon_;
}

void DaemonLifeTest::stop() {
  EXPECT_EQ(daemon_->stop(SIGTERM), 0) << "the daemon stops in good order";
  daemon_.reset();
}

Client DaemonLifeTest::connect(const std::string& command, Milliseconds reconnect) const {
  auto client =
      Client::connect({.socket = socket(), .command = command, .reconnect = reconnect, .wait = reconnect});
  if (!client) {
    ADD_FAILURE() << client.error().message;
    std::abort();  // there is nothing that the test could go on with
  }
  return *std::move(client);
}

void DaemonLifeTest::TearDown() {
  if (daemon_) stop();
  EXPECT_THAT(shm_files(instance_), testing::IsEmpty());
  EXPECT_THAT(directory_.files(), testing::IsEmpty());
}

void KeepingDaemonTest::TearDown() {
  if (daemon_) {
    EXPECT_THAT(connect().shutdown(true), Succeeds());
    EXPECT_EQ(daemon_->wait(), 0);
    daemon_.reset();
  }
  DaemonLifeTest::TearDown();
}

}  // namespace cowmgr::test
