// From the daemon's records to the tables of a reply.
#pragma once

#include <string>
#include <vector>

#include "daemon/store/results.hpp"
#include "daemon/store/store.hpp"
#include "proto/frames.hpp"

namespace cowmgr {

using Builder = flatbuffers::FlatBufferBuilder;
template <class T>
using Offset = flatbuffers::Offset<T>;

[[nodiscard]] wire::Protection protection_of(const ShmEnv& env, uid_t owner, uid_t daemon_uid);

[[nodiscard]] Offset<wire::ArrayInfo> pack(Builder& builder, const ArrayRecord& record,
                                           wire::Protection protection);
[[nodiscard]] Offset<wire::MemoryStates> pack(Builder& builder, const MemoryStates& states);
[[nodiscard]] Offset<wire::ResultsInfo> pack(Builder& builder, const ResultSetRecord& set);

// From a request's tables to values, once it is known to stay within its bounds (bounds.hpp). Errors: as the
// parsers'.
template <class T>
[[nodiscard]] std::size_t size_of(const flatbuffers::Vector<T>* items) noexcept {
  return items == nullptr ? 0 : items->size();
}
[[nodiscard]] std::vector<std::string> strings_of(
    const flatbuffers::Vector<Offset<flatbuffers::String>>* texts);
[[nodiscard]] Shape shape_of(const flatbuffers::Vector<std::uint64_t>* dims);

// Errors: invalid_dtype, also for a text that is longer than any header has room for.
[[nodiscard]] Result<Dtype> dtype_of(const flatbuffers::String* text);

// What a listing is of. Errors: invalid_argument.
[[nodiscard]] Result<NameFilter> filter_of(const flatbuffers::String* name,
                                           const flatbuffers::String* pattern);

// A MakeArray or MakeResults request, which share these fields.
template <class Table>
[[nodiscard]] Result<CreateRequest> create_request_of(const Table& table, Order order) {
  auto dtype = dtype_of(table.dtype());
  if (!dtype) return error_of(std::move(dtype));
  return CreateRequest{.name = std::string(view_of(table.name())),
                       .spec = {*std::move(dtype), shape_of(table.shape()), order},
                       .replace = table.replace(),
                       .evictable = table.evictable(),
                       .mode = table.mode()};
}

}  // namespace cowmgr
