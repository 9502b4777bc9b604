#include "daemon/core/log.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <poll.h>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <spdlog/async.h>
#include <spdlog/details/os.h>
#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/null_sink.h>
#include <spdlog/spdlog.h>

namespace cowmgr {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPollMs = 100;  // until the thread looks again whether it is to come to its end
constexpr std::string_view kNoColor = "\033[m";
constexpr std::array<std::string_view, SPDLOG_LEVEL_OFF> kColors = {
    "\033[37m", "\033[36m", "\033[32m", "\033[33m\033[1m", "\033[31m\033[1m", "\033[1m\033[41m"};

}  // namespace

// Used by the log's one thread, but for hurry() and await_flush().
class LogSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  // `overruns` counts the lines that had no room in the queue.
  LogSink(int fd, std::function<std::size_t()> overruns)
      : fd_(fd),
        overruns_(std::move(overruns)),
        has_colors_(::isatty(fd) == 1 && spdlog::details::os::is_color_terminal()) {}

  // From now on nothing waits for a reader beyond `end`.
  void hurry(Clock::time_point end) { end_ = end; }
  // Waits until flush() was called in the log's thread. False if it was not by `end`.
  [[nodiscard]] bool await_flush(Clock::time_point end) {
    std::unique_lock lock(flush_mutex_);
    return flushed_.wait_until(lock, end, [this] { return is_flushed_; });
  }

 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    const std::size_t dropped = overruns_() + unwritten_;
    if (dropped > told_) {
      const std::size_t more = dropped - told_;
      if (write(
              text_of({message.logger_name, spdlog::level::warn,
                       fmt::format("{} line(s) before this one were left out: nobody read the log", more)})))
        told_ = dropped;
    }
    if (!write(text_of(message))) ++unwritten_;
  }
  void flush_() override {
    const std::lock_guard lock(flush_mutex_);
    is_flushed_ = true;
    flushed_.notify_all();
  }

 private:
  std::string text_of(const spdlog::details::log_msg& message) {
    spdlog::memory_buf_t buffer;
    formatter_->format(message, buffer);
    std::string text(buffer.data(), buffer.size());
    if (has_colors_ && message.color_range_end > message.color_range_start) {
      text.insert(message.color_range_end, kNoColor);
      text.insert(message.color_range_start, kColors.at(static_cast<std::size_t>(message.level)));
    }
    return text;
  }

  // The descriptor is not ours alone: O_NONBLOCK would be set for all who have it. A pipe that poll(2) calls
  // writable has room for PIPE_BUF bytes.
  bool write(std::string_view text) {
    while (!text.empty()) {
      if (!await_room()) return false;
      const ssize_t count = ::write(fd_, text.data(), std::min<std::size_t>(text.size(), PIPE_BUF));
      if (count >= 0)
        text.remove_prefix(static_cast<std::size_t>(count));
      else if (errno != EINTR && errno != EAGAIN)
        return false;
    }
    return true;
  }

  // False when there was none for too long.
  bool await_room() const {
    for (;;) {
      pollfd poll{fd_, POLLOUT, 0};
      const int rc = ::poll(&poll, 1, Clock::now() < end_.load() ? kPollMs : 0);
      if (rc > 0 || (rc < 0 && errno != EINTR)) return true;  // write(2) says what is wrong
      if (Clock::now() >= end_.load()) return false;
    }
  }

  int fd_;
  std::function<std::size_t()> overruns_;
  bool has_colors_;
  std::size_t unwritten_ = 0;
  std::size_t told_ = 0;
  std::atomic<Clock::time_point> end_{Clock::time_point::max()};
  std::mutex flush_mutex_;
  std::condition_variable flushed_;
  bool is_flushed_ = false;
};

Log::Log(const LogOptions& options)
    : patience_(options.patience),
      thread_(std::make_shared<spdlog::details::thread_pool>(options.max_lines, 1)),
      sink_(
          std::make_shared<LogSink>(options.fd, [pool = thread_.get()] { return pool->overrun_counter(); })) {
  spdlog::set_default_logger(std::make_shared<spdlog::async_logger>(
      "cowmgr", sink_, thread_, spdlog::async_overflow_policy::overrun_oldest));
  spdlog::set_level(spdlog::level::from_str(options.level));
  spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %^%l%$ %v");
}

Log::~Log() {
  const auto end = Clock::now() + patience_;
  sink_->hurry(end);
  const auto logger = spdlog::default_logger();  // which goes after the thread, and not in it
  logger->flush();
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::null_sink_st>()));
  // Somebody else may have filled the pipe just before a write, which waits then: the thread ends with the
  // process. Its end is awaited only where it is near.
  if (sink_->await_flush(end + patience_)) {
    thread_.reset();  // it is done with the sink, which goes next
    return;
  }
  [[maybe_unused]] static const auto* const kept = new auto(std::move(thread_));
}

}  // namespace cowmgr
