// cowmgr: the daemon.

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include "daemon/config.hpp"
#include "daemon/core/core.hpp"
#include "daemon/core/log.hpp"
#include "daemon/peers/server.hpp"
#include "daemon/shm/descriptors.hpp"
#include "daemon/store/recovery.hpp"
#include "proto/fd_socket.hpp"
#include "proto/instance_lock.hpp"
#include "proto/lock_file.hpp"
#include "proto/standard_streams.hpp"
#include "proto/text.hpp"
#include "proto/version.hpp"

namespace cowmgr {
namespace {

constexpr double kDefaultShare = 0.8;  // of what there is: others use it too

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
  if (error.code != Errc::busy)
    return fail(error.code, fmt::format("{} cannot be locked: {}", what, error.message));
  return fail(Errc::busy, fmt::format("{} is in use: {}; stop that daemon, or choose another {}", what,
                                      error.message, flag));
}

tl::unexpected<Error> cannot_look(const Error& error, const ShmEnv& env) {
  return fail(error.code, fmt::format("what an earlier daemon of instance '{}' left cannot be looked at: {}; "
                                      "all of it stays for a daemon that can",
                                      env.instance(), error.message));
}

// What an earlier daemon of the instance left, whether it was killed or stopped.
Result<void> take_over(const ShmEnv& env, Core& core, Housekeeping& housekeeping) {
  if (core.purges) {
    (void)core.fd_store.take_kept();
    core.fd_store.forget_all();
    core.fd_store.tell(core.fd_store.take_changes());
    const auto removed = env.remove_leftovers();
    if (!removed) return cannot_look(removed.error(), env);
    if (*removed > 0)
      spdlog::warn("removed {} segment(s) that an earlier daemon of instance '{}' left", *removed,
                   env.instance());
    return {};
  }
  auto recovered = recover(env, core.store, core.results, core.fd_store, Core::moment());
  if (!recovered) return cannot_look(recovered.error(), env);
  Recovery& recovery = *recovered;
  housekeeping.look_after_arrays();
  if (recovery.arrays + recovery.sets + recovery.unsealed + recovery.quarantined + recovery.foreign == 0)
    return {};
  spdlog::info(
      "of an earlier daemon of instance '{}': {} array(s), {}, are served again{}{}; {} result set(s) go on, "
      "{} array(s) were being written, {} session(s) may come back within {} s; {} damaged moved aside, "
      "{} left alone",
      env.instance(), recovery.arrays - recovery.tampered, format_size(recovery.array_bytes),
      recovery.tampered > 0 ? fmt::format(", {} can be written and are not", recovery.tampered) : "",
      recovery.unlinked > 0 ? fmt::format(", {} had lost their files", recovery.unlinked) : "", recovery.sets,
      recovery.unsealed, recovery.awaited.size(), core.config.grace.count(), recovery.quarantined,
      recovery.foreign);
  housekeeping.await_sessions(recovery.awaited);
  return {};
}

// Decides on the capacity where none was asked for, and tells of one that there is no memory for.
Result<void> choose_capacity(Config& config, const ShmEnv& env, const MemoryGroups& groups) {
  const std::uint64_t total_bytes = env.space().total_bytes;
  const auto lowest = groups.lowest_limit();
  if (config.capacity_bytes == 0)
    config.capacity_bytes = static_cast<std::uint64_t>(
        static_cast<double>(std::min(total_bytes, lowest.limit_bytes)) * kDefaultShare);
  if (config.capacity_bytes == 0)
    return fail(Errc::os_failure, "how much /dev/shm can hold cannot be found out; say it with --capacity");
  if (total_bytes > 0 && config.capacity_bytes > total_bytes)
    spdlog::warn("the capacity of {} is more than /dev/shm can hold ({})", format_size(config.capacity_bytes),
                 format_size(total_bytes));
  if (config.capacity_bytes > lowest.limit_bytes)
    spdlog::warn("the capacity of {} is more than the control group {} may use ({})",
                 format_size(config.capacity_bytes), lowest.group, format_size(lowest.limit_bytes));
  return {};
}

Result<void> serve_until_stopped(Config& config) {
  auto instance_lock = InstanceLock::acquire(config.instance);
  if (!instance_lock) {
    return cannot_lock(instance_lock.error(), fmt::format("instance '{}'", config.instance), "--instance");
  }
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(config.socket).parent_path(), ignored);
  auto socket_lock = LockFile::acquire(config.socket + ".lock");
  if (!socket_lock) {
    return cannot_lock(socket_lock.error(), fmt::format("socket {}", config.socket), "--socket");
  }
  const MemoryGroups groups(config.cgroup_root);
  const ShmEnv env(config.instance, lease_signal(), groups);
  if (!env.has_leases()) {
    if (config.needs_verified)
      return fail(Errc::unsupported,
                  "the kernel gives no leases here, and --protection verified was asked for");
    spdlog::warn(
        "the kernel gives no leases here: that sealed arrays are immutable is not proven (protection: "
        "advisory)");
  }
  if (auto ok = choose_capacity(config, env, groups); !ok) return ok;
  auto listener = take_socket(config);
  if (!listener) return error_of(std::move(listener));
  // One thread uses the sockets; the pool's threads only post what they have done.
  asio::io_context io(BOOST_ASIO_CONCURRENCY_HINT_UNSAFE_IO);
  Core core(io, config, env);
  Housekeeping housekeeping(core);
  UniqueFd names = env.watch_names();
  if (auto taken = take_over(env, core, housekeeping); !taken) {
    ::unlink(config.socket.c_str());
    return taken;
  }
  Server server(io, core, housekeeping, *std::move(listener), std::move(names));
  spdlog::info("cowmgr {} serves instance '{}' at {}, capacity {}, protection {}", kVersion, config.instance,
               config.socket, format_size(config.capacity_bytes), env.has_leases() ? "verified" : "advisory");
  ::sd_notify(0, "READY=1");
  if (config.parent_fd >= 0 && ::write(config.parent_fd, "r", 1) != 1)
    spdlog::debug("the parent is gone already");
  server.run();
  ::sd_notify(0, "STOPPING=1");
  ::unlink(config.socket.c_str());
  if (core.purges) {
    if (const auto removed = env.remove_leftovers(); !removed)
      spdlog::error("the arrays stay: {}", removed.error().message);
    core.fd_store.forget_all();
    core.fd_store.tell(core.fd_store.take_changes());
  }
  spdlog::info("stopped");
  return {};
}

}  // namespace
}  // namespace cowmgr

int main(int argc, char** argv) {
  cowmgr::occupy_standard_streams();
  cowmgr::Config config;
  if (const auto rc = cowmgr::parse_config(argc, argv, config)) return *rc;
  cowmgr::block_lease_signal();
  std::signal(SIGIO, SIG_IGN);  // what the kernel sends for a broken lease when its queue of signals is full
  std::signal(SIGXFSZ, SIG_IGN);  // a segment, or the log, that a limit of file sizes forbids is an error
  std::signal(SIGPIPE, SIG_IGN);  // whoever read the log, or started an embedded daemon, may be gone
  config.quota = cowmgr::limits_within(cowmgr::claim_descriptors(), config.quota);
  const cowmgr::Log log({.level = config.log_level});
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
