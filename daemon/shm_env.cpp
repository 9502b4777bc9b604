#include "daemon/shm_env.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <dirent.h>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <span>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <boost/interprocess/permissions.hpp>
#include <boost/interprocess/shared_memory_object.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "proto/mapping.hpp"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; newer than Debian 12's libc
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace cowmgr {
namespace {

namespace ipc = boost::interprocess;
namespace fs = std::filesystem;

constexpr const char* kShmDirectory = "/dev/shm";  // where glibc's shm_open(3) puts its objects
constexpr long kCachestat = 451;  // SYS_cachestat: Linux 6.5, one number for all architectures
constexpr std::uint64_t kBackingStepBytes = std::uint64_t{8} << 20;  // between two looks at `stop`

// The descriptor of a shared memory object, owned beyond the object's life.
Result<UniqueFd> fd_of(const ipc::shared_memory_object& object, std::string_view name) {
  UniqueFd fd(::fcntl(object.get_mapping_handle().handle, F_DUPFD_CLOEXEC, 0));
  if (!fd) return tl::unexpected(os_error("fcntl(F_DUPFD_CLOEXEC)", name, errno));
  return fd;
}

Result<UniqueFd> create_object(const std::string& name) {
  try {
    auto fd = fd_of({ipc::create_only, name.c_str(), ipc::read_write, ipc::permissions(0400)}, name);
    if (!fd) ::shm_unlink(name.c_str());  // it was made, but there is no descriptor left to own it with
    return fd;
  } catch (const ipc::interprocess_exception& error) {
    return tl::unexpected(os_error("shm_open", name, error.get_native_error()));
  }
}

Result<UniqueFd> open_object(const std::string& name) {
  try {
    return fd_of({ipc::open_only, name.c_str(), ipc::read_only}, name);
  } catch (const ipc::interprocess_exception& error) {
    return tl::unexpected(os_error("shm_open", name, error.get_native_error()));
  }
}

Result<void> write_at(int fd, std::string_view name, std::span<const std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const auto count = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return tl::unexpected(os_error("pwrite", name, errno));
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
  return {};
}

// Whether the file holds exactly `wanted` at `offset`. Reads with pread(2): a file that was cut short gives
// fewer bytes, where a mapping would give SIGBUS.
bool holds_at(int fd, std::span<const std::byte> wanted, std::uint64_t offset) {
  std::array<std::byte, kPageBytes> page{};
  COWMGR_ASSERT(wanted.size() <= page.size());
  const auto count = ::pread(fd, page.data(), wanted.size(), static_cast<off_t>(offset));
  return count == static_cast<ssize_t>(wanted.size()) &&
         std::equal(wanted.begin(), wanted.end(), page.begin());
}

// Memory behind the end of the file, where fallocate(2) with KEEP_SIZE puts it: it counts among the file's
// blocks, so it could make up for a hole. 0 where the kernel does not tell, which it does since Linux 6.5.
std::uint64_t bytes_behind_end(int fd, std::uint64_t size_bytes) {
  const std::array<std::uint64_t, 2> range = {size_bytes, 0};  // offset, length; 0: all that follows
  std::array<std::uint64_t, 5> pages{};  // cached, dirty, being written, evicted, evicted recently
  if (::syscall(kCachestat, fd, range.data(), pages.data(), 0) != 0) return 0;
  return (pages[0] + pages[3]) * kPageBytes;
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

Result<void> allocate(const Segment& segment, std::uint64_t offset, std::uint64_t size_bytes) {
  int rc = 0;
  do rc = ::fallocate(segment.writer.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(size_bytes));
  while (rc != 0 && errno == EINTR);
  if (rc != 0) return tl::unexpected(os_error("fallocate", segment.name, errno));
  return {};
}

// "the kernel's view of this file" in the form that /proc/<pid>/maps writes it: device and inode.
struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
};

bool is_same_file(const fs::path& path, const FileId& file) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 && info.st_dev == file.device && info.st_ino == file.inode;
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

std::uint64_t random_id() noexcept {
  constexpr int kIdBits = 47;  // exact in a double too, for whoever reads JSON
  std::uint64_t id = 0;
  if (::getrandom(&id, sizeof id, 0) != static_cast<ssize_t>(sizeof id)) return 0;
  return id >> (64 - kIdBits);
}

ShmEnv::ShmEnv(std::string instance, int lease_signal)
    : instance_(std::move(instance)), lease_signal_(lease_signal), has_leases_(probe_leases()) {}

bool ShmEnv::probe_leases() const {
  // Named as a segment that nobody can foresee: it goes with the leftovers if the daemon is killed here.
  Segment probe{.name = segment_name(instance_, random_id())};
  if (auto fd = create_object(probe.name)) probe.writer = *std::move(fd);
  if (auto fd = open_object(probe.name)) probe.lease = *std::move(fd);
  probe.writer.reset();
  const bool granted = probe.lease && take_lease(probe).has_value();
  unlink(probe);
  return granted;
}

Result<void> ShmEnv::take_lease(const Segment& segment) const {
  const int fd = segment.lease.get();
  // Without F_SETSIG the kernel sends SIGIO, whose default action kills, and which does not tell the
  // descriptor.
  if (::fcntl(fd, F_SETSIG, lease_signal_) != 0)
    return tl::unexpected(os_error("fcntl(F_SETSIG)", segment.name, errno));
  if (::fcntl(fd, F_SETLEASE, F_RDLCK) == 0) return {};
  if (errno == EAGAIN) return fail(Errc::still_writable, "the kernel refuses the lease: somebody can write");
  return tl::unexpected(os_error("fcntl(F_SETLEASE)", segment.name, errno));
}

std::size_t ShmEnv::remove_leftovers() const {
  const std::string prefix = fmt::format("cowmgr.{}.", instance_);
  std::size_t removed = 0;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(kShmDirectory, ignored)) {
    const std::string file = entry.path().filename();
    const bool is_segment = file.size() == prefix.size() + 16 &&
                            file.compare(0, prefix.size(), prefix) == 0 &&
                            file.find_first_not_of("0123456789abcdef", prefix.size()) == std::string::npos;
    if (is_segment && ::shm_unlink(("/" + file).c_str()) == 0) ++removed;
  }
  return removed;
}

ShmEnv::Space ShmEnv::space() const noexcept {
  struct statvfs info {};
  if (::statvfs(kShmDirectory, &info) != 0) return {};
  return {info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize};
}

Result<Segment> ShmEnv::create(std::uint64_t id, std::uint64_t size_bytes, std::string_view header,
                               const std::atomic<bool>& stop) const {
  Segment segment{.name = segment_name(instance_, id), .size_bytes = size_bytes};
  const auto fill = [&]() -> Result<void> {
    auto writer = create_object(segment.name);
    if (!writer) return error_of(std::move(writer));
    segment.writer = *std::move(writer);
    if (::ftruncate(segment.writer.get(), static_cast<off_t>(size_bytes)) != 0) {
      return tl::unexpected(os_error("ftruncate", segment.name, errno));
    }
    if (auto backed = back(segment, stop); !backed) return backed;
    if (auto ok = write_at(segment.writer.get(), segment.name, bytes_of(header), 0); !ok) return ok;
    auto reader = open_object(segment.name);
    auto lease = open_object(segment.name);
    if (!reader) return error_of(std::move(reader));
    if (!lease) return error_of(std::move(lease));
    segment.reader = *std::move(reader);
    segment.lease = *std::move(lease);
    return {};
  };
  if (auto filled = fill(); !filled) {
    if (segment.writer) remove(std::move(segment));
    return error_of(std::move(filled));
  }
  return segment;
}

Result<void> ShmEnv::grow(const Segment& segment, std::uint64_t new_size_bytes) const {
  COWMGR_ASSERT(new_size_bytes > segment.size_bytes);
  auto grown = allocate(segment, segment.size_bytes, new_size_bytes - segment.size_bytes);
  if (!grown) ::ftruncate(segment.writer.get(), static_cast<off_t>(segment.size_bytes));
  return grown;
}

// Backs whole huge pages with huge pages where the kernel lets us, and the rest, or all, with small ones.
// Measured on 8 GiB: small pages take 11 to 25 s to back and 1.3 s to free, huge ones 0.4 s and 0.02 s.
Result<void> ShmEnv::back(const Segment& segment, const std::atomic<bool>& stop) const {
  const std::uint64_t huge_end = segment.size_bytes / kHugePageBytes * kHugePageBytes;
  Mapping window;
  if (huge_end > 0) {
    auto mapped = Mapping::map(segment.writer.get(), segment.size_bytes, Access::read_only);
    if (!mapped) return error_of(std::move(mapped));
    window = *std::move(mapped);
  }
  for (std::uint64_t step = 0; step < segment.size_bytes; step += kBackingStepBytes) {
    if (stop) return fail(Errc::disconnected, "the peer went away while its memory was being reserved");
    const std::uint64_t step_end = std::min(step + kBackingStepBytes, segment.size_bytes);
    const std::uint64_t huge_step_end = std::min(step_end, huge_end);
    std::uint64_t backed = step;
    if (window.data() != nullptr && back_huge(segment, window.data(), step, huge_step_end))
      backed = huge_step_end;
    if (backed == step_end) continue;
    if (auto ok = allocate(segment, backed, step_end - backed); !ok) return ok;
  }
  return {};
}

// MADV_COLLAPSE makes a huge page of each range that has at least one page, for an ordinary user and whatever
// the transparent huge page settings say (madvise(2), Linux 6.1). fallocate makes that one page: touching it
// would be SIGBUS when the file system is full. One call for many ranges: each call makes every processor
// give up its batch of fresh pages (lru_add_drain_all), which the neighbours feel.
bool ShmEnv::back_huge(const Segment& segment, std::byte* base, std::uint64_t begin,
                       std::uint64_t end) const {
  if (begin >= end) return false;
  for (std::uint64_t offset = begin; offset < end; offset += kHugePageBytes) {
    if (!allocate(segment, offset, kPageBytes)) return false;
  }
  if (::madvise(base + begin, end - begin, MADV_COLLAPSE) == 0) return true;
  // What is missing here gets small pages. EINVAL does not say why: a kernel that does not know this, or just
  // as well a file system with less room than a huge page. So each step tries again, at one call in 32 MiB.
  if (errno == EINVAL && space().free_bytes >= kHugePageBytes && !has_told_.exchange(true)) {
    spdlog::info("no huge pages: this kernel does not collapse shared memory; arrays get {} byte pages",
                 kPageBytes);
  }
  return false;
}

Result<bool> ShmEnv::seal(Segment& segment, std::string_view header, const TrailerPage& trailer) const {
  const std::uint64_t trailer_offset = segment.size_bytes - kTrailerBytes;
  if (segment.writer) {
    auto ok = write_at(segment.writer.get(), segment.name, trailer, trailer_offset);
    if (!ok) return error_of(std::move(ok));
    segment.writer.reset();
  }
  if (has_leases_) {
    auto leased = take_lease(segment);
    if (!leased && leased.error().code == Errc::still_writable) return false;
    if (!leased) return error_of(std::move(leased));
  }
  // From here on nobody can write. What the writer may have done before is checked now.
  struct stat info {};
  const int fd = segment.lease.get();
  const auto refuse = [&](std::string_view what) {
    return fail(Errc::corrupted, fmt::format("{} of {} was overwritten by its writer; put the array again",
                                             what, segment.name));
  };
  if (::fstat(fd, &info) != 0) return tl::unexpected(os_error("fstat", segment.name, errno));
  if (static_cast<std::uint64_t>(info.st_size) != segment.size_bytes) return refuse("the size");
  const std::uint64_t backed_bytes = static_cast<std::uint64_t>(info.st_blocks) * 512;
  if (backed_bytes < segment.size_bytes + bytes_behind_end(fd, segment.size_bytes))
    return refuse("the backing memory");
  if (!holds_at(fd, bytes_of(header), 0)) return refuse("the header");
  if (!holds_at(fd, trailer, trailer_offset)) return refuse("the trailer");
  return true;
}

// F_GETLEASE tells the type that a lease is being broken to (fs/locks.c, fcntl_getlease).
bool ShmEnv::is_lease_broken(int lease_fd) noexcept {
  return ::fcntl(lease_fd, F_GETLEASE) == F_UNLCK;
}

void ShmEnv::end_lease(const Segment& segment) const noexcept {
  ::fcntl(segment.lease.get(), F_SETLEASE, F_UNLCK);
}

void ShmEnv::unlink(const Segment& segment) const noexcept {
  ::shm_unlink(segment.name.c_str());
}

void ShmEnv::remove(Segment segment) const noexcept {
  unlink(segment);
}

std::vector<Holder> ShmEnv::writers_of(const Segment& segment) const {
  struct stat info {};
  if (::fstat(segment.reader.get(), &info) != 0) return {};
  const FileId file{info.st_dev, info.st_ino};
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
