// knn-demo: classifies Fashion-MNIST with worker processes that share one copy of the data.
//
// Starts a daemon of its own, or uses one that is there, puts the data, starts the workers, waits for their
// common result, and tells what all that took. Whatever it started ends with it, unless --keep says otherwise
// for the daemon.

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "client/cowctl/output_file.hpp"
#include "client/cowctl/terminal.hpp"
#include "client/examples/knn/demo_options.hpp"
#include "client/examples/knn/fashion_mnist.hpp"
#include "client/examples/knn/interrupts.hpp"
#include "client/examples/knn/names.hpp"
#include "client/examples/knn/report.hpp"
#include "client/examples/knn/workers.hpp"
#include "cowmgr/cowmgr.hpp"
#include "proto/npy.hpp"
#include "proto/standard_streams.hpp"
#include "proto/text.hpp"

namespace cowmgr::knn {
namespace {

using cli::print;
using Clock = std::chrono::steady_clock;

constexpr auto kGlance = std::chrono::milliseconds(100);  // between two looks at the workers
constexpr auto kSealPatience = std::chrono::seconds(10);  // until a process that can still write is an error

// The files that were asked for. Made before the work, so that a bad name costs nobody a minute.
struct Outputs {
  std::optional<cli::OutputFile> json;
  std::optional<cli::OutputFile> predictions;
};

Result<void> open_output(std::optional<cli::OutputFile>& file, const std::string& path) {
  if (path.empty()) return {};
  auto created = cli::OutputFile::create(path, true);
  if (!created) return error_of(created);
  file.emplace(*std::move(created));
  return {};
}

Result<void> write_output(std::optional<cli::OutputFile>& file, std::string_view head,
                          std::span<const std::byte> body) {
  if (!file) return {};
  if (auto ok = file->write(std::as_bytes(std::span(head))); !ok) return ok;
  if (auto ok = file->write(body); !ok) return ok;
  return file->commit();
}

Result<void> write_outputs(Outputs& outputs, const DemoReport& report, const Array& predictions) {
  constexpr std::size_t kNpyHeaderBytes = 128;  // NumPy's own choice for a short one
  const auto header = make_npy_header(predictions.spec(), kNpyHeaderBytes);
  if (!header) return error_of(header);
  if (auto ok = write_output(outputs.predictions, *header, predictions.bytes()); !ok) return ok;
  return write_output(outputs.json, to_json(report), {});
}

// The data as the options want it.
Result<FashionMnist> load(const DemoOptions& options) {
  auto data = load_fashion_mnist(options.data);
  if (!data) return data;
  const auto too_many = [](const char* option, std::uint64_t wanted, std::size_t rows, const char* kind) {
    return fail(Errc::invalid_argument,
                fmt::format("{} {} is too much: there are {} {} images", option, wanted, rows, kind));
  };
  if (options.task.k > data->train.rows())
    return too_many("--k", options.task.k, data->train.rows(), "training");
  if (options.task.test_rows > data->test.rows()) {
    return too_many("--test-rows", options.task.test_rows, data->test.rows(), "test");
  }
  if (options.task.test_rows > 0) truncate(data->test, options.task.test_rows);
  if (options.task.slots > data->test.rows())
    return too_many("--slots", options.task.slots, data->test.rows(), "test");
  return data;
}

// Arrays that are evicted when this object goes, if they were added.
class Belongings {
 public:
  explicit Belongings(Client client) : client_(std::move(client)) {}
  Belongings(const Belongings&) = delete;
  Belongings& operator=(const Belongings&) = delete;
  ~Belongings() {
    if (!names_.empty()) (void)client_.evict(names_);
  }
  void add(const char* name) { names_.emplace_back(name); }

 private:
  Client client_;
  std::vector<std::string> names_;
};

// What the workers read.
Result<void> put_inputs(const Client& client, const FashionMnist& data, Belongings* ours) {
  const auto add = [&](const char* name) {
    if (ours != nullptr) ours->add(name);
  };
  if (auto ok = put_images(client, kTrainImages, data.train); !ok) return ok;
  add(kTrainImages);
  if (auto ok = put_images(client, kTestImages, data.test); !ok) return ok;
  add(kTestImages);
  const auto labels = client.put<std::uint8_t>(kTrainLabels, data.train.labels, {data.train.rows()});
  if (!labels) return error_of(labels);
  add(kTrainLabels);
  return {};
}

// Waits for the last slot, with an eye on the workers: without them it would never come.
Result<Array> wait_for_predictions(ResultSet& set, Workers& workers, const Interrupts& interrupts) {
  const std::uint64_t rows = set.spec().shape.front();
  cli::ProgressBar bar("classifying", rows, cli::ProgressBar::Unit::items);
  const auto show = [&](const ResultsInfo& info) { bar.update(rows * info.committed / info.slots); };
  std::optional<Clock::time_point> refused;  // since when the complete result cannot be sealed
  for (;;) {
    auto predictions = set.wait(kGlance, show);
    if (predictions) {
      bar.finish();
      return predictions;
    }
    const Errc code = predictions.error().code;
    if (code != Errc::timed_out && code != Errc::still_writable) return predictions;
    if (code == Errc::still_writable) refused = refused.value_or(Clock::now());
    if (refused && Clock::now() - *refused > kSealPatience) return predictions;
    if (const auto ok = interrupts.check(); !ok) return error_of(ok);
    if (const auto ok = workers.check(); !ok) return error_of(ok);
  }
}

std::size_t count_equal(std::span<const std::uint8_t> left, std::span<const std::uint8_t> right) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < left.size(); ++i) {
    if (left[i] == right[i]) ++count;
  }
  return count;
}

// `path` as one would type it here.
std::string shortest(const std::filesystem::path& path) {
  std::error_code ignored;
  const std::string near = std::filesystem::proximate(path, ignored);
  return near.empty() || near.starts_with("..") ? path.string() : near;
}

// One run, from the command line to the last line.
class Demo {
 public:
  Demo(const DemoOptions& options, const Interrupts& interrupts)
      : options_(options), interrupts_(interrupts) {}

  Result<void> run() {
    if (auto ok = open_output(outputs_.json, options_.json_file); !ok) return ok;
    if (auto ok = open_output(outputs_.predictions, options_.predictions_file); !ok) return ok;
    auto data = load(options_);
    if (!data) return error_of(data);
    if (auto ok = interrupts_.check(); !ok) return ok;
    return options_.socket.empty() ? use_daemon_of_our_own(*data) : use_daemon_of_others(*data);
  }

 private:
  [[nodiscard]] static Result<Client> connect(const std::string& socket, Milliseconds reconnect) {
    return Client::connect({.socket = socket, .command = "knn-demo", .reconnect = reconnect});
  }

  Result<void> use_daemon_of_our_own(FashionMnist& data) {
    auto daemon = EmbeddedDaemon::start({.program = {}, .may_outlive = options_.keep});
    if (!daemon) return error_of(daemon);
    auto done = work_with(*daemon, data);
    if (done && options_.keep) {
      daemon->keep();
      return done;
    }
    // Why it is gone comes before what we missed.
    if (const auto stopped = daemon->stop(); !stopped)
      fmt::print(stderr, "knn-demo: {}\n", stopped.error().message);
    return done;
  }

  Result<void> work_with(const EmbeddedDaemon& daemon, FashionMnist& data) {
    const auto client = connect(daemon.socket(), Milliseconds(0));  // when it goes, none comes back
    if (!client) return error_of(client);
    if (auto ok = classify(*client, data, nullptr); !ok) return ok;
    const KeptDaemon kept{daemon.socket(), daemon.log_file(), shortest(path_of_sibling("cowctl"))};
    return conclude(options_.keep ? &kept : nullptr);
  }

  Result<void> use_daemon_of_others(FashionMnist& data) {
    const auto client = connect(options_.socket, ConnectOptions().reconnect);
    if (!client) return error_of(client);
    Belongings ours(*client);
    if (auto ok = classify(*client, data, &ours); !ok) return ok;
    ours.add(kPredictions);
    return conclude(nullptr);
  }

  // Fills report_, but for the sentences about it. Adds the arrays that it puts to `ours`, unless
  // they go with the daemon.
  Result<void> classify(const Client& client, FashionMnist& data, Belongings* ours) {
    if (auto ok = put_inputs(client, data, ours); !ok) return ok;
    if (auto ok = interrupts_.check(); !ok) return ok;
    describe(data);
    if (auto ok = announce(data); !ok) return ok;
    const std::vector<std::uint8_t> labels = std::move(data.test.labels);
    data = {};  // as arrays it is in memory once already
    return run_workers(client, labels);
  }

  void describe(const FashionMnist& data) {
    report_.task = options_.task;
    report_.task.test_rows = data.test.rows();
    if (report_.task.slots == 0) report_.task.slots = slots_for(report_.task.workers, report_.task.test_rows);
    report_.train_rows = data.train.rows();
    report_.train_bytes = data.train.images.bytes.size() * sizeof(float);
  }

  [[nodiscard]] Result<void> announce(const FashionMnist& data) const {
    return print(fmt::format(
        "Fashion-MNIST: {} training images of {} pixels as float32, {}, are in shared memory, once.\n"
        "{} workers classify {} test images, in {} slots.\n",
        report_.train_rows, data.train.columns(), format_size(report_.train_bytes), report_.task.workers,
        report_.task.test_rows, report_.task.slots));
  }

  Result<void> run_workers(const Client& client, std::span<const std::uint8_t> labels) {
    const auto began = Clock::now();
    auto set =
        client.create_results(kPredictions, {Dtype::of<std::uint8_t>(), {labels.size()}}, report_.task.slots);
    if (!set) return error_of(set);
    auto workers = Workers::start(report_.task.workers, report_.task.k, client.socket());
    if (!workers) return error_of(workers);
    if (auto ok = print(fmt::format("Their processes: {}\n", workers->pids())); !ok) return ok;
    auto predictions = wait_for_predictions(*set, *workers, interrupts_);
    if (!predictions) return error_of(predictions);
    report_.classifying = Clock::now() - began;
    auto by_worker = workers->measure(interrupts_);
    if (!by_worker) return error_of(by_worker);
    report_.by_worker = *std::move(by_worker);
    if (auto ok = workers->finish(interrupts_); !ok) return ok;
    report_.lost_workers = workers->lost();
    return take_answer(*predictions, labels);
  }

  Result<void> take_answer(const Array& predictions, std::span<const std::uint8_t> labels) {
    const auto predicted = predictions.as<std::uint8_t>();
    if (!predicted) return error_of(predicted);
    COWMGR_ASSERT(predicted->size() == labels.size());
    report_.correct = count_equal(*predicted, labels);
    report_.total = Clock::now() - began_;
    return write_outputs(outputs_, report_, predictions);
  }

  [[nodiscard]] Result<void> conclude(const KeptDaemon* kept) const {
    const cli::Style style = cli::Style::of(stdout);
    return print(fmt::format("\n{}\n{}", to_text(report_, style), closing_words(report_, kept, style)));
  }

  const DemoOptions& options_;
  const Interrupts& interrupts_;
  Clock::time_point began_ = Clock::now();
  Outputs outputs_;
  DemoReport report_;
};

int run(int argc, const char* const* argv) {
  const auto parsed = parse_demo_options(argc, argv);
  if (const auto* answer = std::get_if<cli::Answer>(&parsed)) {
    if (answer->exit_code == 0) return print(answer->text) ? 0 : 1;
    fmt::print(stderr, "knn-demo: {}\n", cli::visible(answer->text));
    return answer->exit_code;
  }
  const Interrupts interrupts;
  const auto done = Demo(std::get<DemoOptions>(parsed), interrupts).run();
  if (done) return 0;
  fmt::print(stderr, "knn-demo: {}\n", cli::visible(done.error().message));
  return 1;
}

}  // namespace
}  // namespace cowmgr::knn

int main(int argc, char** argv) {
  cowmgr::occupy_standard_streams();
  // Whoever reads our report may stop at any line: we must still stop what we started.
  static_cast<void>(std::signal(SIGPIPE, SIG_IGN));
  try {
    return cowmgr::knn::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "knn-demo: internal error: %s\n", error.what());
    return 1;
  }
}
