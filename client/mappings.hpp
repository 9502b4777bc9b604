// Segments as this process has them mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>

#include "cowmgr/array.hpp"
#include "cowmgr/info.hpp"
#include "proto/errors.hpp"
#include "proto/mapping.hpp"

namespace cowmgr::detail {

// The data of a mapped segment: that of an array, or of the array that a dense set becomes.
template <class Info>
[[nodiscard]] std::span<std::byte> data_of(const Mapping& mapping, const Info& info) noexcept {
  return {mapping.data() + info.data_offset, info.data_bytes};
}

// Where the data ends in the segment.
template <class Info>
[[nodiscard]] std::uint64_t data_end(const Info& info) noexcept {
  return info.data_offset + info.data_bytes;
}

// Maps a whole segment of `segment_bytes`, as the daemon says, whose data end at `data_end`. Errors:
// protocol_error when it cannot have them; as Mapping::map().
[[nodiscard]] Result<Mapping> map_segment(int fd, std::uint64_t segment_bytes, std::uint64_t data_end,
                                          Access access);

// The shared views of this process: one mapping for each array, however many views there are. A forked child
// has those of its parent. Takes pool_mutex() itself.
class SharedMappings {
 public:
  // A mapping of an array: of a shared view the one that this process has of it, or a new one of `fd`.
  [[nodiscard]] Result<std::shared_ptr<Mapping>> map(const ArrayInfo& info, int fd, View view);
  void keep(std::uint64_t id, const std::shared_ptr<Mapping>& mapping) noexcept;
  // To be called when a mapping may have gone, so that nothing of it stays behind.
  void forget(std::uint64_t id) noexcept;

 private:
  std::unordered_map<std::uint64_t, std::weak_ptr<Mapping>> mappings_;
};

}  // namespace cowmgr::detail
