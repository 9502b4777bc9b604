// The bounds of single requests (see table.hpp), where a frame may say more than it is long.
#pragma once

#include <cstddef>

#include "proto/errors.hpp"
#include "proto/frames.hpp"
#include "proto/glob.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxPatterns = 64;  // each may be held against every name, in the loop
inline constexpr std::size_t kMaxPatternBytes = kMaxGlobBytes;
// As long as the header that NumPy reads may be (numpy.lib.format, max_header_size).
inline constexpr std::size_t kMaxDtypeBytes = 10'000;

// Errors: invalid_argument.
[[nodiscard]] Result<void> check_attach(const wire::Attach& table);
[[nodiscard]] Result<void> check_evict(const wire::Evict& table);
[[nodiscard]] Result<void> check_pin(const wire::Pin& table);
[[nodiscard]] Result<void> check_commit(const wire::CommitSlots& table);
[[nodiscard]] Result<void> check_give_back(const wire::GiveBackSlots& table);
[[nodiscard]] Result<void> check_hold(const wire::Hold& table);

}  // namespace cowmgr
