// cowmgr: the daemon.

#include <csignal>
#include <filesystem>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include "daemon/config.hpp"
#include "daemon/core.hpp"
#include "daemon/lock_file.hpp"
#include "daemon/server.hpp"
#include "proto/fd_socket.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

constexpr double kDefaultShare = 0.8;  // of what /dev/shm can hold: the rest of the system uses it too

void set_up_log(const Config& config) {
  auto logger = spdlog::stderr_color_mt("cowmgr");
  spdlog::set_default_logger(logger);
  spdlog::set_level(spdlog::level::from_str(config.log_level));
  spdlog::set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %^%l%$ %v");
}

// Each array takes two descriptors, each client one or two.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// A lease that breaks is read from a signalfd, which needs the signal blocked, in every thread to come.
void block_lease_signal() {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, lease_signal());
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

// Takes the place of a daemon that is gone. The lock says that it is: only its holder may remove the socket.
Result<UniqueFd> take_socket(const Config& config) {
  std::error_code ignored;
  const std::filesystem::path path(config.socket);
  std::filesystem::create_directories(path.parent_path(), ignored);
  struct stat info {};
  if (::lstat(config.socket.c_str(), &info) == 0 && !S_ISSOCK(info.st_mode)) {
    return fail(
        Errc::already_exists,
        fmt::format("{} exists and is not a socket; remove it, or choose another --socket", config.socket));
  }
  const auto live = connect_to(config.socket);
  if (!live && live.error().code == Errc::invalid_argument) return error_of(live);
  if (live || live.error().code != Errc::no_daemon) {
    return fail(Errc::busy, fmt::format("another program serves {}; choose another --socket", config.socket));
  }
  ::unlink(config.socket.c_str());
  return listen_at(config.socket, config.socket_mode);
}

tl::unexpected<Error> cannot_lock(const Error& error, const std::string& what, std::string_view flag) {
  if (error.code == Errc::busy)
    return fail(Errc::busy, fmt::format("{} is in use: {}; stop that daemon, or choose another {}", what,
                                        error.message, flag));
  return fail(error.code,
              fmt::format("{} cannot be locked: {}; choose another {}", what, error.message, flag));
}

Result<void> serve_until_stopped(Config& config) {
  auto instance_lock = LockFile::acquire(fmt::format("/dev/shm/cowmgr.{}.lock", config.instance));
  if (!instance_lock) {
    return cannot_lock(instance_lock.error(), fmt::format("instance '{}'", config.instance), "--instance");
  }
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(config.socket).parent_path(), ignored);
  auto socket_lock = LockFile::acquire(config.socket + ".lock");
  if (!socket_lock) {
    return cannot_lock(socket_lock.error(), fmt::format("socket {}", config.socket), "--socket");
  }
  const ShmEnv env(config.instance, lease_signal());
  if (!env.has_leases()) {
    if (config.needs_verified)
      return fail(Errc::unsupported,
                  "the kernel gives no leases here, and --protection verified was asked for");
    spdlog::warn(
        "the kernel gives no leases here: that sealed arrays are immutable is not proven (protection: "
        "advisory)");
  }
  if (const auto removed = env.remove_leftovers(); removed > 0) {
    spdlog::warn("removed {} segment(s) of a daemon of instance '{}' that did not stop by itself", removed,
                 config.instance);
  }
  if (config.capacity_bytes == 0) {
    config.capacity_bytes =
        static_cast<std::uint64_t>(static_cast<double>(env.space().total_bytes) * kDefaultShare);
  }
  if (config.capacity_bytes > env.space().total_bytes) {
    spdlog::warn("the capacity of {} is more than /dev/shm can hold ({})", format_size(config.capacity_bytes),
                 format_size(env.space().total_bytes));
  }
  auto listener = take_socket(config);
  if (!listener) return error_of(std::move(listener));
  asio::io_context io(1);
  Core core(io, config, env);
  Server server(io, core, *std::move(listener));
  spdlog::info("cowmgr {} serves instance '{}' at {}, capacity {}, protection {}", kVersion, config.instance,
               config.socket, format_size(config.capacity_bytes), env.has_leases() ? "verified" : "advisory");
  ::sd_notify(0, "READY=1");
  if (config.parent_fd >= 0 && ::write(config.parent_fd, "r", 1) != 1)
    spdlog::debug("the parent is gone already");
  server.run();
  ::sd_notify(0, "STOPPING=1");
  ::unlink(config.socket.c_str());
  env.remove_leftovers();
  spdlog::info("stopped");
  return {};
}

}  // namespace
}  // namespace cowmgr

int main(int argc, char** argv) {
  cowmgr::Config config;
  if (const auto rc = cowmgr::parse_config(argc, argv, config)) return *rc;
  cowmgr::set_up_log(config);
  cowmgr::raise_descriptor_limit();
  cowmgr::block_lease_signal();
  std::signal(SIGIO, SIG_IGN);  // what the kernel sends for a broken lease when its queue of signals is full
  std::signal(SIGPIPE, SIG_IGN);  // whoever read the log, or started an embedded daemon, may be gone
  const auto ok = cowmgr::serve_until_stopped(config);
  // An embedded daemon's directory is its own; it goes once the lock file in it has gone.
  std::error_code ignored;
  if (config.parent_fd >= 0)
    std::filesystem::remove(std::filesystem::path(config.socket).parent_path(), ignored);
  if (!ok) {
    spdlog::error("{}", ok.error().message);
    return 1;
  }
  return 0;
}
