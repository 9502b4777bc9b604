// What a function must look like to be a task of a Pool, and how its arguments and results are packed. See
// pool.hpp for how to use it.
#pragma once

#include <cereal/archives/binary.hpp>
#include <cereal/types/array.hpp>
#include <cereal/types/map.hpp>
#include <cereal/types/optional.hpp>
#include <cereal/types/string.hpp>
#include <cereal/types/tuple.hpp>
#include <cereal/types/utility.hpp>
#include <cereal/types/vector.hpp>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <numeric>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <boost/interprocess/streams/bufferstream.hpp>

#include "cowmgr/client.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr {

// A part of an array along its first axis.
template <Scalar T>
struct Chunk {
  std::span<const T> items;     // in C order
  Rows rows;                    // that the items are, of the whole array
  std::uint64_t row_items = 1;  // in each row
};

// Rows of an array: what apply() and starmap() are given for a task that takes a chunk. An Array stands for
// all of its rows. Borrows the array.
struct ArrayRows {
  const Array& array;
  Rows rows;

  // NOLINTNEXTLINE(google-explicit-constructor): an Array may stand where rows are wanted
  ArrayRows(const Array& all) : array(all), rows{0, all.shape().empty() ? 0 : all.shape().front()} {}
  ArrayRows(const Array& whole, const Rows& part) : array(whole), rows(part) {}
};

namespace detail {

// Errors: invalid_dtype when the array does not hold such items; invalid_shape without a first axis, or with
// fewer rows; invalid_argument when the items of its rows do not lie together in C order.
[[nodiscard]] Result<void> check_rows(const ArrayRows& chunk, const Dtype& items);

// ---- What a worker calls ----

struct WorkerCall {
  const Client& client;
  Slot& slot;
  const Array* input;  // that the chunk is of; or null, and the arguments tell, if the task takes one
  Rows rows;           // that the chunk is
  std::span<const std::byte> arguments;
  void (*function)();  // the task, as TaskCode has it
};
using Thunk = Result<void> (*)(const WorkerCall&);

// A task as it crosses to a worker. A fork has the same functions at the same addresses; another program
// knows tasks by their names.
struct TaskCode {
  std::string name{};  // empty: `thunk` and `function` are this program's own
  Thunk thunk = nullptr;
  void (*function)() = nullptr;
};

// ---- Packing ----

// The view of an array in another process: by its id. Throws std::runtime_error when it cannot be had.
[[nodiscard]] Array attach_argument(const Client& client, std::uint64_t id);

template <class T>
struct Packing {
  static void save(cereal::BinaryOutputArchive& to, const T& value) { to(value); }
  static T load(cereal::BinaryInputArchive& from, const Client& /*client*/) {
    T value{};
    from(value);
    return value;
  }
};
template <>
struct Packing<Array> {
  static void save(cereal::BinaryOutputArchive& to, const Array& array) { to(array.id()); }
  static Array load(cereal::BinaryInputArchive& from, const Client& client) {
    std::uint64_t id = 0;
    from(id);
    return attach_argument(client, id);
  }
};

template <>
struct Packing<ArrayRows> {
  static void save(cereal::BinaryOutputArchive& to, const ArrayRows& chunk) {
    to(chunk.array.id(), chunk.rows.begin, chunk.rows.end);
  }
};

template <class T>
[[nodiscard]] std::string pack_one(const T& value) {
  std::ostringstream out;
  cereal::BinaryOutputArchive archive(out);
  Packing<T>::save(archive, value);
  return std::move(out).str();
}

[[nodiscard]] inline boost::interprocess::ibufferstream stream_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The bytes of a slot's result, wherever they lie. `array` keeps them alive if they lie in an array.
[[nodiscard]] Result<std::span<const std::byte>> result_bytes(const ResultSet& set, std::uint64_t index,
                                                              std::optional<Array>& array);
// As a value, or, when it is long, as an array of bytes.
[[nodiscard]] Result<void> keep_bytes(Slot& slot, std::string_view bytes);

// What the worker returned for slot `index`, which is settled.
template <class R>
[[nodiscard]] Result<R> read_result(const ResultSet& set, std::uint64_t index) {
  if constexpr (std::is_same_v<R, Array>) {
    return set.array(index);
  } else {
    std::optional<Array> array;
    const auto bytes = result_bytes(set, index, array);
    if (!bytes) return error_of(bytes);
    if constexpr (std::is_void_v<R>) {
      return {};
    } else {
      try {
        auto stream = stream_of(*bytes);
        cereal::BinaryInputArchive archive(stream);
        R value{};
        archive(value);
        return value;
      } catch (const std::exception& error) {
        return fail(Errc::corrupted,
                    std::string("the result is not of the type that is asked for: ") + error.what());
      }
    }
  }
}

template <class R>
struct AllOfImpl {
  using Type = std::vector<R>;
};
template <>
struct AllOfImpl<void> {
  using Type = void;
};
template <class R>
using AllOf = typename AllOfImpl<R>::Type;

// Those of all slots, in order; arrays 64 in a round trip, values in none.
template <class R>
[[nodiscard]] Result<AllOf<R>> read_all(const ResultSet& set) {
  if constexpr (std::is_void_v<R>) {
    return {};
  } else if constexpr (std::is_same_v<R, Array>) {
    std::vector<std::uint64_t> indexes(set.slots());
    std::iota(indexes.begin(), indexes.end(), std::uint64_t{0});
    return set.arrays(indexes);
  } else {
    std::vector<R> all;
    all.reserve(set.slots());
    for (std::uint64_t index = 0; index < set.slots(); ++index) {
      auto one = read_result<R>(set, index);
      if (!one) return error_of(std::move(one));
      all.push_back(*std::move(one));
    }
    return all;
  }
}

// ---- What kind of task a signature makes ----

// Throws what a task cannot go on without; its slot fails with that.
template <class T>
[[nodiscard]] T need(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().message);
  return *std::move(result);
}

template <Scalar T>
[[nodiscard]] Chunk<T> chunk_of(const WorkerCall& call) {
  const auto items = need(call.input->as<T>());
  const std::uint64_t rows = call.input->shape().front();
  const std::uint64_t row_items = rows == 0 ? 1 : items.size() / rows;
  return {items.subspan(call.rows.begin * row_items, call.rows.count() * row_items), call.rows, row_items};
}

// Parameters that the pool itself fills; all others are arguments.
enum class Leading : std::uint8_t { none, chunk, output, slot };

template <class P>
struct LeadingParameter {
  static constexpr Leading kKind = Leading::none;
};
template <class T>
struct LeadingParameter<std::span<const T>> {
  static constexpr Leading kKind = Leading::chunk;
  using Item = T;
  static std::span<const T> make(const WorkerCall& call) { return chunk_of<T>(call).items; }
};
template <class T>
struct LeadingParameter<Chunk<T>> {
  static constexpr Leading kKind = Leading::chunk;
  using Item = T;
  static Chunk<T> make(const WorkerCall& call) { return chunk_of<T>(call); }
};
template <class U>
  requires(!std::is_const_v<U>)
struct LeadingParameter<std::span<U>> {
  static constexpr Leading kKind = Leading::output;
  using Item = U;
  static std::span<U> make(const WorkerCall& call) { return need(call.slot.as<U>()); }
};
template <>
struct LeadingParameter<Slot> {
  static constexpr Leading kKind = Leading::slot;
  static Slot& make(const WorkerCall& call) { return call.slot; }
};

template <class R>
struct Returned {
  using Value = R;
};
template <class T>
struct Returned<Result<T>> {
  using Value = T;
};

// Calls `function` and keeps what it returns as the slot's result, unless it fills the slot itself.
template <bool FillsSlot, class Function>
[[nodiscard]] Result<void> call_and_keep(Slot& slot, const Function& function) {
  using R = std::invoke_result_t<Function>;
  constexpr bool kIsResult = !std::is_same_v<R, typename Returned<R>::Value>;
  if constexpr (std::is_void_v<R>) {
    function();
    return {};
  } else if constexpr (std::is_same_v<R, Result<void>>) {
    return function();
  } else {
    static_assert(!FillsSlot,
                  "a task that fills its slot or rows of the output returns nothing, or Result<void>");
    if constexpr (kIsResult) {
      auto result = function();
      if (!result) return error_of(std::move(result));
      return keep_bytes(slot, pack_one(*result));
    } else {
      return keep_bytes(slot, pack_one(function()));
    }
  }
}

template <class T, class Given>
void pack_as(cereal::BinaryOutputArchive& archive, const Given& given) {
  if constexpr (std::is_same_v<T, Given>)
    Packing<T>::save(archive, given);
  else
    Packing<T>::save(archive, T(given));
}

// How one argument stands in a set of them, which braces make: arrays cannot be copied there.
template <class P>
struct InSet {
  using Type = P;
};
template <>
struct InSet<Array> {
  using Type = const Array&;
};

// The I-th parameter, or void beyond the last.
template <std::size_t I, class... P>
struct ParameterAt {
  using Type = void;
};
template <class First, class... Rest>
struct ParameterAt<0, First, Rest...> {
  using Type = std::decay_t<First>;
};
template <std::size_t I, class First, class... Rest>
  requires(I > 0)
struct ParameterAt<I, First, Rest...> : ParameterAt<I - 1, Rest...> {};

template <class R, class... P>
struct Signature {
  template <std::size_t I>
  using At = LeadingParameter<typename ParameterAt<I, P...>::Type>;

  static constexpr bool kMaps = At<0>::kKind == Leading::chunk;
  static constexpr Leading kTarget = At < kMaps ? 1 : 0 > ::kKind;
  static constexpr bool kIsDense = kTarget == Leading::output;
  static constexpr bool kFillsSlot = kIsDense || kTarget == Leading::slot;
  static constexpr std::size_t kLeading = (kMaps ? 1U : 0U) + (kFillsSlot ? 1U : 0U);
  static constexpr std::size_t kArguments = sizeof...(P) - kLeading;
  static_assert(kMaps || !kIsDense, "a task that fills rows of the output takes a chunk of the input first");

  // What apply() takes, and starmap() for each call: the arguments, and before them the chunk of a task that
  // takes one.
  template <std::size_t... I>
  static auto set_of(std::index_sequence<I...> /*arguments*/)
      -> std::tuple<typename InSet<typename ParameterAt<kLeading + I, P...>::Type>::Type...>;
  using Arguments = decltype(set_of(std::make_index_sequence<kArguments>()));
  using Set =
      decltype(std::tuple_cat(std::declval<std::conditional_t<kMaps, std::tuple<ArrayRows>, std::tuple<>>>(),
                              std::declval<Arguments>()));

  // Of a slot: what the task returns, or the array that it puts there.
  using Value = std::conditional_t<kTarget == Leading::slot, Array, typename Returned<R>::Value>;
  using Function = R (*)(P...);

  template <class... Given>
  [[nodiscard]] static std::string pack(const Given&... given) {
    static_assert(sizeof...(Given) == kArguments, "the task takes another number of arguments");
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
      std::ostringstream out;
      [[maybe_unused]] cereal::BinaryOutputArchive archive(out);
      (pack_as<typename ParameterAt<kLeading + I, P...>::Type>(archive, given), ...);
      return std::move(out).str();
    }(std::make_index_sequence<kArguments>());
  }

  // The same for apply() and starmap(): `chunk` before the arguments, for a task that takes one. Errors: as
  // check_rows().
  template <class... Given>
  [[nodiscard]] static Result<std::string> pack_set(const Given&... given) {
    static_assert(!kIsDense, "a task that fills rows of the output is for map()");
    if constexpr (kMaps)
      return pack_chunk(given...);
    else
      return pack(given...);
  }

  [[nodiscard]] static Result<void> run(const WorkerCall& call) {
    return run(call, std::make_index_sequence<kLeading>(), std::make_index_sequence<kArguments>());
  }

 private:
  template <class... Given>
  static Result<std::string> pack_chunk(const ArrayRows& chunk, const Given&... given) {
    if (auto ok = check_rows(chunk, Dtype::of<typename At<0>::Item>()); !ok) return error_of(std::move(ok));
    return pack_one(chunk) + pack(given...);
  }

  // The chunk that pack_set() put before the arguments; its array is kept in `array`.
  static WorkerCall with_chunk(WorkerCall call, cereal::BinaryInputArchive& archive,
                               std::optional<Array>& array) {
    array = Packing<Array>::load(archive, call.client);
    call.input = &*array;
    archive(call.rows.begin, call.rows.end);
    return call;
  }

  template <std::size_t... L, std::size_t... I>
  static Result<void> run(const WorkerCall& call, std::index_sequence<L...> /*leading*/,
                          std::index_sequence<I...> /*arguments*/) {
    const auto function = reinterpret_cast<Function>(call.function);
    auto stream = stream_of(call.arguments);
    [[maybe_unused]] cereal::BinaryInputArchive archive(stream);
    std::optional<Array> array;
    const bool has_chunk = kMaps && call.input == nullptr;
    const WorkerCall mine = has_chunk ? with_chunk(call, archive, array) : call;
    // Braces: from left to right.
    [[maybe_unused]] std::tuple<typename ParameterAt<kLeading + I, P...>::Type...> arguments{
        Packing<typename ParameterAt<kLeading + I, P...>::Type>::load(archive, call.client)...};
    return call_and_keep<kFillsSlot>(call.slot, [&]() -> R {
      return function(
          At<L>::make(mine)...,
          static_cast<std::tuple_element_t<kLeading + I, std::tuple<P...>>&&>(std::get<I>(arguments))...);
    });
  }
};

template <class F>
struct SignatureOf;
template <class R, class... P>
struct SignatureOf<R (*)(P...)> {
  using Type = Signature<R, P...>;
};
template <class R, class... P>
struct SignatureOf<R (*)(P...) noexcept> {
  using Type = Signature<R, P...>;
};

// Functions, and lambdas without captures.
template <class F>
concept PlainFunction = requires(const F& function) { typename SignatureOf<decltype(+function)>::Type; };

template <class F>
struct TaskOf {
  static_assert(
      PlainFunction<F>,
      "a task is a function, or a lambda without captures: a worker is another process, and what the task "
      "needs goes there as arguments");
  using Type = typename SignatureOf<decltype(+std::declval<const F&>())>::Type;
  static TaskCode code(const F& function) {
    return {{}, &Type::run, reinterpret_cast<void (*)()>(static_cast<typename Type::Function>(+function))};
  }
};

}  // namespace detail

// A task that workers of another program know by name: NamedTask<double(double, int)> kPower{"power"}. The
// pool's owner passes it where a function would stand; the worker says what it is:
// serve_pool({kPower.is(power)}).
template <class S>
class NamedTask;
template <class R, class... P>
class NamedTask<R(P...)> {
 public:
  constexpr explicit NamedTask(const char* name) noexcept : name_(name) {}
  [[nodiscard]] constexpr const char* name() const noexcept { return name_; }
  [[nodiscard]] detail::TaskCode is(R (*function)(P...)) const {
    return {name_, &detail::Signature<R, P...>::run, reinterpret_cast<void (*)()>(function)};
  }

 private:
  const char* name_;
};

namespace detail {

template <class R, class... P>
struct TaskOf<NamedTask<R(P...)>> {
  using Type = Signature<R, P...>;
  static TaskCode code(const NamedTask<R(P...)>& task) { return {task.name(), nullptr, nullptr}; }
};

}  // namespace detail
}  // namespace cowmgr
