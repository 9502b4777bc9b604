#include "client/cowctl/terminal.hpp"

#include <algorithm>
#include <clocale>
#include <cstdlib>
#include <cwchar>
#include <sys/ioctl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/errors.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

constexpr const char* kEraseLine = "\r\033[K";
constexpr std::size_t kLongestBar = 40;
constexpr std::size_t kShortestBar = 8;  // below that it says less than the percentage beside it
constexpr auto kDrawInterval = std::chrono::milliseconds(100);

// Takes the first character off `text`, which is not empty, and tells how many columns it is wide: 2 for
// some, 0 for a combining one, -1 for what is not printable. Names are UTF-8, whatever locale the user has.
std::pair<std::string_view, int> take_glyph(std::string_view& text) noexcept {
  [[maybe_unused]] static const char* const locale = std::setlocale(LC_CTYPE, "C.UTF-8");
  const auto [code, length] = decode_utf8(text);
  const auto bytes = text.substr(0, std::max<std::size_t>(length, 1));
  text.remove_prefix(bytes.size());
  return {bytes, length == 0 || code == 0 ? -1 : ::wcwidth(static_cast<wchar_t>(code))};
}

std::size_t display_width(std::string_view text) {
  std::size_t width = 0;
  while (!text.empty()) width += static_cast<std::size_t>(std::max(take_glyph(text).second, 0));
  return width;
}

std::size_t terminal_columns() noexcept {
  winsize size{};
  static_cast<void>(::ioctl(STDERR_FILENO, TIOCGWINSZ, &size));
  return size.ws_col > 0 ? size.ws_col : 80;  // of one that does not tell
}

// A bar that cannot be drawn is no reason to stop the work.
void write_to_stderr(const std::string& text) noexcept {
  static_cast<void>(std::fputs(text.c_str(), stderr));
}

}  // namespace

bool is_terminal(std::FILE* stream) noexcept {
  const char* term = std::getenv("TERM");
  return ::isatty(::fileno(stream)) == 1 && (term == nullptr || std::string_view(term) != "dumb");
}

std::string visible(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const auto [bytes, columns] = take_glyph(text);
    for (const char c : bytes)
      out += columns >= 0 ? std::string(1, c) : fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  }
  return out;
}

Style Style::of(std::FILE* stream) noexcept {
  const char* no_color = std::getenv("NO_COLOR");
  return {is_terminal(stream) && (no_color == nullptr || *no_color == '\0')};
}

std::string Style::emphasized(std::string_view text, fmt::text_style how) const {
  return fmt::format(has_escapes ? how : fmt::text_style(), "{}", text);
}

std::string table(std::vector<std::string> headers, std::vector<Row> rows, Style style) {
  std::vector<bool> is_right;
  for (auto& header : headers) {
    is_right.push_back(header.starts_with('>'));
    header.erase(0, is_right.back() ? 1 : 0);
  }
  rows.insert(rows.begin(), Row{std::move(headers), fmt::emphasis::bold});
  std::vector<std::size_t> widths(is_right.size());
  for (auto& row : rows) {
    COWMGR_ASSERT(row.cells.size() == widths.size());
    for (std::size_t i = 0; i < widths.size(); ++i) {
      row.cells[i] = visible(row.cells[i]);
      widths[i] = std::max(widths[i], display_width(row.cells[i]));
    }
  }
  std::string out;
  for (const auto& [cells, how] : rows) {
    std::string line;
    for (std::size_t i = 0; i < widths.size(); ++i) {
      const std::string padding(widths[i] - display_width(cells[i]), ' ');
      line += (i > 0 ? "  " : "") + (is_right[i] ? padding + cells[i] : cells[i] + padding);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    if (!line.empty()) out += style.emphasized(line, how) + '\n';
  }
  return out;
}

ProgressBar::ProgressBar(std::string_view label, std::uint64_t total, Unit unit, bool is_wanted)
    : label_(visible(label)), total_(total), unit_(unit), is_shown_(is_wanted && is_terminal(stderr)) {}

ProgressBar::~ProgressBar() {
  if (is_drawn_) write_to_stderr(kEraseLine);
}

void ProgressBar::update(std::uint64_t done) {
  done_ = done;
  const auto now = Clock::now();
  if (!is_shown_ || (now < next_draw_ && done < total_)) return;
  write_to_stderr(kEraseLine + line());
  next_draw_ = now + kDrawInterval;
  is_drawn_ = true;
}

void ProgressBar::finish() {
  update(total_);
  if (is_drawn_) write_to_stderr("\n");
  is_drawn_ = false;
}

// "188 MiB of 1.5 GiB  1.1 GiB/s  0:00:02 left".
std::string ProgressBar::numbers() const {
  const auto text = [this](double count, int digits) {
    return unit_ == Unit::bytes ? format_size(static_cast<std::uint64_t>(count))
                                : fmt::format("{:.{}f}", count, digits);
  };
  const auto done = static_cast<double>(done_);
  const auto total = static_cast<double>(total_);
  const double seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  std::string counts = fmt::format("{} of {}", text(done, 0), text(total, 0));
  if (done_ == 0 || seconds <= 0) return counts;
  const std::string rates = fmt::format("{}  {}/s", counts, text(done / seconds, 1));
  if (done_ >= total_) return fmt::format("{}  in {:.1f} s", rates, seconds);
  const auto left = static_cast<std::uint64_t>(seconds / done * (total - done));
  return fmt::format("{}  {}:{:02}:{:02} left", rates, left / 3600, left / 60 % 60, left % 60);
}

// As long as the terminal is wide, less the last column: it may wrap as soon as that is written to.
std::string ProgressBar::line() const {
  const double part = done_ >= total_ ? 1 : static_cast<double>(done_) / static_cast<double>(total_);
  const std::string numbers = this->numbers();
  const std::string head = fmt::format("{}  {:3}%  ", label_, static_cast<int>(part * 100));
  const std::size_t columns = terminal_columns() - 1;
  const std::size_t text_columns = display_width(head) + numbers.size();
  constexpr std::size_t kFrame = 4;  // "[]  "
  if (text_columns + kFrame + kShortestBar > columns)
    return text_columns > columns ? numbers.substr(0, columns) : head + numbers;
  const std::size_t length = std::min(columns - text_columns - kFrame, kLongestBar);
  const std::string filled(static_cast<std::size_t>(part * static_cast<double>(length)), '#');
  return fmt::format("{}[{:.<{}}]  {}", head, filled, length, numbers);
}

}  // namespace cowmgr::cli
