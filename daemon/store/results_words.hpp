// What ResultSets refuses with, in words: for its own files alone.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "daemon/store/results.hpp"
#include "proto/text.hpp"

namespace cowmgr::results_words {

[[nodiscard]] inline tl::unexpected<Error> refuse(Errc code, std::string message) {
  return cowmgr::fail(code, std::move(message));
}

[[nodiscard]] inline tl::unexpected<Error> no_such_set(std::string_view name) {
  return refuse(Errc::not_found, fmt::format("there is no result set {}; it goes with the process that made "
                                             "it, unless it is detached or done",
                                             printable(name)));
}

[[nodiscard]] inline tl::unexpected<Error> not_yours(const ResultSetRecord& set, std::string_view what) {
  return refuse(Errc::permission_denied,
                fmt::format("result set {} belongs to user {} with mode {:04o}, which does not let you {}",
                            printable(set.name), set.owner.uid, set.owner.mode, what));
}

[[nodiscard]] inline std::string failure_of(SlotIndex slot, std::string_view reason) {
  return fmt::format("slot {}: {}", slot, reason);
}

}  // namespace cowmgr::results_words
