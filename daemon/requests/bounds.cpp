#include "daemon/requests/bounds.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "daemon/requests/wire.hpp"
#include "proto/fd_socket.hpp"
#include "proto/result_segment.hpp"

namespace cowmgr {
namespace {

// What lies in a frame at least for each entry of a list of tables: its offset, and the table.
constexpr std::size_t kEntryBytes = 12;

std::size_t bytes_of(const flatbuffers::String* text) {
  return text == nullptr ? 0 : text->size();
}
template <class T>
std::size_t bytes_of(const flatbuffers::Vector<T>* numbers) {
  return size_of(numbers) * sizeof(T);
}
std::size_t bytes_of(const wire::Writing& writing) {
  const auto* make = writing.make();
  if (make == nullptr) return kEntryBytes;
  return kEntryBytes + bytes_of(make->name()) + bytes_of(make->dtype()) + bytes_of(make->shape());
}
std::size_t bytes_of(const wire::Holding& holding) {
  return kEntryBytes + bytes_of(holding.slots()) + bytes_of(holding.attempts());
}

// Takes what the entries of a list say, each as often as it is referred to, from `budget_bytes`. False when
// that does not suffice; then the rest is not looked at.
template <class Entry>
bool takes(std::size_t& budget_bytes, const flatbuffers::Vector<Offset<Entry>>* entries) {
  if (entries == nullptr) return true;
  return std::all_of(entries->begin(), entries->end(), [&](const Entry* entry) {
    std::size_t bytes = 0;
    if constexpr (std::is_same_v<Entry, flatbuffers::String>)
      bytes = bytes_of(entry);
    else
      bytes = bytes_of(*entry);
    if (bytes > budget_bytes) return false;
    budget_bytes -= bytes;
    return true;
  });
}

tl::unexpected<Error> shares_too_much() {
  return fail(Errc::invalid_argument,
              fmt::format("the entries of this request refer to the same texts or tables again and again; "
                          "together they say more than the {} bytes of a frame",
                          kMaxFrameBytes));
}

Result<void> check_patterns(const flatbuffers::Vector<Offset<flatbuffers::String>>* patterns) {
  const auto is_long = [](const flatbuffers::String* text) { return text->size() > kMaxPatternBytes; };
  if (size_of(patterns) <= kMaxPatterns &&
      (patterns == nullptr || std::none_of(patterns->begin(), patterns->end(), is_long)))
    return {};
  return fail(Errc::invalid_argument,
              fmt::format("give at most {} names or patterns in one request, of {} bytes each", kMaxPatterns,
                          kMaxPatternBytes));
}

template <class Table>
Result<void> check_names_or_patterns(const Table& table) {
  if (auto ok = check_patterns(table.names()); !ok) return ok;
  return check_patterns(table.patterns());
}

Result<void> check_batch(const flatbuffers::Vector<std::uint64_t>* slots) {
  if (size_of(slots) <= kMaxBatch) return {};
  return fail(Errc::invalid_argument,
              fmt::format("name at most {} slots in one request, not {}", kMaxBatch, size_of(slots)));
}

}  // namespace

Result<void> check_attach(const wire::Attach& table) {
  const std::size_t count = size_of(table.names()) + size_of(table.ids());
  if (count == 0 || count > kMaxFrameFds) {
    return fail(Errc::invalid_argument, fmt::format("attach 1 to {} arrays in one request", kMaxFrameFds));
  }
  std::size_t budget_bytes = kMaxFrameBytes;
  if (!takes(budget_bytes, table.names())) return shares_too_much();
  return {};
}

Result<void> check_evict(const wire::Evict& table) {
  return check_names_or_patterns(table);
}

Result<void> check_pin(const wire::Pin& table) {
  return check_names_or_patterns(table);
}

Result<void> check_commit(const wire::CommitSlots& table) {
  return check_batch(table.slots());
}

Result<void> check_give_back(const wire::GiveBackSlots& table) {
  return check_batch(table.slots());
}

Result<void> check_hold(const wire::Hold& table) {
  std::size_t budget_bytes = kMaxFrameBytes;
  if (!takes(budget_bytes, table.writing()) || !takes(budget_bytes, table.slots())) return shares_too_much();
  return {};
}

}  // namespace cowmgr
