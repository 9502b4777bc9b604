// Which names a request means, and what finding them may cost.
//
// A pattern is held against every name that there is. That is work of the loop's, so it is counted in steps
// and done in slices: of a listing a slice is a page, of a change it is a part of one request, with others'
// requests in between.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "proto/glob.hpp"

namespace cowmgr {

// A step takes about a nanosecond (glob.hpp). A slice ends with the entry that uses it up, of at most 64
// patterns.
inline constexpr std::uint64_t kSliceSteps = std::uint64_t{1} << 18;
inline constexpr std::uint64_t kEntrySteps =
    64;  // to come to an entry of a table, a miss of the cache or two
inline constexpr std::size_t kChangedAtOnce = 32;  // arrays: two or three system calls each
// Of one request. 64 ordinary patterns against 65,536 names take a fifth of that.
inline constexpr std::uint64_t kRequestSteps = std::uint64_t{1} << 28;

// What a listing is of: one name, or what matches a pattern.
struct NameFilter {
  std::optional<std::string> name{};
  Glob pattern = Glob::any();

  [[nodiscard]] bool takes(std::string_view other, std::uint64_t& steps) const noexcept {
    return name ? other == *name : pattern.matches(other, steps);
  }
};

// Part of a listing. It may have fewer entries than were asked for, or none, and not be the last.
template <class Record>
struct Listing {
  std::vector<const Record*> entries{};
  std::uint64_t next = 0;  // ask again for what comes after that id; 0: there is no more
};

// The page of `table`, which is in order of ids, that follows the id `after`: up to `limit` entries, as many
// as a slice finds.
template <class Record, class Table, class MayRead>
[[nodiscard]] Listing<Record> listing_of(const Table& table, std::uint64_t after, std::size_t limit,
                                         const NameFilter& filter, const MayRead& may_read) {
  Listing<Record> page;
  std::uint64_t steps = 0;
  auto at = table.upper_bound(after);
  for (; at != table.end() && page.entries.size() < limit && steps < kSliceSteps; ++at) {
    steps += kEntrySteps;
    page.next = at->first;
    if (filter.takes(at->second.name, steps) && may_read(at->second)) page.entries.push_back(&at->second);
  }
  if (at == table.end()) page.next = 0;
  return page;
}

// What a request to change arrays is about, and how far the search for it has come.
struct Selection {
  std::vector<std::string> names{};  // spelled out
  std::vector<Glob> patterns{};

  std::uint64_t after = 0;  // arrays up to this id were held against the patterns
  std::uint64_t steps = 0;
  std::vector<std::uint64_t> ids{};    // that match one, in ascending order; in the end all
  std::set<std::size_t> is_matched{};  // which of the patterns something matches
  bool is_complete = false;            // the names are among the ids
  std::size_t named = 0;               // so many of them, the first ones; all are done in one turn
  std::size_t next = 0;                // of the ids, the first that is left to do
  bool is_idle = false;                // what is used by now stays
};

}  // namespace cowmgr
