// Which arrays a request means: by name, by pattern, page by page.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/store/store.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

tl::unexpected<Error> too_long() {
  return fail(
      Errc::invalid_argument,
      "to hold these patterns against all names takes too long; ask for fewer at once, or for such as have "
      "fewer stars");
}

tl::unexpected<Error> is_pinned(const std::string& name) {
  return fail(Errc::pinned, fmt::format("array {} is pinned; unpin it first", printable(name)));
}

}  // namespace

Result<Selection> Store::names_or_patterns(const std::vector<std::string>& texts) const {
  Selection selection;
  for (const auto& text : texts) {
    if (current_of(text) != 0) {
      selection.names.push_back(text);
      continue;
    }
    auto pattern = Glob::parse(text);
    if (!pattern) return error_of(std::move(pattern));
    selection.patterns.push_back(*std::move(pattern));
  }
  return selection;
}

Result<bool> Store::search(SessionId session, Selection& selection) const {
  if (selection.patterns.empty()) return true;
  const std::uint64_t end = selection.steps + kSliceSteps;
  auto at = records_.upper_bound(selection.after);
  for (; at != records_.end() && selection.steps < end; ++at) {
    selection.steps += kEntrySteps;
    selection.after = at->first;
    hold_against_patterns(session, at->second, selection);
  }
  if (at == records_.end()) return true;
  if (selection.steps > kRequestSteps) return too_long();
  return false;
}

void Store::hold_against_patterns(SessionId session, const ArrayRecord& record, Selection& selection) const {
  if (!is_current(record) || !may(session, record, Right::write)) return;
  for (std::size_t i = 0; i < selection.patterns.size(); ++i) {
    const bool is_in = !selection.ids.empty() && selection.ids.back() == record.id;
    if (is_in && selection.is_matched.contains(i)) continue;
    if (!selection.patterns[i].matches(record.name, selection.steps)) continue;
    if (!is_in) selection.ids.push_back(record.id);
    selection.is_matched.insert(i);
  }
}

bool Store::is_current(const ArrayRecord& record) const {
  return record.state >= ArrayRecord::State::sealed && current_of(record.name) == record.id;
}

// What is spelled out is there and may be changed, or nothing is done. Once.
Result<void> Store::select_names(SessionId session, Selection& selection, bool may_be_gone) {
  if (selection.is_complete) return {};
  std::set<ArrayId> named;
  for (const auto& name : selection.names) {
    const ArrayId current = current_of(name);
    if (current == 0 && may_be_gone) continue;
    if (current == 0) return not_to_be_changed(name);
    if (auto ok = check_change(session, records_.at(current)); !ok) return ok;
    if (!std::ranges::binary_search(selection.ids, current)) named.insert(current);
  }
  for (std::size_t i = 0; i < selection.patterns.size(); ++i) {
    if (!selection.is_matched.contains(i) && !may_be_gone)
      return not_to_be_changed(selection.patterns[i].text());
  }
  selection.ids.insert(selection.ids.begin(), named.begin(), named.end());
  selection.named = named.size();
  selection.is_complete = true;
  return {};
}

// Some of what is left to do. Anything may have happened to it since it was found.
std::vector<ArrayRecord*> Store::take_selected(Selection& selection) {
  std::vector<ArrayRecord*> taken;
  const std::size_t at_once = std::max(kChangedAtOnce, selection.next == 0 ? selection.named : 0);
  const std::size_t end = std::min(selection.ids.size(), selection.next + at_once);
  for (; selection.next < end; ++selection.next) {
    const auto record = records_.find(selection.ids[selection.next]);
    if (record != records_.end() && is_current(record->second)) taken.push_back(&record->second);
  }
  return taken;
}

Result<bool> Store::evict_some(SessionId session, Selection& selection, Evicted& evicted,
                               std::optional<Time> asked) {
  const bool is_first = !selection.is_complete;
  if (auto ok = select_names(session, selection, asked.has_value()); !ok) return error_of(std::move(ok));
  if (is_first) {
    for (const auto& name : selection.names) {
      const ArrayId current = current_of(name);
      if (current == 0 || !records_.at(current).pinned) continue;
      if (!asked || records_.at(current).sealed < *asked) return is_pinned(name);
    }
  }
  for (ArrayRecord* record : take_selected(selection)) {
    if (asked && record->sealed >= *asked) continue;
    if (selection.is_idle && (record->views > 0 || record->pinned)) continue;
    if (record->pinned) {
      evicted.passed_over.push_back(record->name);
      continue;
    }
    evicted.names.push_back(record->name);
    if (record->views == 0) evicted.freed_bytes += record->segment_bytes();
    drain(*record);
  }
  if (selection.next < selection.ids.size()) return false;
  if (evicted.names.empty() && !evicted.passed_over.empty()) return is_pinned(evicted.passed_over.front());
  return true;
}

Result<bool> Store::pin_some(SessionId session, Selection& selection, bool pinned,
                             std::vector<std::string>& names) {
  if (auto ok = select_names(session, selection, false); !ok) return error_of(std::move(ok));
  for (ArrayRecord* record : take_selected(selection)) {
    if (auto marked = env_.mark_pinned(record->segment, pinned); !marked) return error_of(std::move(marked));
    record->pinned = pinned;
    account(*record);
    names.push_back(record->name);
  }
  return selection.next == selection.ids.size();
}

// Of what nobody views, and the session may change.
Selection Store::least_used(SessionId session, std::uint64_t size_bytes) const {
  Selection selection{.is_complete = true, .is_idle = true};
  std::uint64_t found_bytes = 0;
  auto evictable = evictable_.all().begin();
  auto kept = kept_.all().begin();
  while (found_bytes < size_bytes && (evictable != evictable_.all().end() || kept != kept_.all().end())) {
    const bool is_evictable =
        kept == kept_.all().end() || (evictable != evictable_.all().end() && *evictable < *kept);
    const ArrayId id = is_evictable ? (evictable++)->second : (kept++)->second;
    const ArrayRecord& record = records_.at(id);
    if (record.state != ArrayRecord::State::sealed || !may(session, record, Right::write)) continue;
    selection.ids.push_back(id);
    found_bytes += record.segment_bytes();
  }
  return selection;
}

Listing<ArrayRecord> Store::list(SessionId session, const NameFilter& filter, ArrayId after,
                                 std::size_t limit) const {
  const auto may_read = [&](const ArrayRecord& record) { return may(session, record, Right::read); };
  if (!filter.name) return listing_of<ArrayRecord>(records_, after, limit, filter, may_read);
  Listing<ArrayRecord> page;
  const auto versions = names_.find(*filter.name);
  if (versions == names_.end()) return page;
  const auto& ids = versions->second.all;
  auto at = ids.upper_bound(after);
  for (; at != ids.end() && page.entries.size() < limit; ++at) {
    if (const ArrayRecord& record = records_.at(*at); may_read(record)) page.entries.push_back(&record);
    page.next = *at;
  }
  if (at == ids.end()) page.next = 0;
  return page;
}

}  // namespace cowmgr
