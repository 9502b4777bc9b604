// A forked process that plays its part of a test, step by step with the test: words over a socket, no sleeps.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <utility>

#include "proto/unique_fd.hpp"

namespace cowmgr::test {

// One end of the line between a test and its child. Each word is one record.
class Link {
 public:
  explicit Link(UniqueFd socket) : socket_(std::move(socket)) {}

  void say(std::string_view word) const;
  // The next word; empty when the other side is gone, or says nothing for too long.
  [[nodiscard]] std::string hear() const;
  // For the child: waits for a word that tells it to go on; ends the process when the test is gone.
  void await_word() const;

 private:
  UniqueFd socket_;
};

// Runs `script` in a child, which then exits: with 0, or 1 when it failed an expectation. Killed when this
// object goes, unless it was waited for. Move-only.
class Child {
 public:
  explicit Child(const std::function<void(const Link&)>& script);
  ~Child();
  Child(Child&& other) noexcept;
  Child& operator=(Child&& other) noexcept;
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  [[nodiscard]] pid_t pid() const noexcept { return pid_; }
  // Fails the test unless the child says just this next.
  void expect(std::string_view word) const;
  [[nodiscard]] std::string hear() const { return link_.hear(); }
  void tell(std::string_view word = "go on") const { link_.say(word); }
  // SIGKILL, and reaps it: all that the kernel does at a process's end is done.
  void kill();
  // Waits for its end. The exit code, or minus the signal that killed it.
  [[nodiscard]] int wait();

 private:
  pid_t pid_ = -1;
  Link link_;
};

}  // namespace cowmgr::test
