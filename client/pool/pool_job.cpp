#include "client/pool/pool_job.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <initializer_list>
#include <sys/prctl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "client/client_access.hpp"
#include "client/pool/supervisor.hpp"
#include "cowmgr/pool.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace detail {
namespace {

// A worker waits for the next daemon for as long as it takes; it ends with the pool.
constexpr auto kReconnect = std::chrono::hours(24);

template <class Function>
std::uint64_t address_of(Function function) noexcept {
  return reinterpret_cast<std::uint64_t>(function);
}

// Whether code of this process lies there: of a library that the owner loaded later, this fork has nothing.
bool is_code(std::uint64_t address) noexcept {
  Dl_info info{};
  return ::dladdr(reinterpret_cast<void*>(address), &info) != 0;  // NOLINT(performance-no-int-to-ptr)
}

std::uint64_t number_at(std::span<const std::byte> bytes, std::uint64_t index) noexcept {
  std::uint64_t number = 0;
  std::memcpy(&number, bytes.data() + index * sizeof number, sizeof number);
  return number;
}

Result<TaskCode> find_task(const JobText& text, const std::vector<TaskCode>& tasks) {
  if (text.task.empty()) {
    if (!is_code(text.thunk) || !is_code(text.function))
      return fail(
          Errc::not_found,
          "this worker does not have the task's code; start the pool after the library that it is in is "
          "loaded, or use a NamedTask where workers are another program");
    // NOLINTBEGIN(performance-no-int-to-ptr): the owner of this fork wrote them down as numbers
    return TaskCode{{}, reinterpret_cast<Thunk>(text.thunk), reinterpret_cast<void (*)()>(text.function)};
    // NOLINTEND(performance-no-int-to-ptr)
  }
  const auto at =
      std::find_if(tasks.begin(), tasks.end(), [&](const auto& task) { return task.name == text.task; });
  if (at != tasks.end()) return *at;
  return fail(Errc::not_found,
              fmt::format("this worker knows no task {}; give it to serve_pool()", printable(text.task)));
}

// A job as a worker sees it.
class WorkerJob {
 public:
  static Result<WorkerJob> open(const Client& client, const ResultSet& set,
                                const std::vector<TaskCode>& tasks) {
    WorkerJob job;
    job.client_ = &client;
    job.slots_ = set.slots();
    auto stream = stream_of(set.job());
    cereal::BinaryInputArchive archive(stream);
    archive(job.text_);
    auto task = find_task(job.text_, tasks);
    if (!task) return error_of(std::move(task));
    job.task_ = *std::move(task);
    if (auto ok = attach(client, job.text_.input_id, job.input_); !ok) return error_of(std::move(ok));
    if (auto ok = attach(client, job.text_.arguments_id, job.arguments_); !ok) return error_of(std::move(ok));
    return job;
  }

  [[nodiscard]] Result<void> run(Slot& slot) const {
    const auto all = arguments_ ? arguments_->bytes() : std::as_bytes(std::span(text_.arguments));
    const auto arguments = pack_at(all, slot.index());
    if (!arguments) return error_of(arguments);
    return task_.thunk({.client = *client_,
                        .slot = slot,
                        .input = input_ ? &*input_ : nullptr,
                        .rows = input_ ? rows_of_slot(input_->shape().front(), slots_, slot.index()) : Rows(),
                        .arguments = *arguments,
                        .function = task_.function});
  }

 private:
  static Result<void> attach(const Client& client, std::uint64_t id, std::optional<Array>& array) {
    if (id == 0) return {};
    auto attached = client.attach_id(id);
    if (!attached) return error_of(std::move(attached));
    array = *std::move(attached);
    return {};
  }

  const Client* client_ = nullptr;
  std::uint64_t slots_ = 0;
  JobText text_;
  TaskCode task_;
  std::optional<Array> input_;
  std::optional<Array> arguments_;
};

Result<WorkerJob> open_job(const Client& client, const ResultSet& set, const std::vector<TaskCode>& tasks) {
  try {
    return WorkerJob::open(client, set, tasks);
  } catch (const std::exception& error) {
    return fail(Errc::corrupted, fmt::format("the job cannot be read: {}", error.what()));
  }
}

}  // namespace

JobText text_of(const TaskCode& task) {
  if (!task.name.empty()) return {.task = task.name};
  return {.thunk = address_of(task.thunk), .function = address_of(task.function)};
}

std::string join_packs(const std::vector<std::string>& packs) {
  std::string joined;
  const auto append = [&](std::uint64_t number) {
    joined.append(reinterpret_cast<const char*>(&number), sizeof number);
  };
  append(packs.size());
  std::uint64_t end = 0;
  for (const auto& pack : packs) append(end += pack.size());
  for (const auto& pack : packs) joined += pack;
  return joined;
}

Result<std::span<const std::byte>> pack_at(std::span<const std::byte> joined, std::uint64_t index) {
  const auto corrupted = [] { return fail(Errc::corrupted, "the arguments of the job are not whole"); };
  constexpr std::uint64_t kNumber = sizeof(std::uint64_t);
  if (joined.size() < kNumber) return corrupted();
  const std::uint64_t count = number_at(joined, 0);
  if (count == 1) index = 0;
  if (index >= count || count > joined.size() / kNumber - 1) return corrupted();
  const auto packs = joined.subspan((count + 1) * kNumber);
  const std::uint64_t begin = index == 0 ? 0 : number_at(joined, index);
  const std::uint64_t end = number_at(joined, index + 1);
  if (begin > end || end > packs.size()) return corrupted();
  return packs.subspan(begin, end - begin);
}

Array attach_argument(const Client& client, std::uint64_t id) {
  return need(client.attach_id(id));
}

namespace {

// A task that takes longer than the lease of its slot has lost it, and may take for ever: a timer kills this
// process, whatever it is at, stopped (SIGSTOP) included.
class LeaseTimer {
 public:
  explicit LeaseTimer(Milliseconds limit) {
    if (limit.count() <= 0) return;
    sigevent event{};
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGKILL;
    is_armed_ = ::timer_create(CLOCK_MONOTONIC, &event, &timer_) == 0;
    if (!is_armed_) return;
    itimerspec end{};
    const auto seconds = std::chrono::floor<std::chrono::seconds>(limit);
    end.it_value.tv_sec = seconds.count();
    end.it_value.tv_nsec = std::chrono::nanoseconds(limit - seconds).count();
    ::timer_settime(timer_, 0, &end, nullptr);
  }
  LeaseTimer(const LeaseTimer&) = delete;
  LeaseTimer& operator=(const LeaseTimer&) = delete;
  ~LeaseTimer() {
    if (is_armed_) ::timer_delete(timer_);
  }

 private:
  timer_t timer_{};
  bool is_armed_ = false;
};

// Another worker will try, in a while.
void give_up(const Error& error) {
  fmt::print(stderr, "pool worker {} ends: {}\n", ::getpid(), error.message);
}

}  // namespace

void work_for_pool(const std::string& socket, const std::string& daemon_user, const std::string& queue,
                   const std::vector<TaskCode>& tasks, const std::function<void()>& say_robbed) {
  const auto client = Client::connect({.socket = socket,
                                       .command = "pool worker",
                                       .reconnect = kReconnect,
                                       .wait = kReconnect,
                                       .daemon_user = daemon_user});
  if (!client) return give_up(client.error());
  for (;;) {
    auto set = client->open_queued(queue);
    if (!set) return give_up(set.error());
    const auto job = open_job(*client, *set, tasks);
    const auto done = set->work(
        [&](Slot& slot) -> Result<void> {
          if (!job) return error_of(job);
          auto ok = [&] {
            const LeaseTimer timer(set->lease_limit());
            return job->run(slot);
          }();
          // Such a task took more from this process than can be known: another worker begins afresh.
          if (ClientAccess::was_robbed(*client)) {
            say_robbed();
            ::_exit(kRobbed);
          }
          return ok;
        },
        {.retry = Retry::never, .wait = Milliseconds(0)});
    if (done) continue;
    // The set may have ended meanwhile, with its job or with the daemon.
    const Errc code = done.error().code;
    if (code != Errc::cancelled && code != Errc::not_found && code != Errc::disconnected)
      return give_up(done.error());
  }
}

}  // namespace detail

int serve_pool(std::initializer_list<detail::TaskCode> tasks) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const char* socket = std::getenv("COWMGR_SOCKET");
  const char* queue = std::getenv(detail::kQueueVariable);
  if (socket == nullptr || queue == nullptr) {
    fmt::print(
        stderr,
        "this program is a pool's worker: name it in PoolOptions::program of the program that uses it\n");
    return 2;
  }
  detail::work_for_pool(socket, {}, queue, tasks, [] {
    fmt::print(stderr, "pool worker {} ends: its task closed descriptors that it had not opened\n",
               ::getpid());
  });
  return 0;
}

}  // namespace cowmgr
