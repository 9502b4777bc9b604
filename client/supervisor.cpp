#include "client/supervisor.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <boost/interprocess/anonymous_shared_memory.hpp>
#include <fmt/format.h>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// A worker that lived shorter than this found nothing to do, or could not: the next one waits a little.
constexpr auto kShortLife = milliseconds(20);
constexpr auto kFirstPause = milliseconds(1);
constexpr auto kLongestPause = milliseconds(100);
constexpr int kExecFailed = 127;

// In memory that the program and the watching process share; the latter alone writes. Zero at first.
struct Board {
  std::atomic<std::uint64_t> restarts;
  std::atomic<std::int32_t> pids[1];  // 0: being started again
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
              std::atomic<std::int32_t>::is_always_lock_free);

Board& board_of(const boost::interprocess::mapped_region& region) noexcept {
  return *static_cast<Board*>(region.get_address());
}

UniqueFd pidfd_of(pid_t pid) {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

pid_t reap(pid_t pid) noexcept {
  pid_t reaped = 0;
  do reaped = ::waitpid(pid, nullptr, 0);
  while (reaped < 0 && errno == EINTR);
  return reaped;
}

// The program's handlers and masks mean nothing here. Ctrl-C goes to the whole group: what it means, the
// program decides, and its end is ours.
void settle_signals() noexcept {
  for (int number = 1; number < NSIG; ++number) {
    if (number != SIGKILL && number != SIGSTOP) ::signal(number, SIG_DFL);
  }
  ::signal(SIGINT, SIG_IGN);
  ::signal(SIGQUIT, SIG_IGN);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
}

// Nobody types for us.
void close_standard_input() noexcept {
  const UniqueFd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (null) ::dup2(null.get(), STDIN_FILENO);
}

// Becomes the program; an error number goes to `errors` if that cannot be done.
[[noreturn]] void become(const WorkerPlan& plan, int errors) {
  for (const auto& variable : plan.environment) ::putenv(::strdup(variable.c_str()));
  std::vector<char*> argv;
  for (const auto& word : plan.command) argv.push_back(::strdup(word.c_str()));
  argv.push_back(nullptr);
  ::execvp(argv.front(), argv.data());
  const int number = errno;
  (void)!::write(errors, &number, sizeof number);
  ::_exit(kExecFailed);
}

// The watching process.
class Watch {
 public:
  Watch(const WorkerPlan& plan, Board& board, std::uint32_t workers, UniqueFd control, UniqueFd program)
      : plan_(plan),
        board_(board),
        workers_(workers),
        control_(std::move(control)),
        program_(std::move(program)) {}

  [[noreturn]] void run() {
    ::prctl(PR_SET_NAME, "cowmgr-pool");
    settle_signals();
    close_standard_input();
    std::string failure;
    for (std::size_t i = 0; i < workers_.size() && failure.empty(); ++i) failure = start(i);
    if (failure.empty()) failure = "ready";
    (void)::send(control_.get(), failure.data(), failure.size(), MSG_NOSIGNAL);
    while (is_wanted()) restart();
    for (const Worker& worker : workers_) {
      if (worker.pid > 0) ::kill(worker.pid, SIGKILL);
    }
    for (const Worker& worker : workers_) {
      if (worker.pid > 0) reap(worker.pid);
    }
    ::_exit(0);
  }

 private:
  struct Worker {
    pid_t pid = 0;  // 0: to be started at `next_start`
    UniqueFd pidfd{};
    Clock::time_point started{};
    Clock::time_point next_start{};
    milliseconds pause{0};
  };

  // Waits until a worker ended, or is due. False when the program is gone, or wants no workers any more.
  bool is_wanted() {
    std::vector<pollfd> polls = {{control_.get(), POLLIN, 0}, {program_.get(), POLLIN, 0}};
    auto due = Clock::time_point::max();
    for (const Worker& worker : workers_) {
      if (worker.pid > 0)
        polls.push_back({worker.pidfd.get(), POLLIN, 0});
      else
        due = std::min(due, worker.next_start);
    }
    const auto left = std::chrono::ceil<milliseconds>(due - Clock::now()).count();
    const int timeout_ms =
        due == Clock::time_point::max() ? -1 : static_cast<int>(std::clamp<std::int64_t>(left, 0, 1000));
    if (::poll(polls.data(), polls.size(), timeout_ms) < 0) return errno == EINTR;
    return polls[0].revents == 0 && polls[1].revents == 0;
  }

  void restart() {
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      Worker& worker = workers_[i];
      if (worker.pid > 0) note_end(i);
      if (worker.pid > 0 || Clock::now() < worker.next_start) continue;
      if (start(i).empty()) board_.restarts.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void note_end(std::size_t i) {
    Worker& worker = workers_[i];
    if (::waitpid(worker.pid, nullptr, WNOHANG) != worker.pid) return;
    board_.pids[i].store(0, std::memory_order_relaxed);
    const auto now = Clock::now();
    worker.next_start = now + worker.pause;
    worker.pause = now - worker.started < kShortLife
                       ? std::clamp(worker.pause * 2, kFirstPause, kLongestPause)
                       : milliseconds(0);
    worker.pid = 0;
  }

  // Returns what went wrong, or nothing.
  std::string start(std::size_t i) {
    Worker& worker = workers_[i];
    worker.next_start = Clock::now() + kLongestPause;  // if it fails
    std::array<int, 2> ends{-1, -1};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) return os_error("pipe2", "a worker", errno).message;
    const UniqueFd errors(ends[0]);
    UniqueFd its_end(ends[1]);
    const pid_t watch = ::getpid();
    const pid_t pid = ::fork();
    if (pid == 0) work(watch, its_end.get());
    if (pid < 0) return os_error("fork", "a worker", errno).message;
    its_end.reset();
    int number = 0;
    if (!plan_.command.empty() && ::read(errors.get(), &number, sizeof number) == sizeof number) {
      reap(pid);
      return fmt::format("{} cannot be run: {}", plan_.command.front(),
                         os_error("exec", "it", number).message);
    }
    worker.pid = pid;
    worker.pidfd = pidfd_of(pid);
    worker.started = Clock::now();
    board_.pids[i].store(pid, std::memory_order_relaxed);
    return {};
  }

  [[noreturn]] void work(pid_t watch, int errors) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != watch) ::_exit(0);  // it died before we could ask to die with it
    ::prctl(PR_SET_NAME, "cowmgr-worker");
    control_.reset();
    program_.reset();
    if (!plan_.command.empty()) become(plan_, errors);
    plan_.body();
    ::_exit(0);
  }

  const WorkerPlan& plan_;
  Board& board_;
  std::vector<Worker> workers_;
  UniqueFd control_;
  UniqueFd program_;
};

}  // namespace

Supervisor::Supervisor(boost::interprocess::mapped_region board, std::uint32_t workers)
    : board_(std::move(board)), workers_(workers), generation_(fork_generation()) {}

Supervisor::Supervisor(Supervisor&& other) noexcept
    : board_(std::move(other.board_)),
      workers_(other.workers_),
      control_(std::move(other.control_)),
      pidfd_(std::move(other.pidfd_)),
      pid_(std::exchange(other.pid_, -1)),
      generation_(other.generation_) {}

Result<Supervisor> Supervisor::start(std::uint32_t workers, const WorkerPlan& plan) {
  std::array<int, 2> ends{-1, -1};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0)
    return tl::unexpected(os_error("socketpair", "AF_UNIX", errno));
  UniqueFd ours(ends[0]);
  UniqueFd its_end(ends[1]);
  UniqueFd program = pidfd_of(::getpid());
  if (!program) return tl::unexpected(os_error("pidfd_open", "this process", errno));
  Supervisor supervisor(boost::interprocess::anonymous_shared_memory(
                            sizeof(Board) + workers * sizeof(std::atomic<std::int32_t>)),
                        workers);
  supervisor.pid_ = ::fork();
  if (supervisor.pid_ == 0) {
    ours.reset();
    Watch(plan, board_of(supervisor.board_), workers, std::move(its_end), std::move(program)).run();
  }
  if (supervisor.pid_ < 0) return tl::unexpected(os_error("fork", "the pool", errno));
  its_end.reset();
  close_in_children(ours.get());
  supervisor.control_ = std::move(ours);
  supervisor.pidfd_ = pidfd_of(supervisor.pid_);
  std::array<char, 512> word{};
  ssize_t count = 0;
  do count = ::recv(supervisor.control_.get(), word.data(), word.size(), 0);
  while (count < 0 && errno == EINTR);
  const std::string_view said(word.data(), count > 0 ? static_cast<std::size_t>(count) : 0);
  if (said == "ready") return supervisor;
  return fail(
      plan.command.empty() ? Errc::os_failure : Errc::not_found,
      fmt::format("the pool's workers do not start: {}", said.empty() ? "their process ended" : said));
}

Supervisor::~Supervisor() {
  stop();
}

void Supervisor::stop() noexcept {
  if (generation_ != fork_generation()) {
    (void)control_.release();  // closed at the fork; its number may mean something else by now
    return;
  }
  if (pid_ < 0) return;
  // A child that somebody forked meanwhile may still have our end: its end alone would not do.
  (void)::send(control_.get(), "stop", 4, MSG_NOSIGNAL);
  forget_fd(control_.get());
  control_.reset();
  reap(std::exchange(pid_, -1));
}

bool Supervisor::is_running() const noexcept {
  // Not pid_: another thread may be at stop().
  pollfd poll{pidfd_.get(), POLLIN, 0};
  return ::poll(&poll, 1, 0) <= 0;  // a signal that comes meanwhile tells nothing
}

std::vector<pid_t> Supervisor::workers() const {
  std::vector<pid_t> pids;
  for (std::uint32_t i = 0; i < workers_; ++i) {
    if (const pid_t pid = board_of(board_).pids[i].load(std::memory_order_relaxed); pid > 0)
      pids.push_back(pid);
  }
  return pids;
}

std::uint64_t Supervisor::restarts() const noexcept {
  return board_of(board_).restarts.load(std::memory_order_relaxed);
}

}  // namespace cowmgr::detail
