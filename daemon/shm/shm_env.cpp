#include "daemon/shm/shm_env.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <filesystem>
#include <span>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>

#include <boost/interprocess/permissions.hpp>
#include <boost/interprocess/shared_memory_object.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "daemon/shm/state_change.hpp"
#include "proto/checksum.hpp"
#include "proto/mapping.hpp"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; newer than Debian 12's libc
#endif

namespace cowmgr {
namespace {

namespace ipc = boost::interprocess;
namespace fs = std::filesystem;

constexpr const char* kShmDirectory = "/dev/shm";  // where glibc's shm_open(3) puts its objects
constexpr long kCachestat = 451;  // SYS_cachestat: Linux 6.5, one number for all architectures
constexpr std::uint64_t kBackingStepBytes = std::uint64_t{8} << 20;  // between two looks at `stop`
constexpr std::size_t kCopyBytes = std::size_t{1} << 20;             // at a time; the same

// The descriptor of a shared memory object, owned beyond the object's life.
Result<UniqueFd> fd_of(const ipc::shared_memory_object& object, std::string_view name) {
  if (auto ok = check_descriptors(); !ok) return error_of(ok);
  UniqueFd fd(::fcntl(object.get_mapping_handle().handle, F_DUPFD_CLOEXEC, 0));
  if (!fd) return tl::unexpected(os_error("fcntl(F_DUPFD_CLOEXEC)", name, errno));
  return fd;
}

// Whether there was such a name, and it is gone. Nobody asks again for the rest of the daemon's life, and a
// name that stays keeps its memory: so once more when the kernel was short of something.
bool unlink_object(const std::string& name) noexcept {
  if (::shm_unlink(name.c_str()) == 0 || (errno != ENOENT && ::shm_unlink(name.c_str()) == 0)) {
    note_state_change();
    return true;
  }
  if (errno == ENOENT) return false;
  spdlog::error("{} cannot be removed: {}", name, std::generic_category().message(errno));
  return false;
}

Result<UniqueFd> create_object(const std::string& name) {
  try {
    auto fd = fd_of({ipc::create_only, name.c_str(), ipc::read_write, ipc::permissions(kModeWriting)}, name);
    note_state_change();
    if (!fd) (void)unlink_object(name);  // it was made, but there is no descriptor left to own it with
    return fd;
  } catch (const ipc::interprocess_exception& error) {
    return tl::unexpected(os_error("shm_open", name, error.get_native_error()));
  }
}

Result<UniqueFd> open_object(const std::string& name, ipc::mode_t mode = ipc::read_only) {
  try {
    return fd_of({ipc::open_only, name.c_str(), mode}, name);
  } catch (const ipc::interprocess_exception& error) {
    return tl::unexpected(os_error("shm_open", name, error.get_native_error()));
  }
}

// The same file, opened anew. The link leads to it whether it has a name or not (proc(5)).
Result<UniqueFd> open_again(int kept) {
  const std::string path = fmt::format("/proc/self/fd/{}", kept);
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return tl::unexpected(os_error("open", path, errno));
  return fd;
}

Result<void> write_at(int fd, std::string_view name, std::span<const std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const auto count = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return tl::unexpected(os_error("pwrite", name, errno));
    note_state_change();
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
  return {};
}

// The bytes from `offset` on; fewer at the end of the file. With pread(2): a file that was cut short gives
// fewer bytes, where a mapping would give SIGBUS.
Result<std::span<std::byte>> read_at(int fd, std::string_view name, std::span<std::byte> buffer,
                                     std::uint64_t offset) {
  ssize_t count = 0;
  do count = ::pread(fd, buffer.data(), buffer.size(), static_cast<off_t>(offset));
  while (count < 0 && errno == EINTR);
  if (count < 0) return tl::unexpected(os_error("pread", name, errno));
  return buffer.first(static_cast<std::size_t>(count));
}

// Whether the file holds exactly `wanted` at `offset`.
Result<bool> holds_at(int fd, std::string_view name, std::span<const std::byte> wanted,
                      std::uint64_t offset) {
  std::array<std::byte, kMaxDataOffset> pages{};
  COWMGR_ASSERT(wanted.size() <= pages.size());
  const auto bytes = read_at(fd, name, std::span(pages).first(wanted.size()), offset);
  if (!bytes) return error_of(bytes);
  return std::ranges::equal(*bytes, wanted);
}

// Gives `take` the data of a segment piece by piece, each with its offset in the file. Errors: disconnected
// after `stop` is set, corrupted for a file that is shorter, and those of `take`.
template <class Take>
Result<void> for_each_piece(const Segment& segment, const DataRange& data, const std::atomic<bool>& stop,
                            const Take& take) {
  std::vector<std::byte> buffer(std::min<std::uint64_t>(kCopyBytes, data.size_bytes));
  const std::uint64_t end = data.offset + data.size_bytes;
  for (std::uint64_t offset = data.offset; offset < end;) {
    if (stop) return fail(Errc::disconnected, "the daemon stops");
    const auto wanted = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), end - offset));
    const auto piece = read_at(segment.reader.get(), segment.name, wanted, offset);
    if (!piece) return error_of(piece);
    if (piece->empty()) return fail(Errc::corrupted, fmt::format("{} was cut short", segment.name));
    if (auto ok = take(*piece, offset); !ok) return ok;
    offset += piece->size();
  }
  return {};
}

// Memory behind the end of the file, where fallocate(2) with KEEP_SIZE puts it: it counts among the file's
// blocks, so it could make up for a hole. 0 where the kernel does not tell, which it does since Linux 6.5.
std::uint64_t bytes_behind_end(int fd, std::uint64_t size_bytes) {
  const std::array<std::uint64_t, 2> range = {size_bytes, 0};  // offset, length; 0: all that follows
  std::array<std::uint64_t, 5> pages{};  // cached, dirty, being written, evicted, evicted recently
  if (::syscall(kCachestat, fd, range.data(), pages.data(), 0) != 0) return 0;
  return (pages[0] + pages[3]) * kPageBytes;
}

tl::unexpected<Error> not_ours(std::string_view name, uid_t owner) {
  return fail(
      Errc::permission_denied,
      fmt::format("{} belongs to user {}, or is no file; this daemon left no such thing", name, owner));
}

// Whether the daemon's user made the file of that name. Anybody can take a name, with what cannot even be
// opened.
Result<void> check_file(const std::string& name) {
  struct stat info {};
  if (::lstat((kShmDirectory + name).c_str(), &info) != 0)
    return tl::unexpected(os_error("lstat", name, errno));
  if (info.st_uid != ::geteuid() || !S_ISREG(info.st_mode)) return not_ours(name, info.st_uid);
  return {};
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

Result<void> allocate(const Segment& segment, std::uint64_t offset, std::uint64_t size_bytes) {
  int rc = 0;
  do rc = ::fallocate(segment.writer.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(size_bytes));
  while (rc != 0 && errno == EINTR);
  if (rc != 0) return tl::unexpected(os_error("fallocate", segment.name, errno));
  note_state_change();
  return {};
}

// Whether nobody but this open file (open(2)) has the file open or mapped: else the kernel gives no write
// lease (fcntl(2), F_SETLEASE; fs/locks.c, check_conflicting_open). Who got a duplicate of the descriptor, or
// mapped it, is not counted: ask with one that never left the daemon. The lease ends with the descriptor;
// until then nobody else can open the file (45 s at most, proc_sys_fs(5)).
bool has_one_holder(int fd) noexcept {
  return ::fcntl(fd, F_SETLEASE, F_WRLCK) == 0;
}

// Whether both are of one file.
bool is_same_inode(const struct stat& one, const struct stat& other) {
  return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

}  // namespace

Result<Segment> reader_of(const Segment& segment) {
  Segment copy{.name = segment.name, .size_bytes = segment.size_bytes};
  if (auto ok = check_descriptors(); !ok) return error_of(ok);
  copy.reader = UniqueFd(::dup(segment.reader.get()));
  if (!copy.reader) return tl::unexpected(os_error("dup", segment.name, errno));
  return copy;
}

bool is_same_file(const Segment& one, const Segment& other) noexcept {
  struct stat first {};
  struct stat second {};
  return ::fstat(one.reader.get(), &first) == 0 && ::fstat(other.reader.get(), &second) == 0 &&
         is_same_inode(first, second);
}

std::uint64_t random_id() noexcept {
  constexpr int kIdBits = 47;  // exact in a double too, for whoever reads JSON
  std::uint64_t id = 0;
  if (::getrandom(&id, sizeof id, 0) != static_cast<ssize_t>(sizeof id)) return 0;
  return id >> (64 - kIdBits);
}

ShmEnv::ShmEnv(std::string instance, int lease_signal, MemoryGroups groups)
    : instance_(std::move(instance)),
      lease_signal_(lease_signal),
      groups_(std::move(groups)),
      has_leases_(probe_leases()) {}

bool ShmEnv::probe_leases() const {
  // Named as a segment that nobody can foresee: it goes with the leftovers if the daemon is killed here.
  Segment probe{.name = segment_name(instance_, random_id())};
  const auto try_out = [&]() -> Result<void> {
    if (const auto writer = create_object(probe.name); !writer) return error_of(writer);
    auto lease = open_object(probe.name);
    if (!lease) return error_of(std::move(lease));
    probe.lease = *std::move(lease);
    return {};
  };
  const auto made = try_out();
  const auto leased = made ? take_lease(probe) : made;
  unlink(probe);
  if (leased) return true;
  // Nothing was learned of leases; if there are none, every seal will say so.
  if (!made || leased.error().code == Errc::out_of_memory) {
    spdlog::warn("whether the kernel gives leases could not be tried out: {}", leased.error().message);
    return true;
  }
  return false;
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

Result<std::size_t> ShmEnv::remove_leftovers() const {
  const auto ids = list();
  if (!ids) return error_of(ids);
  return static_cast<std::size_t>(std::count_if(ids->begin(), ids->end(), [&](std::uint64_t id) {
    const std::string name = segment_name(instance_, id);
    return check_file(name).has_value() && unlink_object(name);
  }));
}

Result<std::vector<std::uint64_t>> ShmEnv::list() const {
  std::vector<std::uint64_t> ids;
  std::error_code error;
  for (fs::directory_iterator at(kShmDirectory, error); at != fs::directory_iterator(); at.increment(error)) {
    const auto name = parse_segment_file_name(at->path().filename().native());
    if (name && name->instance == instance_ && !name->is_quarantined) ids.push_back(name->id);
  }
  if (error) return tl::unexpected(os_error("readdir", kShmDirectory, error.value()));
  std::sort(ids.begin(), ids.end());
  return ids;
}

Result<ShmEnv::Found> ShmEnv::find(std::uint64_t id) const {
  const std::string name = segment_name(instance_, id);
  if (auto ok = check_file(name); !ok) return error_of(std::move(ok));
  return look_at(id, [&] { return open_object(name); });
}

Result<ShmEnv::Found> ShmEnv::find(std::uint64_t id, const UniqueFd& kept) const {
  return look_at(id, [&] { return open_again(kept.get()); });
}

template <class Open>
Result<ShmEnv::Found> ShmEnv::look_at(std::uint64_t id, const Open& open) const {
  Found found{.id = id, .segment = {.name = segment_name(instance_, id)}, .file = {}};
  auto reader = open();
  if (!reader) return error_of(std::move(reader));
  found.segment.reader = *std::move(reader);
  auto file = read_segment_file(found.segment.reader.get(), id);
  if (!file) return error_of(std::move(file));
  found.file = *std::move(file);
  found.segment.size_bytes = found.file.size_bytes;
  if (found.file.file_owner != ::geteuid()) return not_ours(found.segment.name, found.file.file_owner);
  found.is_free = found.file.kind == SegmentFile::Kind::sealed && found.file.is_draining &&
                  has_one_holder(found.segment.reader.get());
  if (found.is_free) return found;
  auto lease = open();
  if (!lease) return error_of(std::move(lease));
  found.segment.lease = *std::move(lease);
  return found;
}

Result<void> ShmEnv::prove_sealed(const Segment& segment) const {
  return has_leases_ ? take_lease(segment) : Result<void>();
}

// For the moment of the open(2) the file's owner, the daemon's user, may open it for writing: nobody who
// could not do this by himself.
Result<void> ShmEnv::open_writer(Segment& segment) const {
  struct stat info {};
  if (::fstat(segment.reader.get(), &info) != 0)
    return tl::unexpected(os_error("fstat", segment.name, errno));
  const mode_t marks = info.st_mode & (kMarkSealed | kMarkPinned | kMarkDraining);
  if (::fchmod(segment.reader.get(), kModeOpening | marks) != 0)
    return tl::unexpected(os_error("fchmod", segment.name, errno));
  note_state_change();
  auto writer = open_object(segment.name, ipc::read_write);
  auto marked = mark(segment, marks);
  if (!marked) marked = mark(segment, marks);  // once more: nobody would ask for it later
  if (!marked) return marked;
  if (!writer) return error_of(std::move(writer));
  segment.writer = *std::move(writer);
  return {};
}

Result<void> ShmEnv::quarantine(std::uint64_t id) const {
  const std::string from = kShmDirectory + segment_name(instance_, id);
  const std::string to = kShmDirectory + quarantine_name(instance_, id);
  if (::rename(from.c_str(), to.c_str()) != 0) return tl::unexpected(os_error("rename", from, errno));
  note_state_change();
  return {};
}

ShmEnv::Space ShmEnv::space() const noexcept {
  struct statvfs info {};
  if (::statvfs(kShmDirectory, &info) != 0) return {};
  return {info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize};
}

bool ShmEnv::has_name(std::uint64_t id) const noexcept {
  struct stat info {};
  return ::lstat((kShmDirectory + segment_name(instance_, id)).c_str(), &info) == 0;
}

Result<Segment> ShmEnv::create(std::uint64_t id, std::uint64_t size_bytes, std::string_view header,
                               std::span<const std::byte> trailer, const std::atomic<bool>& stop) const {
  Segment segment{.name = segment_name(instance_, id), .size_bytes = size_bytes};
  const auto fill = [&]() -> Result<void> {
    auto writer = create_object(segment.name);
    if (!writer) return error_of(std::move(writer));
    segment.writer = *std::move(writer);
    if (::ftruncate(segment.writer.get(), static_cast<off_t>(size_bytes)) != 0) {
      return tl::unexpected(os_error("ftruncate", segment.name, errno));
    }
    note_state_change();
    if (auto backed = back(segment, stop); !backed) return backed;
    const int fd = segment.writer.get();
    if (auto ok = write_at(fd, segment.name, bytes_of(header), 0); !ok) return ok;
    if (auto ok = write_at(fd, segment.name, trailer, size_bytes - trailer.size()); !ok) return ok;
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
  const std::uint64_t more_bytes = new_size_bytes - segment.size_bytes;
  if (auto ok = GroupBudget(groups_, more_bytes).take(more_bytes); !ok) return ok;
  auto grown = allocate(segment, segment.size_bytes, more_bytes);
  if (!grown) ::ftruncate(segment.writer.get(), static_cast<off_t>(segment.size_bytes));
  return grown;
}

// Backs whole huge pages with huge pages where the kernel lets us, and the rest, or all, with small ones.
// Measured on 8 GiB: small pages take 11 to 25 s to back and 1.3 s to free, huge ones 0.4 s and 0.02 s.
Result<void> ShmEnv::back(const Segment& segment, const std::atomic<bool>& stop) const {
  const std::uint64_t huge_end = segment.size_bytes / kHugePageBytes * kHugePageBytes;
  Mapping window;
  if (huge_end > 0) {
    // Where the address space is limited (RLIMIT_AS) there is no window: then all pages are small.
    auto mapped = Mapping::map(segment.writer.get(), segment.size_bytes, Access::read_only);
    if (mapped) window = *std::move(mapped);
  }
  GroupBudget budget(groups_, segment.size_bytes);
  for (std::uint64_t step = 0; step < segment.size_bytes; step += kBackingStepBytes) {
    if (stop) return fail(Errc::disconnected, "the peer went away while its memory was being reserved");
    const std::uint64_t step_end = std::min(step + kBackingStepBytes, segment.size_bytes);
    if (auto ok = budget.take(step_end - step); !ok) return ok;
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

Result<bool> ShmEnv::prove(Segment& segment, std::string_view header, const TrailerPage& trailer) const {
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
  const auto has_header = holds_at(fd, segment.name, bytes_of(header), 0);
  if (!has_header) return error_of(has_header);
  if (!*has_header) return refuse("the header");
  const auto has_trailer = holds_at(fd, segment.name, trailer, trailer_offset);
  if (!has_trailer) return error_of(has_trailer);
  if (!*has_trailer) return refuse("the trailer");
  return true;
}

// The mark is the commit point: a daemon that dies before leaves an array that was being written, after, a
// sealed one.
Result<bool> ShmEnv::seal(Segment& segment, std::string_view header, const TrailerPage& trailer,
                          bool is_pinned) const {
  auto proven = prove(segment, header, trailer);
  if (!proven || !*proven) return proven;
  if (auto marked = mark_pinned(segment, is_pinned); !marked) return error_of(std::move(marked));
  return true;
}

Result<Segment> ShmEnv::rewrite(const Segment& segment, std::uint64_t id, std::string_view header,
                                const TrailerPage& trailer, const std::atomic<bool>& stop) const {
  auto copy = create(id, segment.size_bytes, header, trailer, stop);
  if (!copy) return copy;
  const auto fill = [&]() -> Result<void> {
    const DataRange data{header.size(), segment.size_bytes - header.size() - kTrailerBytes};  // up to a page
    auto copied = for_each_piece(segment, data, stop, [&](auto piece, std::uint64_t offset) {
      return write_at(copy->writer.get(), copy->name, piece, offset);
    });
    if (!copied) return copied;
    const auto proven = prove(*copy, header, trailer);
    if (!proven) return error_of(proven);
    if (!*proven) return fail(Errc::still_writable, fmt::format("{} can be written", copy->name));
    return {};
  };
  if (auto filled = fill(); !filled) {
    remove(*std::move(copy));
    return error_of(filled);
  }
  return copy;
}

Result<std::uint64_t> ShmEnv::checksum(const Segment& segment, const DataRange& data,
                                       const std::atomic<bool>& stop) const {
  Checksum checksum;
  auto read = for_each_piece(segment, data, stop, [&](auto piece, std::uint64_t /*offset*/) {
    checksum.add(piece);
    return Result<void>();
  });
  if (!read) return error_of(read);
  return checksum.value();
}

Result<void> ShmEnv::mark_slots(const Segment& segment) const {
  return mark(segment, kMarkSealed);
}

Result<void> ShmEnv::mark_pinned(const Segment& segment, bool is_pinned) const {
  return mark(segment, is_pinned ? kMarkSealed | kMarkPinned : kMarkSealed);
}

Result<void> ShmEnv::mark_draining(const Segment& segment) const {
  return mark(segment, kMarkSealed | kMarkDraining);
}

Result<void> ShmEnv::mark(const Segment& segment, mode_t marks) const {
  if (::fchmod(segment.reader.get(), kModeWriting | marks) != 0)
    return tl::unexpected(os_error("fchmod", segment.name, errno));
  note_state_change();
  return {};
}

UniqueFd ShmEnv::watch_names() const {
  UniqueFd watch(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (watch && ::inotify_add_watch(watch.get(), kShmDirectory, IN_DELETE | IN_MOVED_FROM | IN_ONLYDIR) >= 0)
    return watch;
  spdlog::warn("that somebody removes a segment from {} will not be noticed: {}", kShmDirectory,
               std::generic_category().message(errno));
  return {};
}

ShmEnv::Removals ShmEnv::read_removals(int watch_fd) const {
  Removals removals;
  alignas(inotify_event) std::array<std::byte, 4096> buffer{};
  for (ssize_t bytes = 0; (bytes = ::read(watch_fd, buffer.data(), buffer.size())) > 0;) {
    for (std::size_t at = 0; at < static_cast<std::size_t>(bytes);) {
      inotify_event event{};
      std::memcpy(&event, buffer.data() + at, sizeof event);
      const char* text = reinterpret_cast<const char*>(buffer.data() + at + sizeof event);
      at += sizeof event + event.len;
      if ((event.mask & IN_Q_OVERFLOW) != 0) removals.all = true;
      if (event.len == 0) continue;
      const auto name = parse_segment_file_name(text);
      if (name && name->instance == instance_ && !name->is_quarantined) removals.ids.push_back(name->id);
    }
  }
  return removals;
}

bool ShmEnv::has_lost_name(const Segment& segment) noexcept {
  struct stat named {};
  struct stat ours {};
  if (::fstat(segment.reader.get(), &ours) != 0) return false;
  if (::lstat((kShmDirectory + segment.name).c_str(), &named) != 0) return errno == ENOENT;
  return !is_same_inode(named, ours);
}

// F_GETLEASE tells the type that a lease is being broken to (fs/locks.c, fcntl_getlease). What cannot be told
// is no lease that one can rely on.
bool ShmEnv::is_lease_broken(int lease_fd) noexcept {
  return ::fcntl(lease_fd, F_GETLEASE) != F_RDLCK;
}

void ShmEnv::end_lease(int lease_fd) noexcept {
  ::fcntl(lease_fd, F_SETLEASE, F_UNLCK);
}

void ShmEnv::unlink(const Segment& segment) const noexcept {
  if (!segment.name.empty()) (void)unlink_object(segment.name);
}

void ShmEnv::remove(Segment segment) const noexcept {
  unlink(segment);
}

bool ShmEnv::try_remove(Segment& segment) const noexcept {
  const Others others = has_leases_ ? others_with(segment) : Others::unknown;
  if (others == Others::some) return false;
  unlink(segment);
  // Whoever looked the name up just before waits in open(2), and has the file when the lease is gone.
  const int lease = others == Others::none ? ::fcntl(segment.lease.get(), F_GETLEASE) : F_WRLCK;
  if (lease >= 0 && lease != F_WRLCK) {
    end_lease(segment.lease.get());
    segment.name.clear();
    return false;
  }
  segment = {};
  return true;
}

// Only the lease's descriptor stays, which never leaves the daemon: what readers and writers were given may
// live on with them. EAGAIN is the refusal. Where leases were switched off meanwhile
// (/proc/sys/fs/leases-enable), or the kernel has no memory for one, nobody knows.
ShmEnv::Others ShmEnv::others_with(Segment& segment) const noexcept {
  if (!segment.lease) {
    auto lease = open_again(segment.reader ? segment.reader.get() : segment.writer.get());
    if (!lease) return Others::some;
    segment.lease = *std::move(lease);
  }
  segment.reader.reset();
  segment.writer.reset();
  const int fd = segment.lease.get();
  ::fcntl(fd, F_SETSIG, lease_signal_);
  if (has_one_holder(fd)) return Others::none;
  if (errno != EAGAIN) return Others::unknown;
  end_lease(fd);  // who opens it for writing now does no harm, and shall not wait
  return Others::some;
}

}  // namespace cowmgr
