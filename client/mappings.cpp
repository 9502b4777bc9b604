#include "client/mappings.hpp"

#include <mutex>
#include <new>

#include "client/fork_guard.hpp"

namespace cowmgr::detail {

Result<Mapping> map_segment(int fd, std::uint64_t segment_bytes, std::uint64_t data_end, Access access) {
  if (segment_bytes < data_end)
    return fail(Errc::protocol_error, "the daemon's description of a segment contradicts itself");
  return Mapping::map(fd, segment_bytes, access);
}

Result<std::shared_ptr<Mapping>> SharedMappings::map(const ArrayInfo& info, int fd, View view) {
  const bool is_shared = view == View::shared;
  if (is_shared) {
    const std::lock_guard lock(pool_mutex());
    if (const auto at = mappings_.find(info.id); at != mappings_.end()) {
      if (auto mapping = at->second.lock()) return mapping;
    }
  }
  auto mapped = map_segment(fd, info.segment_bytes, data_end(info),
                            is_shared ? Access::read_only : Access::copy_on_write);
  if (!mapped) return error_of(std::move(mapped));
  auto mapping = std::make_shared<Mapping>(*std::move(mapped));
  if (is_shared) keep(info.id, mapping);
  return mapping;
}

void SharedMappings::keep(std::uint64_t id, const std::shared_ptr<Mapping>& mapping) noexcept {
  const std::lock_guard lock(pool_mutex());
  try {
    mappings_[id] = mapping;
  } catch (const std::bad_alloc&) {  // the next view gets a mapping of its own
  }
}

void SharedMappings::forget(std::uint64_t id) noexcept {
  const std::lock_guard lock(pool_mutex());
  if (const auto at = mappings_.find(id); at != mappings_.end() && at->second.expired()) mappings_.erase(at);
}

}  // namespace cowmgr::detail
