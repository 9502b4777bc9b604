// The memory of a result set's segment, without the segment: zero, at the start of a page, with its header.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "proto/result_segment.hpp"
#include "proto/segment.hpp"

namespace cowmgr {

class ResultMemory {
 public:
  ResultMemory(std::uint64_t set, std::uint64_t slots, std::uint64_t value_bytes)
      : layout_(result_layout(slots, value_bytes)), pages_(layout_.max_bytes / kPageBytes), set_(set) {
    write_result_header(data(), {.set = set, .slots = slots, .name = "set"}, layout_);
  }

  [[nodiscard]] std::byte* data() noexcept { return pages_.front().bytes.data(); }
  [[nodiscard]] const std::byte* data() const noexcept { return pages_.front().bytes.data(); }
  [[nodiscard]] const ResultLayout& layout() const noexcept { return layout_; }
  // As a reader sees it.
  [[nodiscard]] ResultSegment segment() const {
    const auto opened = ResultSegment::open(data(), set_);
    COWMGR_ASSERT(opened.has_value());
    return *opened;
  }

 private:
  struct alignas(kPageBytes) Page {
    std::array<std::byte, kPageBytes> bytes{};
  };

  ResultLayout layout_;
  std::vector<Page> pages_;
  std::uint64_t set_;
};

// The value or the reason that a slot holds, as text.
inline std::string text_of(const ResultSegment& segment, std::uint64_t slot) {
  const auto bytes = segment.value(segment.slot(slot));
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline void PrintTo(SlotState state, std::ostream* out) {
  constexpr std::array<const char*, 4> kNames = {"free", "leased", "committed", "failed"};
  *out << kNames.at(static_cast<std::size_t>(state));
}
inline void PrintTo(SlotContent content, std::ostream* out) {
  constexpr std::array<const char*, 5> kNames = {"none", "rows", "value", "array", "reason"};
  *out << kNames.at(static_cast<std::size_t>(content));
}
inline void PrintTo(const Rows& rows, std::ostream* out) {
  *out << "rows " << rows.begin << " to " << rows.end;
}

}  // namespace cowmgr
