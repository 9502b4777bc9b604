#include "client/cowctl/terminal.hpp"

#include <algorithm>
#include <clocale>
#include <cstdlib>
#include <cwchar>
#include <numeric>
#include <sys/ioctl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/errors.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

constexpr std::string_view kBold = "\033[1m";
constexpr std::string_view kDim = "\033[2m";
constexpr std::string_view kReset = "\033[0m";
constexpr std::string_view kEraseLine = "\r\033[K";

constexpr std::size_t kColumnGap = 2;
constexpr std::size_t kUsualColumns = 80;  // of a terminal that does not tell
constexpr std::size_t kLongestBar = 40;
constexpr std::size_t kShortestBar = 8;  // below that it says less than the percentage beside it
constexpr auto kDrawInterval = std::chrono::milliseconds(100);

// Makes the C library read text as UTF-8 in this thread, whatever locale the user has: names are UTF-8.
class Utf8Scope {
 public:
  Utf8Scope() noexcept : before_(::uselocale(utf8())) {}
  Utf8Scope(const Utf8Scope&) = delete;
  Utf8Scope& operator=(const Utf8Scope&) = delete;
  ~Utf8Scope() { ::uselocale(before_); }

 private:
  // Kept for good: the process needs it until its last line. Null where there is none, which changes nothing.
  static locale_t utf8() noexcept {
    static const locale_t locale = ::newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
    return locale;
  }

  locale_t before_;
};

struct Glyph {
  std::size_t bytes;
  int columns;  // -1: not printable
};

// The first character of `text`, which is not empty. Needs an Utf8Scope.
Glyph first_glyph(std::string_view text) noexcept {
  wchar_t wide = 0;
  std::mbstate_t state{};
  const std::size_t bytes = std::mbrtowc(&wide, text.data(), text.size(), &state);
  if (bytes == 0 || bytes > text.size())
    return {1, -1};  // NUL, or one of the two negative numbers: malformed
  return {bytes, ::wcwidth(wide)};
}

// A bar that cannot be drawn is no reason to stop the work.
void write_to_stderr(std::string_view text) noexcept {
  static_cast<void>(std::fwrite(text.data(), 1, text.size(), stderr));
}

std::string spaces(std::size_t count) {
  return std::string().append(count, ' ');
}

std::string count_text(std::uint64_t count, Progress::Unit unit) {
  return unit == Progress::Unit::bytes ? format_size(count) : std::to_string(count);
}

std::string rate_text(double rate, Progress::Unit unit) {
  constexpr double kFew = 10;  // a second, of items: below, whole numbers are too coarse
  if (unit == Progress::Unit::items && rate < kFew) return fmt::format("{:.1f}/s", rate);
  return count_text(static_cast<std::uint64_t>(rate), unit) + "/s";
}

// "0:07", "12:34", "1:02:03".
std::string clock_text(double seconds) {
  constexpr double kLongest = 359999;  // 99:59:59
  const auto total = static_cast<unsigned>(std::clamp(seconds, 0.0, kLongest));
  if (total < 3600) return fmt::format("{}:{:02}", total / 60, total % 60);
  return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
}

double done_part(const Progress& progress) {
  if (progress.done >= progress.total) return 1;
  return static_cast<double>(progress.done) / static_cast<double>(progress.total);
}

// "188 MiB of 1.5 GiB  1.1 GiB/s  0:02 left".
std::string progress_numbers(const Progress& progress) {
  std::string text = fmt::format("{} of {}", count_text(progress.done, progress.unit),
                                 count_text(progress.total, progress.unit));
  const double seconds = std::chrono::duration<double>(progress.elapsed).count();
  if (seconds <= 0 || progress.done == 0) return text;
  const double rate = static_cast<double>(progress.done) / seconds;
  text += "  " + rate_text(rate, progress.unit);
  if (progress.done >= progress.total) {
    constexpr double kMinute = 60;
    return text + (seconds < kMinute ? fmt::format("  in {:.1f} s", seconds) : "  in " + clock_text(seconds));
  }
  return text +
         fmt::format("  {} left", clock_text(static_cast<double>(progress.total - progress.done) / rate));
}

std::size_t terminal_columns() noexcept {
  winsize size{};
  const bool is_known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return is_known ? size.ws_col : kUsualColumns;
}

}  // namespace

bool is_terminal(std::FILE* stream) noexcept {
  const char* term = std::getenv("TERM");
  return ::isatty(::fileno(stream)) == 1 && (term == nullptr || std::string_view(term) != "dumb");
}

std::string visible(std::string_view text) {
  const Utf8Scope utf8;
  std::string out;
  while (!text.empty()) {
    const auto [bytes, columns] = first_glyph(text);
    const auto glyph = text.substr(0, bytes);
    if (columns >= 0) {
      out += glyph;
    } else {
      for (const char c : glyph) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
    text.remove_prefix(bytes);
  }
  return out;
}

std::size_t display_width(std::string_view text) {
  const Utf8Scope utf8;
  std::size_t width = 0;
  while (!text.empty()) {
    const auto [bytes, columns] = first_glyph(text);
    width += static_cast<std::size_t>(std::max(columns, 0));
    text.remove_prefix(bytes);
  }
  return width;
}

Style Style::of(std::FILE* stream) noexcept {
  const char* no_color = std::getenv("NO_COLOR");
  const bool is_refused = no_color != nullptr && *no_color != '\0';
  return Style(is_terminal(stream) && !is_refused);
}

std::string Style::bold(std::string_view text) const {
  return is_on_ ? fmt::format("{}{}{}", kBold, text, kReset) : std::string(text);
}

std::string Style::dim(std::string_view text) const {
  return is_on_ ? fmt::format("{}{}{}", kDim, text, kReset) : std::string(text);
}

void Table::add_row(std::vector<std::string> cells, Emphasis emphasis) {
  COWMGR_ASSERT(cells.size() == columns_.size());
  for (auto& cell : cells) cell = visible(cell);
  rows_.push_back({std::move(cells), emphasis});
}

std::vector<std::size_t> Table::widths() const {
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    std::size_t width = display_width(columns_[i].header);
    for (const auto& row : rows_) width = std::max(width, display_width(row.cells[i]));
    widths.push_back(width);
  }
  return widths;
}

std::string Table::line(const std::vector<std::string>& cells, const std::vector<std::size_t>& widths) const {
  std::string out;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const std::string padding = spaces(widths[i] - display_width(cells[i]));
    if (i > 0) out += spaces(kColumnGap);
    out += columns_[i].align == Align::right ? padding + cells[i] : cells[i] + padding;
  }
  out.erase(out.find_last_not_of(' ') + 1);
  return out;
}

std::string Table::to_string(Style style) const {
  const auto widths = this->widths();
  std::vector<std::string> headers;
  headers.reserve(columns_.size());
  for (const auto& column : columns_) headers.push_back(column.header);
  const std::string header = line(headers, widths);
  std::string out = header.empty() ? "" : style.bold(header) + '\n';
  for (const auto& row : rows_) {
    const std::string text = line(row.cells, widths);
    out += row.emphasis == Emphasis::bold  ? style.bold(text)
           : row.emphasis == Emphasis::dim ? style.dim(text)
                                           : text;
    out += '\n';
  }
  return out;
}

std::string progress_line(const Progress& progress, std::size_t columns) {
  const double part = done_part(progress);
  const std::string head = fmt::format("{}  {:3}%", visible(progress.label), static_cast<int>(part * 100));
  const std::string numbers = progress_numbers(progress);
  const std::size_t text_columns = display_width(head) + kColumnGap + numbers.size();
  const std::size_t bar_frame = kColumnGap + 2;  // its brackets
  // The last column stays free: a terminal may wrap as soon as it is written to.
  if (text_columns + bar_frame + kShortestBar >= columns) {
    return text_columns < columns ? head + spaces(kColumnGap) + numbers : numbers.substr(0, columns - 1);
  }
  const std::size_t length = std::min(columns - 1 - text_columns - bar_frame, kLongestBar);
  const auto filled = static_cast<std::size_t>(part * static_cast<double>(length));
  return fmt::format("{}  [{}{}]  {}", head, std::string(filled, '#'), std::string(length - filled, '.'),
                     numbers);
}

ProgressBar::ProgressBar(std::string label, std::uint64_t total, Progress::Unit unit, Show show)
    : progress_{.label = std::move(label), .total = total, .unit = unit},
      started_(Clock::now()),
      next_draw_(started_),
      is_shown_(show == Show::on_terminal && is_terminal(stderr)) {}

ProgressBar::~ProgressBar() {
  if (is_drawn_) write_to_stderr(kEraseLine);
}

void ProgressBar::update(std::uint64_t done, Clock::time_point now) {
  progress_.done = done;
  if (is_shown_ && now >= next_draw_) draw(now);
}

void ProgressBar::finish(Clock::time_point now) {
  progress_.done = progress_.total;
  if (!is_shown_) return;
  draw(now);
  write_to_stderr("\n");
  is_drawn_ = false;
}

void ProgressBar::draw(Clock::time_point now) {
  progress_.elapsed = now - started_;
  write_to_stderr(std::string(kEraseLine) + progress_line(progress_, terminal_columns()));
  next_draw_ = now + kDrawInterval;
  is_drawn_ = true;
}

}  // namespace cowmgr::cli
