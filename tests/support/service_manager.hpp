// What systemd is to a service: it hears that the service is ready, and keeps descriptors for it that it
// hands to the next one (sd_notify(3), sd_listen_fds(3)).
#pragma once

#include <string>
#include <sys/types.h>
#include <utility>
#include <vector>

#include "proto/unique_fd.hpp"

namespace cowmgr::test {

class ServiceManager {
 public:
  // Listens at `path`, which goes with this object.
  explicit ServiceManager(std::string path);
  ~ServiceManager();
  ServiceManager(const ServiceManager&) = delete;
  ServiceManager& operator=(const ServiceManager&) = delete;

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  // Waits until the service, process `pid`, is ready. False when it ends before, or the deadline is over.
  [[nodiscard]] bool await_ready(pid_t pid);

  // The descriptors in store by their names, in the order in which they came.
  using Stored = std::vector<std::pair<std::string, UniqueFd>>;
  // After all that the service has said by now.
  [[nodiscard]] const Stored& stored();
  [[nodiscard]] std::vector<std::string> names();
  // As if the service had asked for it.
  void store(const std::string& name, const UniqueFd& fd);

 private:
  // One message, if there is one.
  bool hear();
  void obey(const std::string& message, const std::vector<UniqueFd>& fds);

  std::string path_;
  UniqueFd socket_;
  bool is_ready_ = false;
  Stored stored_;
};

}  // namespace cowmgr::test
