// Which protocol this side speaks. Specified in README.md beside this file, "Versions".
#pragma once

#include <cstdint>
#include <string_view>

namespace cowmgr {

// Grows when an older peer could not understand a newer one. A daemon refuses every other version.
inline constexpr std::uint32_t kProtocolVersion = 1;

inline constexpr std::string_view kVersion = COWMGR_VERSION;

}  // namespace cowmgr
