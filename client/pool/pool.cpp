#include "cowmgr/pool.hpp"

#include <algorithm>
#include <atomic>
#include <random>
#include <sched.h>
#include <thread>

#include <fmt/format.h>

#include "client/client_access.hpp"
#include "client/fork_guard.hpp"
#include "client/limit.hpp"
#include "client/pool/deadlock.hpp"
#include "client/pool/pool_job.hpp"
#include "client/pool/supervisor.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace detail {
namespace {

constexpr std::uint64_t kChunksEach =
    4;  // for each worker: small enough that none is left with the last one alone
constexpr auto kExplainPatience = std::chrono::seconds(1);  // with the watching process
// How often whoever waits looks whether the pool is still there. A slot that is settled wakes it at once.
constexpr auto kLook = Milliseconds(250);
// A worker that just died may have the output mapped for a moment longer; who has it for this long keeps it.
constexpr auto kSealPatience = std::chrono::seconds(10);
using Clock = std::chrono::steady_clock;

std::uint32_t default_workers() noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int count = ::sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return static_cast<std::uint32_t>(std::max(count - 1, 1));
}

std::string random_name() {
  std::random_device random;
  return fmt::format("pool/{:08x}{:08x}", random(), random());
}

}  // namespace

// ---- The pool ----

class PoolImpl {
 public:
  PoolImpl(Client client, std::string queue, PoolOptions options, std::uint32_t count, Supervisor supervisor)
      : client_(std::move(client)),
        queue_(std::move(queue)),
        options_(std::move(options)),
        count_(count),
        supervisor_(std::move(supervisor)) {}

  [[nodiscard]] const Client& client() const noexcept { return client_; }
  [[nodiscard]] const std::string& queue() const noexcept { return queue_; }
  [[nodiscard]] const PoolOptions& options() const noexcept { return options_; }
  [[nodiscard]] std::uint32_t count() const noexcept { return count_; }
  [[nodiscard]] const Supervisor& supervisor() const noexcept { return supervisor_; }
  [[nodiscard]] std::string next_name() noexcept { return fmt::format("{}/{}", queue_, ++last_job_); }
  void stop() noexcept {
    is_stopped_ = true;
    supervisor_.stop();
  }
  // What became of the last worker that had to be ended, if one was after the first `seen`.
  [[nodiscard]] std::string trouble_after(std::uint64_t seen) const {
    return supervisor_.troubles() > seen ? supervisor_.trouble() : std::string();
  }
  [[nodiscard]] Result<void> check() const {
    if (!is_stopped_ && supervisor_.is_running()) return {};
    return fail(Errc::no_workers, "the pool has ended, and its workers with it; start another");
  }

 private:
  Client client_;
  std::string queue_;
  PoolOptions options_;
  std::uint32_t count_;
  std::atomic<std::uint64_t> last_job_{0};
  std::atomic<bool> is_stopped_{false};
  Supervisor supervisor_;
};

// ---- A job ----

class JobImpl {
 public:
  JobImpl(std::shared_ptr<PoolImpl> pool, ResultSet results, std::optional<Array> arguments, bool is_named)
      : pool_(std::move(pool)),
        results_(std::move(results)),
        arguments_(std::move(arguments)),
        is_named_(is_named),
        troubles_before_(pool_->supervisor().troubles()),
        generation_(fork_generation()) {}
  JobImpl(const JobImpl&) = delete;
  JobImpl& operator=(const JobImpl&) = delete;
  // Ends what runs, and forgets what has ended: its slots' memory goes.
  ~JobImpl() {
    if (generation_ != fork_generation()) return;
    const Parting parting;
    (void)results_.forget();
    if (!results_.is_ragged()) release_output();
  }

  [[nodiscard]] const ResultSet& results() const noexcept { return results_; }
  [[nodiscard]] Error explained(Error error) const {
    auto trouble = pool_->trouble_after(troubles_before_);
    // The daemon sees the end of a worker's connection, and the watching process its lifeline's: whoever is
    // later, the reason is told.
    const auto patience = Clock::now() + kExplainPatience;
    while (trouble.empty() && error.message.ends_with(" went away") && Clock::now() < patience) {
      std::this_thread::sleep_for(Milliseconds(1));
      trouble = pool_->trouble_after(troubles_before_);
    }
    const bool may_be_why = error.code == Errc::slot_failed || error.code == Errc::timed_out;
    if (may_be_why && !trouble.empty()) error.message += "; " + trouble;
    return error;
  }
  // What nobody gave a name is for its handles alone: its memory goes with the last view.
  void release_output() {
    if (is_named_.exchange(true)) return;
    const std::array<std::string, 1> names = {results_.name()};
    (void)pool_->client().evict(names);
  }

  // Calls `ask` with a part of the wait at a time, and looks between two whether there is still a pool to
  // wait for.
  template <class Ask>
  [[nodiscard]] auto wait(Milliseconds wait, const Ask& ask) const -> decltype(ask(wait)) {
    const auto start = Clock::now();
    std::optional<Clock::time_point> refused;
    for (;;) {
      const auto left = wait - std::chrono::floor<Milliseconds>(Clock::now() - start);
      const bool is_last = left <= kLook;
      // Who has time left never asks for 0: that is no wait, and takes as long as the daemon does.
      auto answer = ask(std::clamp(left, std::min(wait, Milliseconds(1)), kLook));
      if (answer || is_last) return answer;
      if (answer.error().code == Errc::still_writable) {
        refused = refused.value_or(Clock::now());
        if (Clock::now() - *refused > kSealPatience) return answer;
      } else if (answer.error().code != Errc::timed_out) {
        return answer;
      }
      if (auto ok = pool_->check(); !ok) return error_of(std::move(ok));
    }
  }

 private:
  std::shared_ptr<PoolImpl> pool_;
  ResultSet results_;
  std::optional<Array> arguments_;  // kept until the job is over
  std::atomic<bool> is_named_;      // or its name was taken away
  std::uint64_t troubles_before_;   // of the pool's workers
  std::uint64_t generation_;
};

namespace {

// Arguments that do not fit into the job go into an array of their own, which lives as long as the job.
Result<std::optional<Array>> put_arguments(const Client& client, const std::string& name, JobText& text) {
  if (text.arguments.size() <= kMaxInlineArguments) return std::optional<Array>();
  const std::string evicted = name + "/arguments";
  auto array = client.put(evicted, {Dtype::of<std::uint8_t>(), {text.arguments.size()}},
                          std::as_bytes(std::span(text.arguments)));
  if (!array) return error_of(std::move(array));
  const std::array<std::string, 1> names = {evicted};
  if (auto gone = client.evict(names); !gone) return error_of(std::move(gone));
  text.arguments_id = array->id();
  text.arguments.clear();
  return std::optional<Array>(*std::move(array));
}

}  // namespace

Result<std::shared_ptr<JobImpl>> submit(const std::shared_ptr<PoolImpl>& pool, const JobRequest& request) {
  if (auto ok = pool->check(); !ok) return error_of(std::move(ok));
  const Client& client = pool->client();
  const std::string name = request.name.empty() ? pool->next_name() : request.name;
  JobText text = text_of(request.task);
  text.input_id = request.input == nullptr ? 0 : request.input->id();
  text.arguments = join_packs(request.arguments);
  auto arguments = put_arguments(client, pool->next_name(), text);
  if (!arguments) return error_of(std::move(arguments));
  const std::string job = pack_one(text);
  ResultsOptions options{
      .attempts = pool->options().attempts, .lease = pool->options().lease, .queue = pool->queue()};
  options.job = std::as_bytes(std::span(job));
  auto set = request.output ? client.create_results(name, *request.output, request.slots, options)
                            : client.create_ragged(name, request.slots, options);
  if (!set) return error_of(std::move(set));
  return std::make_shared<JobImpl>(pool, *std::move(set), *std::move(arguments), !request.name.empty());
}

// ---- JobHandle ----

std::uint64_t JobHandle::size() const noexcept {
  return impl_->results().slots();
}

const ResultSet& JobHandle::results() const noexcept {
  return impl_->results();
}

Result<ResultsInfo> JobHandle::info() const {
  return impl_->results().info();
}

Result<void> JobHandle::wait(Milliseconds wait, const ResultSet::OnProgress& progress) const {
  ResultSet set = impl_->results();
  std::uint64_t seen = 0;
  const auto once = [&](const ResultsInfo& info) {
    if (info.revision != std::exchange(seen, info.revision)) progress(info);
  };
  return explained(impl_->wait(wait, [&](Milliseconds part) {
    return set.wait_settled(part, progress ? ResultSet::OnProgress(once) : ResultSet::OnProgress());
  }));
}

Result<SlotInfo> JobHandle::wait_slot(std::uint64_t index, Milliseconds wait) const {
  if (index >= size())
    return fail(Errc::not_found, fmt::format("there is no slot {}; the job has {}", index, size()));
  return explained(
      impl_->wait(wait, [&](Milliseconds part) { return impl_->results().wait_slot(index, part); }));
}

Result<std::optional<std::uint64_t>> JobHandle::settled_at(std::uint64_t rank, Milliseconds wait) const {
  return explained(
      impl_->wait(wait, [&](Milliseconds part) { return impl_->results().settled_at(rank, part); }));
}

Error JobHandle::explained(Error error) const {
  return impl_->explained(std::move(error));
}

std::vector<SlotInfo> JobHandle::failures() const {
  std::vector<SlotInfo> failed;
  for (std::uint64_t index = 0; index < size(); ++index) {
    if (auto slot = impl_->results().slot(index); slot && slot->state == SlotState::failed)
      failed.push_back(*std::move(slot));
  }
  return failed;
}

Result<void> JobHandle::cancel() const {
  return impl_->results().cancel();
}

// ---- Reading and keeping results ----

Result<std::span<const std::byte>> result_bytes(const ResultSet& set, std::uint64_t index,
                                                std::optional<Array>& array) {
  const auto slot = set.slot(index);
  if (!slot || slot->content != SlotContent::array) return set.value(index);
  auto attached = set.array(index);
  if (!attached) return error_of(std::move(attached));
  array = *std::move(attached);
  return array->bytes();
}

namespace {

// Whether the items lie as in C order: so they do in Fortran order, too, along a single axis.
bool is_as_in_c_order(const ArraySpec& spec) {
  const auto is_long = [](std::uint64_t extent) { return extent != 1; };
  return spec.order == Order::c || std::ranges::count_if(spec.shape, is_long) <= 1 ||
         std::ranges::count(spec.shape, std::uint64_t{0}) > 0;
}

}  // namespace

Result<void> check_rows(const ArrayRows& chunk, const Dtype& items) {
  const ArraySpec& spec = chunk.array.spec();
  if (auto ok = check_dtype(spec.dtype, items); !ok) return ok;
  if (spec.shape.empty()) return fail(Errc::invalid_shape, "a chunk needs a first axis, whose rows it takes");
  if (!is_as_in_c_order(spec)) {
    return fail(Errc::invalid_argument,
                "a chunk needs an array in C order, so that the items of its rows lie together");
  }
  if (chunk.rows.begin <= chunk.rows.end && chunk.rows.end <= spec.shape.front()) return {};
  return fail(Errc::invalid_shape,
              fmt::format("the array {} has {} rows, but none from {} to {}", printable(chunk.array.name()),
                          spec.shape.front(), chunk.rows.begin, chunk.rows.end));
}

Result<void> keep_bytes(Slot& slot, std::string_view bytes) {
  if (bytes.size() <= kMaxValueBytes) return slot.set_value(std::as_bytes(std::span(bytes)));
  if (auto ok = slot.allocate({Dtype::of<std::uint8_t>(), {bytes.size()}}); !ok) return ok;
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(slot.bytes().data()));
  return {};
}

}  // namespace detail

// ---- DenseJob ----

Result<Array> DenseJob::get(Milliseconds wait, const ResultSet::OnProgress& progress) const {
  if (auto ok = this->wait(wait, progress); !ok) return error_of(std::move(ok));
  ResultSet set = impl_->results();
  auto array = set.wait(Milliseconds(0));
  if (array) impl_->release_output();
  return array;
}

// ---- Pool ----

Result<Pool> Pool::start(const Client& client, const PoolOptions& options) {
  const std::uint32_t count = options.workers > 0 ? options.workers : detail::default_workers();
  const std::string queue = detail::random_name();
  const std::string& daemon_user = detail::ClientAccess::daemon_user(client);
  detail::WorkerPlan plan{.body =
                              [&](const auto& say_robbed) {
                                detail::work_for_pool(client.socket(), daemon_user, queue, {}, say_robbed);
                              },
                          .stuck_after = options.stuck_after,
                          .threads = detail::count_threads()};
  if (!options.program.empty()) {
    plan.command = {options.program};
    plan.command.insert(plan.command.end(), options.arguments.begin(), options.arguments.end());
    plan.environment = {"COWMGR_SOCKET=" + client.socket(), "COWMGR_DAEMON_USER=" + daemon_user,
                        fmt::format("{}={}", detail::kQueueVariable, queue)};
  }
  auto supervisor = detail::Supervisor::start(count, plan);
  if (!supervisor) return error_of(std::move(supervisor));
  return Pool(std::make_shared<detail::PoolImpl>(client, queue, options, count, *std::move(supervisor)));
}

Pool::Pool(Pool&&) noexcept = default;
Pool& Pool::operator=(Pool&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}
Pool::~Pool() {
  if (impl_) impl_->stop();
}

std::vector<pid_t> Pool::workers() const {
  return impl_->supervisor().workers();
}
std::uint64_t Pool::restarts() const noexcept {
  return impl_->supervisor().restarts();
}

Result<detail::JobRequest> Pool::map_request(const Array& input, const Dtype& items,
                                             const MapOptions& options) const {
  if (auto ok = detail::check_rows(input, items); !ok) return error_of(std::move(ok));
  const std::uint64_t rows = input.shape().front();
  const std::uint64_t wanted = options.chunks > 0 ? options.chunks : impl_->count() * detail::kChunksEach;
  return detail::JobRequest{.task = {},
                            .input = &input,
                            .slots = std::clamp<std::uint64_t>(wanted, 1, std::max<std::uint64_t>(rows, 1))};
}

Result<void> Pool::add_output(detail::JobRequest& request, const Dtype& items, const MapOptions& options) {
  Shape shape = request.input->shape();
  if (options.row_shape) {
    shape.resize(1);
    shape.insert(shape.end(), options.row_shape->begin(), options.row_shape->end());
  }
  request.output = ArraySpec{items, std::move(shape)};
  request.name = options.name;
  return {};
}

}  // namespace cowmgr
