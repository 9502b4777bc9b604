#include "client/pool/supervisor.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <optional>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <boost/interprocess/anonymous_shared_memory.hpp>
#include <boost/interprocess/exceptions.hpp>
#include <fmt/format.h>

#include "client/fork_guard.hpp"
#include "client/pool/deadlock.hpp"

namespace cowmgr::detail {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// A worker that lived shorter than this found nothing to do, or could not: the next one waits a little.
constexpr auto kShortLife = milliseconds(20);
constexpr auto kFirstPause = milliseconds(1);
constexpr auto kLongestPause = milliseconds(100);
constexpr int kExecFailed = 127;
constexpr auto kLongestLook = milliseconds(1000);  // between two looks at what the workers' threads do

// Why a worker was ended, or ended itself.
enum class Trouble : std::uint32_t { none, robbed, deadlock };

// In memory that the program, the watching process and its forks share; the program only reads. Zeroed.
struct Board {
  std::atomic<std::uint64_t> restarts;
  std::atomic<std::uint64_t> troubles;
  std::atomic<std::uint64_t> last_trouble;  // process id, Trouble << 32
  std::atomic<std::int32_t> pids[1];        // 0: being started again
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
              std::atomic<std::int32_t>::is_always_lock_free);

Board& board_of(const boost::interprocess::mapped_region& region) noexcept {
  return *static_cast<Board*>(region.get_address());
}

std::string sentence_of(std::uint64_t trouble, milliseconds stuck_after, std::uint32_t threads) {
  const auto pid = static_cast<std::uint32_t>(trouble);
  if (trouble >> 32U == static_cast<std::uint32_t>(Trouble::robbed)) {
    return fmt::format(
        "pool worker {} was ended: its task closed the worker's own descriptors, or became another "
        "program; a task may close only what it opened",
        pid);
  }
  std::string stuck = fmt::format("pool worker {} was ended: for {} ms all its threads waited for each other",
                                  pid, stuck_after.count());
  if (threads < 2) return stuck;
  return fmt::format(
      "{}; the program had {} threads when it started the pool, which its forks do not have: a library "
      "that had used threads by then, as OpenMP does, waits for them for ever. Start the pool before that "
      "library is used, or let the workers be another program (PoolOptions::program)",
      stuck, threads);
}

// Whether a process whose descriptors are closed is ending: its memory goes first (kernel/exit.c).
bool is_ending(pid_t pid) {
  std::array<char, 1> target{};
  return ::readlink(fmt::format("/proc/{}/exe", pid).c_str(), target.data(), target.size()) < 0 &&
         errno == ENOENT;
}

Result<boost::interprocess::mapped_region> make_board(std::uint32_t workers) {
  try {
    return boost::interprocess::anonymous_shared_memory(sizeof(Board) +
                                                        workers * sizeof(std::atomic<std::int32_t>));
  } catch (const boost::interprocess::interprocess_exception& error) {
    return tl::unexpected(
        os_error("mmap", fmt::format("the board of {} workers", workers), error.get_native_error()));
  }
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
    UniqueFd lifeline{};  // its other end is a descriptor of the worker's, as long as that leaves it open
    std::optional<std::uint64_t>
        mark{};                       // of a worker whose threads wait for each other; see deadlock_mark()
    Clock::time_point marked{};       // since then
    Trouble trouble = Trouble::none;  // why it was killed
    Clock::time_point started{};
    Clock::time_point next_start{};
    milliseconds pause{0};
  };

  // Waits until a worker ended, or is due. False when the program is gone, or wants no workers any more.
  bool is_wanted() {
    std::vector<pollfd> polls = {{control_.get(), POLLIN, 0}, {program_.get(), POLLIN, 0}};
    auto due = Clock::time_point::max();
    for (const Worker& worker : workers_) {
      if (worker.pid > 0) {
        polls.push_back({worker.pidfd.get(), POLLIN, 0});
        polls.push_back({worker.trouble == Trouble::none ? worker.lifeline.get() : -1, 0, 0});
      } else {
        due = std::min(due, worker.next_start);
      }
    }
    if (plan_.stuck_after.count() > 0) due = std::min(due, Clock::now() + look_pause());
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
      if (worker.pid > 0) end_if_useless(worker);
      if (worker.pid > 0 || Clock::now() < worker.next_start) continue;
      if (start(i).empty()) board_.restarts.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void note_end(std::size_t i) {
    Worker& worker = workers_[i];
    int status = 0;
    if (::waitpid(worker.pid, &status, WNOHANG) != worker.pid) return;
    if (!plan_.command.empty() && WIFEXITED(status) && WEXITSTATUS(status) == kRobbed)
      tell(worker.pid, Trouble::robbed);
    board_.pids[i].store(0, std::memory_order_relaxed);
    const auto now = Clock::now();
    worker.next_start = now + worker.pause;
    worker.pause = now - worker.started < kShortLife
                       ? std::clamp(worker.pause * 2, kFirstPause, kLongestPause)
                       : milliseconds(0);
    worker.pid = 0;
  }

  [[nodiscard]] milliseconds look_pause() const {
    return std::clamp(plan_.stuck_after / 3, milliseconds(1), kLongestLook);
  }

  void tell(pid_t pid, Trouble trouble) {
    const auto last = static_cast<std::uint64_t>(trouble) << 32U | static_cast<std::uint32_t>(pid);
    board_.last_trouble.store(last, std::memory_order_relaxed);
    board_.troubles.fetch_add(1, std::memory_order_release);
    fmt::print(stderr, "{}\n", sentence_of(last, plan_.stuck_after, plan_.threads));
  }

  // Kills a worker that neither works nor ends. What it had leased is free again with its end.
  void end_if_useless(Worker& worker) {
    if (worker.trouble != Trouble::none) return;  // it is killed, and not gone yet
    if (is_robbed(worker))
      worker.trouble = Trouble::robbed;
    else if (is_stuck(worker))
      worker.trouble = Trouble::deadlock;
    else
      return;
    tell(worker.pid, worker.trouble);
    ::kill(worker.pid, SIGKILL);
  }

  static bool is_robbed(const Worker& worker) {
    pollfd poll{worker.lifeline.get(), 0, 0};
    return worker.lifeline && ::poll(&poll, 1, 0) > 0 && !is_ending(worker.pid);
  }

  bool is_stuck(Worker& worker) const {
    if (plan_.stuck_after.count() == 0) return false;
    const auto mark = deadlock_mark(worker.pid);
    if (!mark || mark != worker.mark) worker.marked = Clock::now();
    worker.mark = mark;
    return mark && Clock::now() - worker.marked >= plan_.stuck_after;
  }

  // Returns what went wrong, or nothing.
  std::string start(std::size_t i) {
    Worker& worker = workers_[i];
    worker.next_start = Clock::now() + kLongestPause;  // if it fails
    std::array<int, 2> ends{-1, -1};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) return os_error("pipe2", "a worker", errno).message;
    UniqueFd errors(ends[0]);
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
    if (plan_.command.empty()) worker.lifeline = std::move(errors);
    worker.mark.reset();
    worker.trouble = Trouble::none;
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
    plan_.body([this] { tell(::getpid(), Trouble::robbed); });
    ::_exit(0);
  }

  const WorkerPlan& plan_;
  Board& board_;
  std::vector<Worker> workers_;
  UniqueFd control_;
  UniqueFd program_;
};

}  // namespace

Supervisor::Supervisor(boost::interprocess::mapped_region board, std::uint32_t workers,
                       const WorkerPlan& plan)
    : board_(std::move(board)),
      workers_(workers),
      stuck_after_(plan.stuck_after),
      threads_(plan.threads),
      generation_(fork_generation()) {}

Supervisor::Supervisor(Supervisor&& other) noexcept
    : board_(std::move(other.board_)),
      workers_(other.workers_),
      stuck_after_(other.stuck_after_),
      threads_(other.threads_),
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
  auto board = make_board(workers);
  if (!board) return error_of(std::move(board));
  Supervisor supervisor(*std::move(board), workers, plan);
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

std::uint64_t Supervisor::troubles() const noexcept {
  return board_of(board_).troubles.load(std::memory_order_acquire);
}

std::string Supervisor::trouble() const {
  const auto last = board_of(board_).last_trouble.load(std::memory_order_relaxed);
  return last == 0 ? std::string() : sentence_of(last, stuck_after_, threads_);
}

}  // namespace cowmgr::detail
