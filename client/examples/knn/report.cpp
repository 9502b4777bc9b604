#include "client/examples/knn/report.hpp"

#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "proto/text.hpp"

namespace cowmgr::knn {
namespace {

MemoryUse sum_of(const std::vector<WorkerReport>& workers) {
  MemoryUse sum;
  for (const auto& worker : workers) {
    sum.rss_bytes += worker.memory.rss_bytes;
    sum.pss_bytes += worker.memory.pss_bytes;
    sum.private_bytes += worker.memory.private_bytes;
  }
  return sum;
}

std::string memory_table(const DemoReport& report, cli::Style style) {
  std::vector<cli::Row> rows;
  const auto add = [&](std::string who, std::uint64_t images, const MemoryUse& use, bool is_sum) {
    rows.push_back({{std::move(who), std::to_string(images), format_size(use.rss_bytes),
                     format_size(use.pss_bytes), format_size(use.private_bytes)},
                    cli::bold_if(is_sum)});
  };
  std::uint64_t images = 0;
  for (const auto& worker : report.by_worker) {
    add(fmt::format("process {}", worker.pid), worker.rows, worker.memory, false);
    images += worker.rows;
  }
  add("sum", images, sum_of(report.by_worker), true);
  return cli::table({"worker", ">images", ">RSS", ">PSS", ">private"}, std::move(rows), style);
}

template <class Member>
std::vector<std::uint64_t> column(const DemoReport& report, Member member) {
  std::vector<std::uint64_t> values;
  values.reserve(report.by_worker.size());
  for (const auto& worker : report.by_worker) values.push_back(worker.memory.*member);
  return values;
}

std::string try_next(cli::Style style) {
  return fmt::format(
      "{}\n"
      "  ./dev demo --workers 8   the sum of PSS hardly grows: one more worker costs what is private to it\n"
      "  ./dev demo --k 1         one neighbour decides alone\n"
      "  ./dev demo --keep        leaves the daemon running, to look at with cowctl\n",
      style.bold("What to try next"));
}

std::string look_around(const KeptDaemon& kept, cli::Style style) {
  return fmt::format(
      "{}\n"
      "The daemon still runs and holds the arrays; the workers and this program need not.\n"
      "  COWMGR_SOCKET={} {} ls         lists the arrays\n"
      "  COWMGR_SOCKET={} {} shutdown   stops the daemon and frees their memory\n"
      "Its log is {}.\n",
      style.bold("What to try next"), kept.socket, kept.cowctl, kept.socket, kept.cowctl, kept.log);
}

}  // namespace

double DemoReport::accuracy() const noexcept {
  return static_cast<double>(correct) / static_cast<double>(task.test_rows);
}

std::uint64_t DemoReport::pss_sum_bytes() const noexcept {
  return sum_of(by_worker).pss_bytes;
}

std::string to_text(const DemoReport& report, cli::Style style) {
  return fmt::format(
      "{}   {:.2f} %: {} of {} test images get the right label, by the vote of {}\n"
      "{}  {:.1f} s in all, {:.1f} s of it to classify\n\n"
      "Memory of the workers, while each has all arrays mapped:\n{}\n"
      "The training images are {}: {} copies would take {}, all workers together take {}.\n",
      style.bold("Accuracy"), 100 * report.accuracy(), report.correct, report.task.test_rows,
      report.task.k == 1 ? "the nearest neighbour" : fmt::format("the {} nearest neighbours", report.task.k),
      style.bold("Wall time"), report.total.count(), report.classifying.count(), memory_table(report, style),
      format_size(report.train_bytes), report.by_worker.size(), format_size(report.copies_bytes()),
      style.bold(format_size(report.pss_sum_bytes())));
}

std::string to_json(const DemoReport& report) {
  nlohmann::ordered_json json;
  json["accuracy"] = report.accuracy();
  json["k"] = report.task.k;
  json["train_rows"] = report.train_rows;
  json["test_rows"] = report.task.test_rows;
  json["correct"] = report.correct;
  json["workers"] = report.task.workers;
  json["lost_workers"] = report.lost_workers;
  json["slots"] = report.task.slots;
  json["seconds"] = report.total.count();
  json["classify_seconds"] = report.classifying.count();
  json["train_bytes"] = report.train_bytes;
  json["copies_bytes"] = report.copies_bytes();
  json["pss_sum_bytes"] = report.pss_sum_bytes();
  json["pss_bytes_by_worker"] = column(report, &MemoryUse::pss_bytes);
  json["rss_bytes_by_worker"] = column(report, &MemoryUse::rss_bytes);
  json["private_bytes_by_worker"] = column(report, &MemoryUse::private_bytes);
  return json.dump(2) + '\n';
}

std::string closing_words(const DemoReport& report, const KeptDaemon* kept, cli::Style style) {
  return fmt::format(
      "{}\n"
      "{} separate programs read one copy of the training images. Each has all of them mapped, so that RSS\n"
      "counts them in full every time; PSS divides a page by the number of programs that share it, so that\n"
      "its sum is what the machine really spends. No image went through a socket. The workers wrote their\n"
      "answers in place, into one result array, of which each leased a range of rows at a time.\n\n{}",
      style.bold("What you have seen"), report.task.workers,
      kept != nullptr ? look_around(*kept, style) : try_next(style));
}

}  // namespace cowmgr::knn
