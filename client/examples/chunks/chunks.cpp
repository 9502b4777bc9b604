// chunks: the smallest whole use of a pool. One array of 3e7 int64 rows (240 MB), split into chunks that
// several worker processes take: once with a tiny result for each chunk, its sum, and once with a result as
// large as the chunk, its rows doubled, which the workers write where they will be read. Both are checked for
// exactness.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "cowmgr/cowmgr.hpp"
#include "cowmgr/pool.hpp"

namespace cowmgr::chunks {
namespace {

using Item = std::int64_t;
using Clock = std::chrono::steady_clock;

struct Options {
  std::uint64_t rows = 30'000'000;
  std::uint64_t chunks = 0;   // 0: four for each worker
  std::uint32_t workers = 0;  // 0: processors less one
};

// ---- What the workers do: plain functions, on the rows of one chunk ----

Item sum(std::span<const Item> in) {
  return std::accumulate(in.begin(), in.end(), Item{0});
}

void twice(std::span<const Item> in, std::span<Item> out) {
  std::transform(in.begin(), in.end(), out.begin(), [](Item item) { return 2 * item; });
}

// ---- What the program does ----

// The rows are filled where they will be read: nothing is copied.
Result<Array> make_input(const Client& client, std::uint64_t rows) {
  auto writer = client.create("input", {Dtype::of<Item>(), {rows}});
  if (!writer) return error_of(std::move(writer));
  const auto items = writer->as<Item>();
  if (!items) return error_of(items);
  std::iota(items->begin(), items->end(), Item{1});
  return writer->seal();
}

// 1 + 2 + ... + rows.
Item expected_sum(std::uint64_t rows) {
  const auto last = static_cast<Item>(rows);
  return last % 2 == 0 ? last / 2 * (last + 1) : (last + 1) / 2 * last;
}

Result<void> add_up(const Pool& pool, const Array& input, const MapOptions& options) {
  const auto start = Clock::now();
  const auto sums = pool.map(input, sum, options);
  if (!sums) return error_of(sums);
  const std::chrono::duration<double, std::milli> took = Clock::now() - start;
  const Item total = std::accumulate(sums->begin(), sums->end(), Item{0});
  const Item expected = expected_sum(input.shape().front());
  if (total != expected) return fail(Errc::corrupted, fmt::format("the sum is {}, not {}", total, expected));
  fmt::print("sum of {} chunks: {}, exact, in {:.1f} ms\n", sums->size(), total, took.count());
  return {};
}

Result<void> double_all(const Pool& pool, const Array& input, const MapOptions& options) {
  const auto start = Clock::now();
  const auto doubled = pool.map(input, twice, options);
  if (!doubled) return error_of(doubled);
  const std::chrono::duration<double, std::milli> took = Clock::now() - start;
  const auto in = input.as<Item>();
  const auto out = doubled->as<Item>();
  if (!in || !out) return fail(Errc::corrupted, "the output has another dtype");
  const auto is_twice = [](Item before, Item after) { return after == 2 * before; };
  if (!std::equal(in->begin(), in->end(), out->begin(), out->end(), is_twice))
    return fail(Errc::corrupted, "the output is not twice the input");
  fmt::print("x * 2 of {} rows: exact, in {:.1f} ms, in place\n", out->size(), took.count());
  return {};
}

Result<void> run(const Options& options) {
  const auto daemon = EmbeddedDaemon::start();
  if (!daemon) return error_of(daemon);
  const auto client = daemon->connect();
  if (!client) return error_of(client);
  const auto pool = Pool::start(*client, {.workers = options.workers});
  if (!pool) return error_of(pool);
  const auto input = make_input(*client, options.rows);
  if (!input) return error_of(input);
  fmt::print("{} rows of int64, {:.1f} MB; {} worker process(es)\n", options.rows,
             static_cast<double>(input->bytes().size()) / 1e6, pool->workers().size());
  const MapOptions map_options{.chunks = options.chunks};
  if (auto ok = add_up(*pool, *input, map_options); !ok) return ok;
  return double_all(*pool, *input, map_options);
}

}  // namespace
}  // namespace cowmgr::chunks

int main(int argc, char** argv) {
  CLI::App app("Sums, and doubles, one large array with worker processes that share it; checks both.",
               "chunks");
  cowmgr::chunks::Options options;
  app.add_option("--rows", options.rows, "Of the array, 8 bytes each")
      ->check(CLI::Range(std::uint64_t{0}, std::uint64_t{1} << 32U))
      ->capture_default_str();
  app.add_option("--chunks", options.chunks, "To split the rows into; 0: four for each worker")
      ->capture_default_str();
  app.add_option("--workers", options.workers, "Processes; 0: as many as processors, less one")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (const auto done = cowmgr::chunks::run(options); !done) {
    fmt::print(stderr, "chunks: {}\n", done.error().message);
    return 1;
  }
  return 0;
}
