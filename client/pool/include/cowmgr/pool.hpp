// Worker processes that map a function over the rows of an array, or over sets of arguments.
//
//   const auto pool = or_throw(cowmgr::Pool::start(client));  // as many workers as processors, less one
//   auto doubled = or_throw(pool.map(input, [](std::span<const double> x, std::span<double> out) { ... }));
//   auto sums = or_throw(pool.map(input, [](std::span<const double> x) { return std::accumulate(...); }));
//   auto power = or_throw(pool.apply([](double base, int n) { return std::pow(base, n); }, 2.0, 10));
//
// A task is a plain function, or a lambda without captures: what it needs besides its chunk are arguments,
// since a worker is another process. It may return a value, Result<...>, or nothing; an error that it
// returns, or an exception that it throws, fails its slot, and the others go on.
//
//   first parameter    std::span<const T> or const Chunk<T>&: map() calls it with the rows of each chunk;
//                      apply() and starmap() take an Array first, or rows of it: ArrayRows(array, {10, 20})
//                      anything else: apply() and starmap() call it with arguments alone
//   next parameter     std::span<U>: the rows of the output, to be filled in place; the results are one array
//                      Slot&: it fills its slot itself, with an array of the size that it now knows
//                      else: the returned value is the slot's result
//   all others         arguments: what cereal serialises, and const Array&, which is mapped and never copied
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cowmgr/client.hpp"
#include "cowmgr/pool_task.hpp"

namespace cowmgr {

struct PoolOptions {
  std::uint32_t workers =
      0;  // processes. 0: as many as processors that this one may use, less one, at least one
  std::uint32_t attempts = 3;  // a slot whose worker died so often has failed; 0: no limit
  // A worker that takes longer for a slot loses it, and is ended: the cure for tasks that may hang, in an
  // endless loop say, or stopped (SIGSTOP). Default: no limit
  Milliseconds lease{0};
  // A worker whose threads have all waited for each other for so long is ended: none of them will ever go on.
  // 0: it stays.
  Milliseconds stuck_after{3000};
  // Workers run this program, which calls serve_pool(), with `arguments`. Empty: they are forks of this one.
  std::string program{};
  std::vector<std::string> arguments{};
};

struct MapOptions {
  std::uint64_t chunks = 0;  // rows are split as numpy.array_split does. 0: four for each worker
  std::optional<Shape>
      row_shape{};     // of the output array: {} for one item a row. Default: as the input's rows
  std::string name{};  // the output array stays under this name. Empty: it goes with its last view
};

namespace detail {
class PoolImpl;
class JobImpl;

template <class T, class... Args>
inline constexpr bool kBeginsWith = false;
template <class T, class First, class... Rest>
inline constexpr bool kBeginsWith<T, First, Rest...> = std::is_same_v<T, First>;

// A job as the pool's core takes it, whatever the types.
struct JobRequest {
  TaskCode task;
  const Array* input = nullptr;  // whose rows are split; or none
  std::uint64_t slots = 1;
  std::optional<ArraySpec> output{};     // of a dense job
  std::vector<std::string> arguments{};  // packed: one for all slots, or one for each
  std::string name{};                    // of the output array
};

// What both kinds of jobs can do. A handle; copies are handles to the same job.
class JobHandle {
 public:
  // How many slots: chunks of map(), or argument sets.
  [[nodiscard]] std::uint64_t size() const noexcept;
  // State and counts now.
  [[nodiscard]] Result<ResultsInfo> info() const;
  // Waits until every slot is settled; `progress` as ResultSet::wait_settled(). Errors: timed_out;
  // slot_failed with the first slot that failed, and why; cancelled; no_workers when the pool has ended. When
  // a worker was ended since the job began (see Pool), slot_failed and timed_out say of the last why.
  [[nodiscard]] Result<void> wait(Milliseconds wait = kForever,
                                  const ResultSet::OnProgress& progress = {}) const;
  // Slots that have failed so far, with the message of the exception or how the worker died, in order.
  [[nodiscard]] std::vector<SlotInfo> failures() const;
  // Takes the job back: its workers learn it when they end their slots. What it held is freed.
  [[nodiscard]] Result<void> cancel() const;
  // The slots themselves; see ResultSet for what can be read in place.
  [[nodiscard]] const ResultSet& results() const noexcept;

 protected:
  explicit JobHandle(std::shared_ptr<JobImpl> impl) noexcept : impl_(std::move(impl)) {}
  [[nodiscard]] Result<SlotInfo> wait_slot(std::uint64_t index, Milliseconds wait) const;
  [[nodiscard]] Result<std::optional<std::uint64_t>> settled_at(std::uint64_t rank, Milliseconds wait) const;
  // The same, with what became of the pool's workers, where that may be the reason.
  template <class T>
  [[nodiscard]] Result<T> explained(Result<T> result) const {
    if (!result) result = tl::unexpected(explained(std::move(result).error()));
    return result;
  }
  [[nodiscard]] Error explained(Error error) const;

  std::shared_ptr<JobImpl> impl_;
};

[[nodiscard]] Result<std::shared_ptr<JobImpl>> submit(const std::shared_ptr<PoolImpl>& pool,
                                                      const JobRequest& request);
}  // namespace detail

// A job whose results are gathered in place into one array. When the last handle goes, a job that runs is
// cancelled.
class DenseJob : public detail::JobHandle {
 public:
  // Waits as wait() does, and returns the array, its rows in the order of the input's.
  [[nodiscard]] Result<Array> get(Milliseconds wait = kForever,
                                  const ResultSet::OnProgress& progress = {}) const;

 private:
  friend class Pool;
  using JobHandle::JobHandle;
};

// A job with a result of type R in each slot: what the task returned, or, of one that fills its slot, an
// Array. When the last handle goes, a job that runs is cancelled, and its results are freed.
template <class R>
class Job : public detail::JobHandle {
 public:
  // All results, in order: std::vector<R>, or nothing for tasks that return nothing. Errors: as wait().
  [[nodiscard]] Result<detail::AllOf<R>> get(Milliseconds wait = kForever) const {
    if (auto ok = this->wait(wait); !ok) return error_of(std::move(ok));
    return detail::read_all<R>(results());
  }

  // The result of one slot; waits until it is there. Errors: as wait(), of this slot alone.
  [[nodiscard]] Result<R> get_one(std::uint64_t index, Milliseconds wait = kForever) const {
    if (auto slot = wait_slot(index, wait); !slot) return error_of(std::move(slot));
    return explained(detail::read_result<R>(results(), index));
  }

  struct Completed {
    std::uint64_t index = 0;
    Result<R> result;
  };
  // The slot that completed as the `rank`th, from 0, and what became of it; waits until it is there. Empty
  // when `rank` is size(), or the job was cancelled before.
  [[nodiscard]] Result<std::optional<Completed>> completed(std::uint64_t rank,
                                                           Milliseconds wait = kForever) const {
    const auto index = settled_at(rank, wait);
    if (!index) return error_of(index);
    if (!*index) return std::optional<Completed>();
    return Completed{**index, explained(detail::read_result<R>(results(), **index))};
  }

 private:
  friend class Pool;
  using JobHandle::JobHandle;
};

// A process that watches, and the workers that it starts, and starts again when they die. They end with this
// object, or when the process that started them ends, however it ends. Move-only; all calls are thread-safe.
//
// The workers are forked in start(): what the program sets up later, they do not see. Start the pool early,
// as fork(2) asks of programs with threads: a fork has one thread, and a library that had started others
// (OpenMP, a BLAS, a thread pool) waits for them for ever. Where that cannot be helped, let the workers be
// another program (PoolOptions::program). Ctrl-C does not reach them: what the program makes of it counts.
// Their standard input is empty.
//
// A worker that neither works nor ends is ended, and its slot comes back as if it had died: one whose task
// closed descriptors that it had not opened, or became another program (exec); one whose threads all wait for
// each other; with a lease limit, one that takes longer. Of the first two, standard error says so, and so do
// the errors of the jobs.
class Pool {
 public:
  // Starts the workers, which connect to the daemon of `client`. Errors: not_found for a program that is not
  // there, os_failure.
  [[nodiscard]] static Result<Pool> start(const Client& client, const PoolOptions& options = {});

  Pool(Pool&&) noexcept;
  Pool& operator=(Pool&&) noexcept;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();

  // Process ids now. One of a worker that is being started again is left out.
  [[nodiscard]] std::vector<pid_t> workers() const;
  // How many workers were started in the place of others.
  [[nodiscard]] std::uint64_t restarts() const noexcept;

  // Calls `task` with the rows of each chunk of `input`, and waits for all. Returns an Array for tasks that
  // fill rows of the output, else std::vector<R>. `args` follow the options, if there are any. Errors: as
  // Job::get(); invalid_dtype when the input holds other items than the task takes; invalid_shape without a
  // first axis; invalid_argument when its rows do not lie together (Fortran order, with more than one axis
  // longer than 1); and as Client::create_results().
  template <class F, class... Args>
  [[nodiscard]] auto map(const Array& input, const F& task, const MapOptions& options,
                         const Args&... args) const {
    auto job = map_async(input, task, options, args...);
    if (!job) return decltype(job->get())(error_of(std::move(job)));
    return job->get();
  }
  template <class F, class... Args>
    requires(!detail::kBeginsWith<MapOptions, Args...>)
  [[nodiscard]] auto map(const Array& input, const F& task, const Args&... args) const {
    return map(input, task, MapOptions(), args...);
  }

  // The same, without waiting: a Result<DenseJob> or Result<Job<R>>. Read it as imap does, in order with
  // get_one(), or as slots complete with completed().
  template <class F, class... Args>
  [[nodiscard]] auto map_async(const Array& input, const F& task, const MapOptions& options,
                               const Args&... args) const {
    using Task = typename detail::TaskOf<F>::Type;
    static_assert(Task::kMaps, "map() wants a task whose first parameter is std::span<const T> or Chunk<T>");
    using Handle = HandleOf<Task>;
    auto request = map_request(input, Dtype::of<typename Task::template At<0>::Item>(), options);
    if (!request) return Result<Handle>(error_of(std::move(request)));
    request->task = detail::TaskOf<F>::code(task);
    if constexpr (Task::kIsDense) {
      if (auto ok = add_output(*request, Dtype::of<typename Task::template At<1>::Item>(), options); !ok)
        return Result<Handle>(error_of(std::move(ok)));
    }
    request->arguments.push_back(Task::pack(args...));
    return submit<Handle>(*request);
  }
  template <class F, class... Args>
    requires(!detail::kBeginsWith<MapOptions, Args...>)
  [[nodiscard]] auto map_async(const Array& input, const F& task, const Args&... args) const {
    return map_async(input, task, MapOptions(), args...);
  }

  // Calls `task` once, with `args`, and waits for what it returns. The first of them is an Array, or
  // ArrayRows, for a task that takes a chunk. Errors: as Job::get_one(), and as map().
  template <class F, class... Args>
  [[nodiscard]] auto apply(const F& task, const Args&... args) const {
    using R = typename detail::TaskOf<F>::Type::Value;
    auto job = apply_async(task, args...);
    if (!job) return Result<R>(error_of(std::move(job)));
    return job->get_one(0);
  }
  template <class F, class... Args>
  [[nodiscard]] auto apply_async(const F& task, const Args&... args) const {
    return run_each(task, packed<F>(std::array{std::tuple<const Args&...>(args...)}));
  }

  // Calls `task` with each set of arguments: a vector of tuples, or braces, {{1, 2}, {3, 4}}. Returns
  // std::vector<R>, in their order.
  template <class F, class... Args>
  [[nodiscard]] auto starmap(const F& task, const std::vector<std::tuple<Args...>>& sets) const {
    return starmap_of(task, sets);
  }
  template <class F>
  [[nodiscard]] auto starmap(const F& task,
                             std::initializer_list<typename detail::TaskOf<F>::Type::Set> sets) const {
    return starmap_of(task, sets);
  }
  // The same, without waiting. Errors: invalid_argument for no sets at all.
  template <class F, class... Args>
  [[nodiscard]] auto starmap_async(const F& task, const std::vector<std::tuple<Args...>>& sets) const {
    return run_each(task, packed<F>(sets));
  }
  template <class F>
  [[nodiscard]] auto starmap_async(const F& task,
                                   std::initializer_list<typename detail::TaskOf<F>::Type::Set> sets) const {
    return run_each(task, packed<F>(sets));
  }

 private:
  template <class Task>
  using HandleOf = std::conditional_t<Task::kIsDense, DenseJob, Job<typename Task::Value>>;
  explicit Pool(std::shared_ptr<detail::PoolImpl> impl) noexcept : impl_(std::move(impl)) {}
  [[nodiscard]] Result<detail::JobRequest> map_request(const Array& input, const Dtype& items,
                                                       const MapOptions& options) const;
  [[nodiscard]] static Result<void> add_output(detail::JobRequest& request, const Dtype& items,
                                               const MapOptions& options);
  template <class Handle>
  [[nodiscard]] Result<Handle> submit(const detail::JobRequest& request) const {
    auto job = detail::submit(impl_, request);
    if (!job) return error_of(std::move(job));
    return Handle(*std::move(job));
  }
  template <class F, class Sets>
  [[nodiscard]] static std::vector<Result<std::string>> packed(const Sets& sets) {
    std::vector<Result<std::string>> packed;
    packed.reserve(sets.size());
    for (const auto& set : sets) {
      packed.push_back(
          std::apply([](const auto&... args) { return detail::TaskOf<F>::Type::pack_set(args...); }, set));
    }
    return packed;
  }
  template <class F, class Sets>
  [[nodiscard]] auto starmap_of(const F& task, const Sets& sets) const {
    using All = detail::AllOf<typename detail::TaskOf<F>::Type::Value>;
    if (sets.size() == 0) return Result<All>();
    auto job = run_each(task, packed<F>(sets));
    if (!job) return Result<All>(error_of(std::move(job)));
    return job->get();
  }
  template <class F>
  [[nodiscard]] auto run_each(const F& task, std::vector<Result<std::string>> packed) const
      -> Result<Job<typename detail::TaskOf<F>::Type::Value>> {
    detail::JobRequest request{.task = detail::TaskOf<F>::code(task), .slots = packed.size()};
    for (auto& one : packed) {
      if (!one) return error_of(std::move(one));
      request.arguments.push_back(*std::move(one));
    }
    return submit<Job<typename detail::TaskOf<F>::Type::Value>>(request);
  }

  std::shared_ptr<detail::PoolImpl> impl_;
};

// For the main() of a program that a pool starts as its workers: does the pool's work until the pool ends.
// The tasks are those that the pool's owner names (NamedTask). Returns an exit status. Errors are told on
// standard error.
[[nodiscard]] int serve_pool(std::initializer_list<detail::TaskCode> tasks);

}  // namespace cowmgr
