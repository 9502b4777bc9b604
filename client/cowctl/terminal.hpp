// What people read on a terminal: tables, a progress bar, bold and dim text.
//
// 1. Escape codes go to a terminal alone; into a file or a pipe goes plain text.
// 2. Text that others chose (names, commands, paths) cannot move the cursor: see visible().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace cowmgr::cli {

// Whether `stream` is a terminal that obeys escape codes (TERM is not "dumb").
[[nodiscard]] bool is_terminal(std::FILE* stream) noexcept;

// `text` with all that is not printable UTF-8 written as \xNN. Line feeds are escaped too.
[[nodiscard]] std::string visible(std::string_view text);

// Number of terminal columns that printable UTF-8 takes: wide characters take two, combining ones none.
[[nodiscard]] std::size_t display_width(std::string_view text);

// Marks text as bold or dim, or leaves it alone.
class Style {
 public:
  // For text that goes to `stream`: plain unless that is a terminal, and when $NO_COLOR is set
  // (no-color.org).
  [[nodiscard]] static Style of(std::FILE* stream) noexcept;
  [[nodiscard]] static Style plain() noexcept { return Style(false); }

  [[nodiscard]] std::string bold(std::string_view text) const;
  [[nodiscard]] std::string dim(std::string_view text) const;

 private:
  explicit Style(bool is_on) noexcept : is_on_(is_on) {}

  bool is_on_;
};

enum class Align : std::uint8_t { left, right };

struct Column {
  std::string header;  // no header line when all are empty
  Align align = Align::left;
};

// Rows of text under headers, each column as wide as its widest cell.
class Table {
 public:
  enum class Emphasis : std::uint8_t { none, bold, dim };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // One cell a column. Cells are made visible().
  void add_row(std::vector<std::string> cells, Emphasis emphasis = Emphasis::none);

  // All lines, each with its line feed and without spaces at its end.
  [[nodiscard]] std::string to_string(Style style) const;

 private:
  struct Row {
    std::vector<std::string> cells;
    Emphasis emphasis;
  };
  [[nodiscard]] std::vector<std::size_t> widths() const;
  [[nodiscard]] std::string line(const std::vector<std::string>& cells,
                                 const std::vector<std::size_t>& widths) const;

  std::vector<Column> columns_;
  std::vector<Row> rows_;
};

// How far some work has come.
struct Progress {
  enum class Unit : std::uint8_t { bytes, items };

  std::string label;
  std::uint64_t total = 0;
  Unit unit = Unit::bytes;
  std::uint64_t done = 0;
  std::chrono::steady_clock::duration elapsed{};
};

// One line about `progress` for a terminal of `columns` columns: percentage, bar, counts, rate, and the time
// that is left, or that it took.
[[nodiscard]] std::string progress_line(const Progress& progress, std::size_t columns);

// Keeps one line on standard error up to date, at most ten times a second. Draws nothing unless that is a
// terminal. Not thread-safe.
class ProgressBar {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Show : std::uint8_t { on_terminal, never };

  // The time that the rate counts from is now.
  ProgressBar(std::string label, std::uint64_t total, Progress::Unit unit = Progress::Unit::bytes,
              Show show = Show::on_terminal);
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  // Erases the line when the work ended without finish(), so that a message about that starts a line.
  ~ProgressBar();

  void update(std::uint64_t done, Clock::time_point now = Clock::now());
  // All is done: the line stays.
  void finish(Clock::time_point now = Clock::now());

 private:
  void draw(Clock::time_point now);

  Progress progress_;
  Clock::time_point started_;
  Clock::time_point next_draw_;
  bool is_shown_;
  bool is_drawn_ = false;  // the cursor stands in an unfinished line
};

}  // namespace cowmgr::cli
