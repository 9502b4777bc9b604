#include "client/examples/knn/demo_options.hpp"

#include <algorithm>
#include <thread>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

namespace cowmgr::knn {
namespace {

constexpr std::size_t kMaxWorkers = 256;          // each takes some MiB of its own
constexpr std::size_t kMaxCount = 1'000'000'000;  // of rows and slots; the data set the real limit
constexpr std::size_t kFewestWorkers = 4;         // with fewer, one copy saves little to look at
constexpr std::uint64_t kRowsOfSlot = 250;   // KnnClassifier::classify() is slower for each row with fewer
constexpr std::uint64_t kSlotsOfWorker = 4;  // the last one to end is late by a part of its share

constexpr const char* kDescription =
    "Classifies the test images of Fashion-MNIST by their nearest neighbours among the training images, with "
    "several\n"
    "worker processes that read one copy of the training images in shared memory.";

constexpr const char* kFooter =
    "Exit codes: 0 done, 1 failed, 2 wrong usage.\n"
    "DIR holds {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz, as all relatives of MNIST do.";

void declare(CLI::App& app, DemoOptions& options) {
  const CLI::Range count(std::size_t{1}, kMaxCount, "COUNT");
  app.add_option("--workers", options.task.workers,
                 "Number of worker processes. Default: one a processor, at least 4")
      ->check(CLI::Range(std::size_t{1}, kMaxWorkers))
      ->type_name("N");
  app.add_option("--k", options.task.k, "Number of neighbours that vote. Default: 5")
      ->check(count)
      ->type_name("K");
  app.add_option("--slots", options.task.slots,
                 "Number of parts of the work. Default: such as to keep all workers busy")
      ->check(count)
      ->type_name("N");
  app.add_option("--test-rows", options.task.test_rows, "Classify only the first N test images")
      ->check(count)
      ->type_name("N");
  app.add_option("--data", options.data, "Where the data set lies. Default: " + options.data)
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("--json", options.json_file, "Write the report as JSON, sizes in bytes")->type_name("FILE");
  app.add_option("--predictions", options.predictions_file, "Write the predicted labels, as numpy.save does")
      ->type_name("FILE");
  auto* keep = app.add_flag("--keep", options.keep, "Leave the daemon running, with its arrays");
  app.add_option(
         "--socket", options.socket,
         "Use the daemon that serves there, and take our arrays away at the end; it may be killed and "
         "started again meanwhile. Default: a daemon of our own")
      ->excludes(keep)
      ->type_name("PATH");
  app.footer(kFooter);
}

}  // namespace

std::variant<DemoOptions, cli::Answer> parse_demo_options(int argc, const char* const* argv) {
  DemoOptions options;
  options.task.workers =
      std::clamp<std::size_t>(std::thread::hardware_concurrency(), kFewestWorkers, kMaxWorkers);
  CLI::App app(kDescription, "knn-demo");
  declare(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return cli::answer_of(app, error, fmt::format("{}; see `knn-demo --help`", error.what()));
  }
  return options;
}

std::uint64_t slots_for(std::size_t workers, std::size_t test_rows) {
  const std::uint64_t slots = std::max((test_rows + kRowsOfSlot - 1) / kRowsOfSlot, workers * kSlotsOfWorker);
  return std::min<std::uint64_t>(slots, test_rows);
}

}  // namespace cowmgr::knn
