// What people read on a terminal: tables, a progress bar, emphasized text.
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

#include <fmt/color.h>

namespace cowmgr::cli {

// Whether `stream` is a terminal that obeys escape codes (TERM is not "dumb").
[[nodiscard]] bool is_terminal(std::FILE* stream) noexcept;

// `text` with all that is not printable UTF-8 written as \xNN. Line feeds are escaped too.
[[nodiscard]] std::string visible(std::string_view text);

// Emphasizes text, or leaves it alone.
struct Style {
  bool has_escapes = false;

  // For text that goes to `stream`: plain unless that is a terminal, and when $NO_COLOR is set
  // (no-color.org).
  [[nodiscard]] static Style of(std::FILE* stream) noexcept;

  [[nodiscard]] std::string emphasized(std::string_view text, fmt::text_style how) const;
  [[nodiscard]] std::string bold(std::string_view text) const {
    return emphasized(text, fmt::emphasis::bold);
  }
};

struct Row {
  std::vector<std::string> cells;
  fmt::text_style how{};
};

[[nodiscard]] constexpr fmt::text_style bold_if(bool is_bold) noexcept {
  return is_bold ? fmt::emphasis::bold : fmt::emphasis();
}

// Lines of text, each column as wide as its widest cell. ">SIZE" is the header of a column that is aligned to
// the right. Cells are made visible(). A row without text is left out, such as headers that are all empty.
[[nodiscard]] std::string table(std::vector<std::string> headers, std::vector<Row> rows, Style style);

// Keeps one line on standard error up to date, at most ten times a second: percentage, bar, counts, rate, and
// the time that is left, or that it took. Draws nothing unless that is a terminal. Not thread-safe.
class ProgressBar {
 public:
  enum class Unit : std::uint8_t { bytes, items };

  // The time that the rate counts from is now.
  ProgressBar(std::string_view label, std::uint64_t total, Unit unit, bool is_wanted = true);
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  // Erases the line when the work ended without finish(), so that a message about that starts a line.
  ~ProgressBar();

  void update(std::uint64_t done);
  // All is done: the line stays.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] std::string numbers() const;
  [[nodiscard]] std::string line() const;

  std::string label_;
  std::uint64_t total_;
  std::uint64_t done_ = 0;
  Unit unit_;
  Clock::time_point started_ = Clock::now();
  Clock::time_point next_draw_ = started_;
  bool is_shown_;
  bool is_drawn_ = false;  // the cursor stands in an unfinished line
};

}  // namespace cowmgr::cli
