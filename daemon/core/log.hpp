// The daemon's log: what spdlog's functions are given goes to a descriptor, and nobody waits for whoever
// reads that.
//
// 1. A thread of its own writes. Lines that it has not written yet wait in a queue of bounded length; when
// that
//    is full, the oldest go.
// 2. What was dropped is counted: the next line that is written has one before it that says how many.
// 3. At its end it writes what is left as long as somebody reads it, and then no more: a full pipe holds no
//    program up.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <unistd.h>

namespace spdlog::details {
class thread_pool;
}

namespace cowmgr {

class LogSink;

struct LogOptions {
  std::string level = "info";               // as --log-level
  int fd = STDERR_FILENO;                   // borrowed; may be shared with other programs
  std::size_t max_lines = 1024;             // that wait
  std::chrono::milliseconds patience{500};  // at the end, with whoever reads
};

class Log {
 public:
  // Makes this spdlog's default logger. To be made when signals are blocked that no thread shall get.
  explicit Log(const LogOptions& options);
  // Nothing may be logged afterwards.
  ~Log();
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

 private:
  std::chrono::milliseconds patience_;
  std::shared_ptr<spdlog::details::thread_pool> thread_;
  std::shared_ptr<LogSink> sink_;
};

}  // namespace cowmgr
