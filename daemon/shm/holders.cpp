// What /proc tells of a segment: who can still write to it, and what memory stands behind it.
#include <cerrno>
#include <charconv>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <system_error>

#include <fmt/format.h>

#include "daemon/shm/shm_env.hpp"
#include "proto/mapping.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace cowmgr {
namespace {

namespace fs = std::filesystem;

// "the kernel's view of this file" in the form that /proc/<pid>/maps writes it: device and inode.
struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
  friend bool operator==(const FileId&, const FileId&) = default;
};

FileId id_of(const struct stat& info) {
  return {info.st_dev, info.st_ino};
}

bool is_same_file(const fs::path& path, const FileId& file) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 && id_of(info) == file;
}

// Opened for writing, as /proc/<pid>/fdinfo/<fd> says: "flags:\t0100002" in octal (proc(5)).
bool is_writable_fd(const fs::path& fdinfo) {
  std::ifstream in(fdinfo);
  for (std::string key, value; in >> key >> value;) {
    if (key == "flags:") return (std::stoul(value, nullptr, 8) & O_ACCMODE) != O_RDONLY;
  }
  return false;
}

// The link is read first: stat(2) would follow descriptors into file systems that do not answer.
bool has_writable_fd(const fs::path& process, const FileId& file, const std::string& name) {
  std::error_code ignored;
  for (const auto& fd : fs::directory_iterator(process / "fd", ignored)) {
    if (fs::read_symlink(fd.path(), ignored).native().find(name) == std::string::npos) continue;
    if (is_same_file(fd.path(), file) && is_writable_fd(process / "fdinfo" / fd.path().filename()))
      return true;
  }
  return false;
}

// A shared mapping with write permission ("rw-s", "rwxs") of the segment's inode. The device is not compared:
// maps shows it in another form, and no other file system of a mapping with our name has this inode.
bool has_writable_mapping(const fs::path& process, const FileId& file, const std::string& name) {
  std::ifstream in(process / "maps");
  for (std::string line; std::getline(in, line);) {
    if (line.find(name) == std::string::npos) continue;
    const auto space = line.find(' ');
    const std::string mode = line.substr(space + 1, 4);
    const bool is_shared_writable = mode.size() == 4 && mode[1] == 'w' && mode[3] == 's';
    if (is_shared_writable && line.find(fmt::format(" {} ", file.inode)) != std::string::npos) return true;
  }
  return false;
}

std::string command_of(const fs::path& process) {
  std::ifstream in(process / "comm");
  std::string command;
  std::getline(in, command);
  return command;
}

std::uint64_t huge_bytes_mapped(const std::byte* address) {
  std::ifstream in("/proc/self/smaps");
  const std::string start = fmt::format("{:x}-", reinterpret_cast<std::uintptr_t>(address));
  bool is_ours = false;
  for (std::string line; std::getline(in, line);) {
    if (line.compare(0, start.size(), start) == 0) is_ours = true;
    if (!is_ours || line.rfind("ShmemPmdMapped:", 0) != 0) continue;
    return std::stoull(line.substr(15)) << 10U;  // in KiB
  }
  return 0;
}

}  // namespace

std::vector<Holder> ShmEnv::writers_of(const Segment& segment) const {
  struct stat info {};
  if (::fstat(segment.reader.get(), &info) != 0) return {};
  const FileId file = id_of(info);
  std::vector<Holder> holders;
  std::error_code ignored;
  for (const auto& process : fs::directory_iterator("/proc", ignored)) {
    const std::string text = process.path().filename();
    pid_t pid = 0;
    if (std::from_chars(text.data(), text.data() + text.size(), pid).ptr != text.data() + text.size())
      continue;
    if (has_writable_fd(process, file, segment.name) || has_writable_mapping(process, file, segment.name)) {
      holders.push_back({pid, command_of(process)});
    }
  }
  return holders;
}

Result<SegmentUsage> ShmEnv::usage(const Segment& segment) const {
  struct stat info {};
  if (::fstat(segment.reader.get(), &info) != 0)
    return tl::unexpected(os_error("fstat", segment.name, errno));
  SegmentUsage usage{.resident_bytes = static_cast<std::uint64_t>(info.st_blocks) * 512};
  auto mapped = Mapping::map(segment.reader.get(), segment.size_bytes, Access::read_only);
  if (!mapped) return error_of(std::move(mapped));
  // Populating one page maps the whole huge page that it lies in, if it lies in one; smaps counts those. A
  // read of our own would be SIGBUS if the file were cut short meanwhile; this is an error that we ignore.
  for (std::uint64_t offset = 0; offset < segment.size_bytes; offset += kHugePageBytes) {
    ::madvise(mapped->data() + offset, kPageBytes, MADV_POPULATE_READ);
  }
  usage.huge_bytes = huge_bytes_mapped(mapped->data());
  return usage;
}

}  // namespace cowmgr
