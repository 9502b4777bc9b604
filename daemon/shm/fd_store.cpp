#include "daemon/shm/fd_store.hpp"

#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <memory>
#include <system_error>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include "proto/segment.hpp"
#include "proto/segment_file.hpp"

namespace cowmgr {
namespace {

// sd-daemon allocates with malloc(3), and leaves it to the caller to free.
struct Free {
  void operator()(void* memory) const noexcept {
    std::free(memory);  // NOLINT(cppcoreguidelines-no-malloc,cppcoreguidelines-owning-memory): see above
  }
};
template <class T>
using Freed = std::unique_ptr<T, Free>;

}  // namespace

std::vector<FdStore::Kept> FdStore::take_kept() {
  std::vector<Kept> kept;
  char** list = nullptr;
  const int count = ::sd_listen_fds_with_names(1, &list);
  const Freed<char*> names(list);
  for (int i = 0; i < count; ++i) {
    UniqueFd fd(SD_LISTEN_FDS_START + i);
    const Freed<char> text(list[i]);
    const auto name = parse_segment_file_name(text.get());
    if (!is_on_ || !name || name->instance != instance_) continue;
    stored_.insert(name->id);
    kept.push_back({name->id, std::move(fd)});
  }
  return kept;
}

void FdStore::note_kept(std::uint64_t id) {
  known_.insert(id);
}

void FdStore::keep(std::uint64_t id, int fd) {
  if (!is_on_ || known_.erase(id) > 0) return;
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) {
    if (!std::exchange(has_run_out_, true))
      spdlog::warn("{}, and maybe others after it, is not kept by the service manager: {}",
                   segment_name(instance_, id), std::generic_category().message(errno));
    return;
  }
  has_run_out_ = false;
  if (!stored_.insert(id).second) changes_.push_back({id, UniqueFd()});
  changes_.push_back({id, std::move(copy)});
}

void FdStore::forget(std::uint64_t id) {
  known_.erase(id);
  if (stored_.erase(id) == 0) return;
  changes_.push_back({id, UniqueFd()});
}

void FdStore::forget_all() {
  for (const std::uint64_t id : std::set(stored_)) forget(id);
}

void FdStore::tell(const std::vector<Change>& changes) const {
  for (const auto& [id, copy] : changes) {
    const std::string name = segment_name(instance_, id).substr(1);
    const std::string text = fmt::format("{}=1\nFDNAME={}", copy ? "FDSTORE" : "FDSTOREREMOVE", name);
    const int fd = copy.get();
    const int rc = ::sd_pid_notify_with_fds(0, 0, text.c_str(), &fd, copy ? 1 : 0);
    if (rc >= 0 || has_failed_.exchange(true)) continue;
    spdlog::warn(
        "the service manager does not take descriptors: {}; arrays whose files are removed will not survive "
        "a restart",
        std::generic_category().message(-rc));
  }
}

}  // namespace cowmgr
