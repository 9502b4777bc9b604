#include "client/examples/knn/workers.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <fcntl.h>
#include <unistd.h>
#include <utility>

#include <fmt/format.h>

#include "client/cowctl/terminal.hpp"

namespace cowmgr::knn {
namespace {

struct Pipe {
  UniqueFd read;
  UniqueFd write;
};

// Closed at exec: a worker that had another one's pipe would hide its end.
Result<Pipe> make_pipe() {
  std::array<int, 2> ends{-1, -1};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return tl::unexpected(os_error("pipe2", "a worker", errno));
  return Pipe{UniqueFd(ends[0]), UniqueFd(ends[1])};
}

}  // namespace

Result<Workers::Worker> Workers::start_one(std::size_t k) {
  auto input = make_pipe();
  if (!input) return error_of(input);
  auto output = make_pipe();
  if (!output) return error_of(output);
  auto process = Child::start({path_of_sibling("knn-worker"), std::to_string(k)}, input->read, output->write);
  if (!process) return error_of(process);
  return Worker{*std::move(process), std::move(input->write), std::move(output->read)};
}

Result<Workers> Workers::start(std::size_t count, std::size_t k, const std::string& socket) {
  ::setenv("COWMGR_SOCKET", socket.c_str(), 1);
  // OpenBLAS makes its threads when it is loaded, before the worker can say that it wants none.
  ::setenv("OPENBLAS_NUM_THREADS", "1", 1);
  Workers workers;
  for (std::size_t i = 0; i < count; ++i) {
    auto worker = start_one(k);
    if (!worker) return error_of(worker);
    workers.workers_.push_back(*std::move(worker));
  }
  return workers;
}

Result<void> Workers::check() {
  for (Worker& worker : workers_) {
    const auto& end = worker.process.ended();
    if (end && !worker.is_lost) report_loss(worker, *end);
  }
  if (lost() < count()) return {};
  return fail(Errc::slot_failed, fmt::format("none of the {} workers is left; the last one {}", count(),
                                             workers_.back().process.ended().value_or("does not answer")));
}

void Workers::report_loss(Worker& worker, const std::string& how) const {
  worker.is_lost = true;
  // A progress bar may stand in this line.
  const char* erase = cli::is_terminal(stderr) ? "\r\033[K" : "";
  fmt::print(stderr, "{}knn-demo: worker {} {}; {} of {} are left\n", erase, worker.process.pid(), how,
             count() - lost(), count());
}

// Without its end; empty when the worker ended instead.
Result<std::string> Workers::read_line(const Worker& worker, const Interrupts& interrupts) {
  std::string line;
  for (;;) {
    if (const auto ok = interrupts.wait_for({worker.output.get()}); !ok) return error_of(ok);
    char next = 0;
    const ssize_t count = ::read(worker.output.get(), &next, 1);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return std::string();
    if (next == '\n') return line;
    line += next;
  }
}

Result<std::vector<WorkerReport>> Workers::measure(const Interrupts& interrupts) {
  std::vector<WorkerReport> reports;
  // All of them first: a page counts less for each the more have it mapped.
  for (const Worker& worker : workers_) {
    if (worker.is_lost) continue;
    const auto line = read_line(worker, interrupts);
    if (!line) return error_of(line);
    WorkerReport report{.pid = worker.process.pid(), .rows = 0, .memory = {}};
    std::from_chars(line->data(), line->data() + line->size(), report.rows);
    if (!line->empty()) reports.push_back(report);
  }
  for (WorkerReport& report : reports) {
    const auto memory = memory_use(report.pid);
    if (memory) report.memory = *memory;
    if (!memory && memory.error().code != Errc::not_found) return error_of(memory);
  }
  std::erase_if(reports, [](const WorkerReport& report) { return report.memory.rss_bytes == 0; });
  if (auto ok = check(); !ok) return error_of(ok);
  return reports;
}

Result<void> Workers::finish(const Interrupts& interrupts) {
  for (Worker& worker : workers_) worker.input.reset();
  for (Worker& worker : workers_) {
    if (auto ok = interrupts.wait_for({worker.process.pidfd()}); !ok) return ok;
    const auto& end = worker.process.ended();
    if (end && !worker.process.has_succeeded() && !worker.is_lost) report_loss(worker, *end);
  }
  return {};
}

std::size_t Workers::lost() const noexcept {
  return static_cast<std::size_t>(std::ranges::count(workers_, true, &Worker::is_lost));
}

std::string Workers::pids() const {
  std::string text;
  for (const Worker& worker : workers_)
    text += fmt::format("{}{}", text.empty() ? "" : " ", worker.process.pid());
  return text;
}

}  // namespace cowmgr::knn
