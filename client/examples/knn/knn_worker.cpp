// knn-worker: one of several processes that classify a test set together. Usage: knn-worker K
//
// All that it knows comes from the daemon at COWMGR_SOCKET. The arrays are mapped, not copied: every worker
// reads the same memory. The answers are written where they will be read. Nothing has to be told to the other
// workers, and nothing is lost if this process is killed: its slot goes to another one. Nor is it if the
// daemon is.

#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <poll.h>
#include <span>
#include <string>
#include <string_view>
#include <sys/prctl.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>

#include "client/examples/knn/knn.hpp"
#include "client/examples/knn/names.hpp"
#include "cowmgr/cowmgr.hpp"

namespace cowmgr::knn {
namespace {

struct Tally {
  std::uint64_t rows = 0;
  std::uint64_t slots = 0;
};

// The arrays of the job, as views of the one copy that there is.
struct Job {
  std::vector<Array> views;  // what the spans point into
  TrainingSet train;
  std::span<const float> test;
};

Result<Job> attach_job(const Client& client) {
  const std::vector<std::string> names = {kTrainImages, kTrainLabels, kTestImages};
  auto views = client.attach(names);  // all of them, or none, in one request
  if (!views) return error_of(views);
  const Array& images = (*views)[0];
  const auto pixels = images.as<float>();
  const auto labels = (*views)[1].as<std::uint8_t>();
  const auto test = (*views)[2].as<float>();
  if (!pixels) return error_of(pixels);
  if (!labels) return error_of(labels);
  if (!test) return error_of(test);
  if (images.shape().size() != 2) {
    return fail(Errc::invalid_shape,
                fmt::format("{} is {}, not rows of pixels", kTrainImages, to_string(images.shape())));
  }
  const TrainingSet train{*pixels, *labels, images.shape()[1]};
  return Job{*std::move(views), train, *test};
}

// Leases slot after slot until none is left.
Result<Tally> classify_slots(ResultSet& predictions, const KnnClassifier& classifier, const Job& job) {
  Tally tally;
  auto slot = predictions.lease();
  while (slot && *slot) {
    const Rows rows = (*slot)->rows();
    const std::size_t columns = job.train.columns;
    const auto out = (*slot)->as<std::uint8_t>();  // this part of the result belongs to us alone
    if (!out) return error_of(out);
    const auto images = job.test.subspan(rows.begin * columns, rows.count() * columns);
    if (const auto ok = classifier.classify(images, *out); !ok) {
      // The next worker would not fare better: whoever waits for the result learns why there is none.
      if (const auto told = (*slot)->fail(ok.error().message); !told) return error_of(told);
      return error_of(ok);
    }
    tally.rows += rows.count();
    ++tally.slots;
    slot = (*slot)->commit_and_lease();
  }
  if (!slot) return error_of(slot);
  return tally;
}

// Nobody wants our answers when the demo is gone; nor does a daemon of its own come back, for which we would
// wait. The kernel tells of a death that is still to come (prctl(2)), our input of an earlier one.
void end_with_the_demo() {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  pollfd input{STDIN_FILENO, 0, 0};
  if (::poll(&input, 1, 0) > 0 && (input.revents & POLLHUP) != 0) ::_exit(1);
}

// The demo ends our input when it has measured what memory we take.
void wait_for_end_of_input() {
  char ignored = 0;
  while (::read(STDIN_FILENO, &ignored, 1) > 0) {
  }
}

Result<void> work(std::size_t k) {
  end_with_the_demo();
  // And, when the daemon goes, to the next one; also if it goes just now.
  const auto client = Client::connect({.wait = std::chrono::seconds(5)});
  if (!client) return error_of(client);
  const auto job = attach_job(*client);
  if (!job) return error_of(job);
  const auto classifier = KnnClassifier::make(job->train, k);
  if (!classifier) return error_of(classifier);
  auto predictions = client->open_results(kPredictions);
  if (!predictions) return error_of(predictions);
  const auto tally = classify_slots(*predictions, *classifier, *job);
  if (!tally) return error_of(tally);
  fmt::print("{} rows in {} slots\n", tally->rows, tally->slots);
  std::fflush(stdout);
  wait_for_end_of_input();
  return {};
}

}  // namespace
}  // namespace cowmgr::knn

int main(int argc, char** argv) {
  const std::string_view text = argc == 2 ? argv[1] : "";
  std::size_t k = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), k);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) {
    fmt::print(stderr, "usage: knn-worker K\n");
    return 2;
  }
  if (const auto done = cowmgr::knn::work(k); !done) {
    fmt::print(stderr, "knn-worker {}: {}\n", ::getpid(), done.error().message);
    return 1;
  }
  return 0;
}
