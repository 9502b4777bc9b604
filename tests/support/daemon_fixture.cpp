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
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

namespace cowmgr::test {
namespace {

namespace fs = std::filesystem;

// Where the daemon says that it serves (sd_notify(3)).
UniqueFd listen_for_readiness(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), std::min(path.size(), sizeof address.sun_path - 1));
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0) << path;
  return fd;
}

// Starts the daemon; `log`, if any, becomes its standard error.
pid_t spawn_daemon(const std::vector<std::string>& arguments, const std::string& notify, int log) {
  std::vector<std::string> words = {program_path("cowmgr")};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (auto& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::string notify_variable = "NOTIFY_SOCKET=" + notify;
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (std::string_view(*entry).substr(0, 7) != "COWMGR_") environment.push_back(*entry);
  }
  environment.push_back(notify_variable.data());
  environment.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  if (log >= 0) ::posix_spawn_file_actions_adddup2(&actions, log, STDERR_FILENO);
  pid_t pid = -1;
  const int rc = ::posix_spawn(&pid, argv.front(), &actions, nullptr, argv.data(), environment.data());
  ::posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(rc, 0) << argv.front() << ": " << std::strerror(rc);
  return pid;
}

bool wait_until_ready(int notify, pid_t pid) {
  const UniqueFd pidfd = open_pidfd(pid);
  std::array<pollfd, 2> events{{{notify, POLLIN, 0}, {pidfd.get(), POLLIN, 0}}};
  const int timeout_ms = static_cast<int>(std::chrono::milliseconds(kDeadline).count());
  if (::poll(events.data(), events.size(), timeout_ms) <= 0 || (events[0].revents & POLLIN) == 0)
    return false;
  std::array<char, 256> text{};
  const auto count = ::recv(notify, text.data(), text.size(), 0);
  return count > 0 && std::string_view(text.data(), static_cast<std::size_t>(count)).find("READY=1") == 0;
}

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

Daemon::Daemon(std::string socket, std::string instance, const std::vector<std::string>& arguments)
    : socket_(std::move(socket)), instance_(std::move(instance)) {
  const std::string notify = socket_ + ".notify";
  const UniqueFd readiness = listen_for_readiness(notify);
  std::vector<std::string> all = {"--socket", socket_, "--instance", instance_, "--log-level", "warning"};
  all.insert(all.end(), arguments.begin(), arguments.end());
  pid_ = spawn_daemon(all, notify, -1);
  EXPECT_TRUE(wait_until_ready(readiness.get(), pid_)) << "the daemon does not start";
  ::unlink(notify.c_str());
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
  const pid_t pid = spawn_daemon(arguments, "", writer.get());
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

Daemon& DaemonLifeTest::start(const std::vector<std::string>& arguments) {
  daemon_ = std::make_unique<Daemon>(socket(), instance_, arguments);
  return *daemon_;
}

void DaemonLifeTest::stop() {
  EXPECT_EQ(daemon_->stop(SIGTERM), 0) << "the daemon stops in good order";
  daemon_.reset();
}

Client DaemonLifeTest::connect(const std::string& command) const {
  auto client = Client::connect({.socket = socket(), .command = command});
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

}  // namespace cowmgr::test
