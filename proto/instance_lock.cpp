#include "proto/instance_lock.hpp"

#include <cerrno>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <fmt/format.h>

namespace cowmgr {
namespace {

std::string name_of(std::string_view instance) {
  return fmt::format("cowmgr.{}", instance);
}

std::string file_of(std::string_view instance, const std::string& directory) {
  return fmt::format("{}/{}.lock", directory, name_of(instance));
}

// What is wrong with the directory, and the cure; empty when this is none of its faults.
std::string harm_of(const std::string& directory) {
  struct stat info {};
  struct statvfs space {};
  if (::stat(directory.c_str(), &info) != 0 && errno == ENOENT)
    return fmt::format(
        "there is no {0}, which holds the arrays; mount one: `mkdir -p {0} && mount -t tmpfs -o "
        "mode=1777 tmpfs {0}`, or give the container one",
        directory);
  if (info.st_mode != 0 && !S_ISDIR(info.st_mode))
    return fmt::format("{} is no directory; mount a tmpfs there", directory);
  if (::statvfs(directory.c_str(), &space) == 0 && (space.f_flag & ST_RDONLY) != 0)
    return fmt::format(
        "{0}, which holds the arrays, is mounted read-only; mount it for writing: `mount -o "
        "remount,rw {0}`, or give the container a /dev/shm of its own",
        directory);
  if (::access(directory.c_str(), R_OK | W_OK | X_OK) != 0)
    return fmt::format(
        "user {1} may not read and write {0}, which holds the arrays; as root: `chmod 1777 {0}`", directory,
        ::geteuid());
  return {};
}

tl::unexpected<Error> explain(const Error& error, const std::string& directory) {
  const std::string harm = error.code == Errc::busy ? "" : harm_of(directory);
  if (!harm.empty()) return cowmgr::fail(error.code, harm);
  if (error.code != Errc::permission_denied) return tl::unexpected(error);
  return cowmgr::fail(error.code, fmt::format("{}; the file is another user's: remove it, or choose another "
                                              "--instance",
                                              error.message));
}

}  // namespace

Result<InstanceLock> InstanceLock::acquire(std::string_view instance, const std::string& directory) {
  auto file = LockFile::acquire(file_of(instance, directory));
  // A directory that is full takes no new file: to free memory there, one must be able to start the daemon.
  const bool has_no_room = !file && file.error().code == Errc::out_of_memory;
  if (!file && !has_no_room) return explain(file.error(), directory);
  auto name = DirectoryLock::acquire(directory, name_of(instance));
  const bool has_no_name = !name && name.error().code == Errc::unsupported;
  if (!name && !has_no_name) return explain(name.error(), directory);
  if (has_no_room && has_no_name) return explain(file.error(), directory);
  std::optional<LockFile> held_file;
  std::optional<DirectoryLock> held_name;
  if (file) held_file.emplace(*std::move(file));
  if (name) held_name.emplace(*std::move(name));
  return InstanceLock(std::move(held_file), std::move(held_name));
}

std::optional<pid_t> InstanceLock::holder_of(std::string_view instance, const std::string& directory) {
  if (const auto pid = LockFile::holder_of(file_of(instance, directory))) return pid;
  return DirectoryLock::holder_of(directory, name_of(instance));
}

}  // namespace cowmgr
