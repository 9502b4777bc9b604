// Another process, for what must not happen in the test's own: it does something, and says how that went.
#pragma once

#include <array>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <functional>
#include <optional>
#include <sched.h>
#include <string>
#include <sys/mount.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr {

struct Pipe {
  UniqueFd reader;
  UniqueFd writer;

  Pipe() {
    std::array<int, 2> fds{};
    COWMGR_ASSERT(::pipe2(fds.data(), O_CLOEXEC) == 0);
    reader.reset(fds[0]);
    writer.reset(fds[1]);
  }
};

inline void write_all(int fd, const std::string& text) {
  COWMGR_ASSERT(::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
}

inline std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> part{};
  for (ssize_t count = 0; (count = ::read(fd, part.data(), part.size())) > 0;) {
    text.append(part.data(), static_cast<std::size_t>(count));
  }
  return text;
}

// What can be read now, at most a few bytes; waits for the first.
inline std::string read_some(int fd) {
  std::array<char, 16> part{};
  const ssize_t count = ::read(fd, part.data(), part.size());
  return {part.data(), count > 0 ? static_cast<std::size_t>(count) : 0};
}

// A forked child that runs `work`, and is killed when this goes, unless it has ended before.
class Forked {
 public:
  explicit Forked(const std::function<std::string()>& work) : pid_(::fork()) {
    COWMGR_ASSERT(pid_ >= 0);
    if (pid_ > 0) {
      said_.writer.reset();
      return;
    }
    said_.reader.reset();
    write_all(said_.writer.get(), work());
    ::_exit(0);
  }
  Forked(const Forked&) = delete;
  Forked& operator=(const Forked&) = delete;
  ~Forked() { kill(); }

  [[nodiscard]] pid_t pid() const noexcept { return pid_; }

  // What `work` returned; waits for its end.
  [[nodiscard]] std::string said() { return read_all(said_.reader.get()); }

  // SIGKILL; returns when the process is gone, with all that it held.
  void kill() noexcept {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  Pipe said_;
  pid_t pid_;
};

// Runs `work` in a child and returns what it said.
inline std::string say_in_fork(const std::function<std::string()>& work) {
  return Forked(work).said();
}

inline void write_file(const std::string& path, const std::string& text) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (fd) write_all(fd.get(), text);
}

// A mount namespace of this process alone; as an ordinary user, within a user namespace where that is
// allowed.
inline bool enter_private_mounts() {
  const std::string uid_map = fmt::format("0 {} 1", ::geteuid());
  const std::string gid_map = fmt::format("0 {} 1", ::getegid());
  if (::unshare(CLONE_NEWNS) != 0) {
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    write_file("/proc/self/setgroups", "deny");
    write_file("/proc/self/uid_map", uid_map);
    write_file("/proc/self/gid_map", gid_map);
  }
  return ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
}

// Runs `work` in a child whose /dev/shm is a file system of its own, of `size_bytes`: full soon, and
// harmless. Nothing where this user may not have one.
inline std::optional<std::string> say_in_small_shm(std::uint64_t size_bytes,
                                                   const std::function<std::string()>& work) {
  constexpr const char* kRefused = "no private /dev/shm";
  const std::string said = say_in_fork([&] {
    const std::string options = fmt::format("size={},mode=1777", size_bytes);
    if (!enter_private_mounts()) return std::string(kRefused);
    if (::mount("tmpfs", "/dev/shm", "tmpfs", 0, options.c_str()) != 0) return std::string(kRefused);
    return work();
  });
  if (said == kRefused) return std::nullopt;
  return said;
}

}  // namespace cowmgr
