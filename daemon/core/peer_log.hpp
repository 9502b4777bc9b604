// What peers bring about, in the log: each user may fill so much of it, and no more.
//
// A line is text that somebody else chose how often to have written. Beyond the budget of its user it is
// neither written nor made; it is counted, and every few seconds one line tells how many there were.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <sys/types.h>
#include <unordered_map>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <spdlog/spdlog.h>

namespace cowmgr {

struct LogLimits {
  double lines = 500;      // at once
  double per_second = 20;  // from then on; 2 KiB each at most: what is quoted in a line is cut
};

// Counts by uid. Time is a parameter.
class LogBudget {
 public:
  using Tick = std::chrono::steady_clock::time_point;

  explicit LogBudget(const LogLimits& limits = {}) : limits_(limits) {}

  // Takes a line from the budget of `uid`. False when it is used up: the line is counted as left out.
  [[nodiscard]] bool take(uid_t uid, Tick now);

  struct LeftOut {
    uid_t uid = 0;
    std::uint64_t lines = 0;
  };
  // The users of whom lines were left out since the last call, and how many.
  [[nodiscard]] std::vector<LeftOut> take_left_out();
  [[nodiscard]] const LogLimits& limits() const noexcept { return limits_; }
  [[nodiscard]] std::size_t users() const noexcept { return users_.size(); }

 private:
  struct User {
    double lines = 0;  // left, as of `since`
    Tick since{};
    std::uint64_t left_out = 0;
  };
  [[nodiscard]] double lines_left(const User& user, Tick now) const;
  void forget_idle(Tick now);

  LogLimits limits_;
  std::unordered_map<uid_t, User> users_;
};

class PeerLog {
 public:
  explicit PeerLog(boost::asio::io_context& io) : tell_(io) {}
  ~PeerLog() { tell(); }
  PeerLog(const PeerLog&) = delete;
  PeerLog& operator=(const PeerLog&) = delete;

  // Logs what `text()` returns, for something that user `uid` did; it is called only for a line that is
  // written.
  template <class Text>
  void debug(uid_t uid, const Text& text) {
    write(spdlog::level::debug, uid, text);
  }
  template <class Text>
  void info(uid_t uid, const Text& text) {
    write(spdlog::level::info, uid, text);
  }
  template <class Text>
  void warn(uid_t uid, const Text& text) {
    write(spdlog::level::warn, uid, text);
  }
  template <class Text>
  void write(spdlog::level::level_enum level, uid_t uid, const Text& text) {
    if (spdlog::should_log(level) && may_write(uid)) spdlog::log(level, "{}", text());
  }

  // Nothing keeps the loop running from now on; what was left out and not told is told at the end.
  void stop() noexcept;

 private:
  [[nodiscard]] bool may_write(uid_t uid);
  void tell();

  LogBudget budget_;
  boost::asio::steady_timer tell_;
  bool is_waiting_ = false;  // to tell
  bool is_stopping_ = false;
};

}  // namespace cowmgr
