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
    if (selection.ids.contains(record.id) && selection.is_matched.contains(i)) continue;
    if (!selection.patterns[i].matches(record.name, selection.steps)) continue;
    selection.ids.insert(record.id);
    selection.is_matched.insert(i);
  }
}

bool Store::is_current(const ArrayRecord& record) const {
  return record.state >= ArrayRecord::State::sealed && current_of(record.name) == record.id;
}

// Meanwhile anything may have happened to what the search found.
Result<std::vector<ArrayRecord*>> Store::selected(SessionId session, const Selection& selection,
                                                  bool may_be_gone) {
  std::set<ArrayId> ids;
  for (const ArrayId id : selection.ids) {
    const auto at = records_.find(id);
    if (at != records_.end() && is_current(at->second)) ids.insert(id);
  }
  for (const auto& name : selection.names) {
    const ArrayId current = current_of(name);
    if (current == 0 && may_be_gone) continue;
    if (current == 0) return not_to_be_changed(name);
    if (auto ok = check_change(session, records_.at(current)); !ok) return error_of(std::move(ok));
    ids.insert(current);
  }
  for (std::size_t i = 0; i < selection.patterns.size(); ++i) {
    if (!selection.is_matched.contains(i) && !may_be_gone)
      return not_to_be_changed(selection.patterns[i].text());
  }
  std::vector<ArrayRecord*> found;
  found.reserve(ids.size());
  for (const ArrayId id : ids) found.push_back(&records_.at(id));
  return found;
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
