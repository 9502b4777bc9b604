#include <fmt/format.h>

#include "client/handles.hpp"

namespace cowmgr::detail {
namespace {

SystemTime time_of(std::int64_t microseconds) {
  return SystemTime(std::chrono::microseconds(microseconds));
}

// dtype, shape and order, which come from the other side and are checked like all that does.
Result<ArraySpec> spec_of(const flatbuffers::String* dtype_text,
                          const flatbuffers::Vector<std::uint64_t>* dims, Order order, std::uint64_t bytes,
                          std::uint64_t data_offset) {
  auto dtype = Dtype::parse(view_of(dtype_text));
  if (!dtype) return error_of(std::move(dtype));
  ArraySpec spec{*std::move(dtype), dims == nullptr ? Shape{} : Shape(dims->begin(), dims->end()), order};
  const auto expected = data_bytes(spec);
  if (!expected) return error_of(expected);
  if (*expected != bytes || (data_offset != kDataOffset && data_offset != kMaxDataOffset))
    return fail(Errc::protocol_error, "the daemon's description of an array contradicts itself");
  return spec;
}

}  // namespace

Result<ArrayInfo> info_of(const wire::ArrayInfo& table) {
  auto spec =
      spec_of(table.dtype(), table.shape(), order_of(table.order()), table.data_bytes(), table.data_offset());
  if (!spec) return error_of(std::move(spec));
  if (table.segment_bytes() != segment_bytes(table.data_bytes(), table.data_offset()))
    return fail(Errc::protocol_error, "the daemon's description of a segment contradicts itself");
  return ArrayInfo{.id = table.id(),
                   .name = std::string(view_of(table.name())),
                   .version = table.version(),
                   .spec = *std::move(spec),
                   .data_bytes = table.data_bytes(),
                   .segment_bytes = table.segment_bytes(),
                   .segment = std::string(view_of(table.segment())),
                   .state = static_cast<ArrayState>(table.state()),
                   .protection = static_cast<Protection>(table.protection()),
                   .views = table.views(),
                   .pinned = table.pinned(),
                   .evictable = table.evictable(),
                   .owner_uid = table.owner_uid(),
                   .owner_gid = table.owner_gid(),
                   .mode = table.mode(),
                   .created = time_of(table.created_us()),
                   .sealed = time_of(table.sealed_us()),
                   .last_used = time_of(table.last_used_us()),
                   .writer_pid = table.writer_pid(),
                   .checksum = table.checksum(),
                   .data_offset = table.data_offset()};
}

Result<ResultsInfo> info_of(const wire::ResultsInfo& table) {
  auto spec = spec_of(table.dtype(), table.shape(), Order::c, table.data_bytes(), table.data_offset());
  if (!spec) return error_of(std::move(spec));
  ResultsInfo info{.id = table.id(),
                   .name = std::string(view_of(table.name())),
                   .is_ragged = table.ragged(),
                   .spec = *std::move(spec),
                   .slots = table.slots(),
                   .data_bytes = table.data_bytes(),
                   .state = static_cast<ResultsState>(table.state()),
                   .revision = table.revision(),
                   .free = table.free(),
                   .leased = table.leased(),
                   .committed = table.committed(),
                   .failed = table.failed(),
                   .message = std::string(view_of(table.message())),
                   .owner_uid = table.owner_uid(),
                   .owner_pid = table.owner_pid(),
                   .created = time_of(table.created_us())};
  info.attempts = table.attempts();
  info.lease = Milliseconds(table.lease_ms());
  info.is_detached = table.detached();
  info.value_bytes = table.value_bytes();
  info.segment = view_of(table.segment());
  info.queue = view_of(table.queue());
  info.data_offset = table.data_offset();
  if (table.holders() != nullptr) info.holders.assign(table.holders()->begin(), table.holders()->end());
  return info;
}

ClientInfo info_of(const wire::ClientInfo& table) {
  return {.session = table.session(),
          .pid = table.pid(),
          .uid = table.uid(),
          .command = std::string(view_of(table.command())),
          .channels = table.channels(),
          .views = table.views(),
          .view_bytes = table.view_bytes(),
          .writing = table.writing(),
          .leases = table.leases(),
          .connected = time_of(table.connected_us())};
}

namespace {

DaemonMemory memory_of(const wire::Pong& table) {
  const auto* states = table.memory();
  if (states == nullptr)  // an older daemon
    return {.pinned_bytes = table.pinned_bytes(),
            .viewed_bytes = table.viewed_bytes(),
            .evictable_bytes = table.evictable_bytes()};
  return {.free_bytes = states->free_bytes(),
          .writing_bytes = states->writing_bytes(),
          .draining_bytes = states->draining_bytes(),
          .pinned_bytes = states->pinned_bytes(),
          .viewed_bytes = states->viewed_bytes(),
          .evictable_bytes = states->evictable_bytes(),
          .kept_bytes = states->kept_bytes(),
          .results_bytes = states->results_bytes(),
          .reclaiming_bytes = states->reclaiming_bytes(),
          .outside_bytes = states->outside_bytes()};
}

}  // namespace

DaemonInfo info_of(const wire::Pong& table) {
  return {.version = std::string(view_of(table.version())),
          .instance = std::string(view_of(table.instance())),
          .socket = std::string(view_of(table.socket())),
          .pid = table.pid(),
          .uid = table.uid(),
          .started = time_of(table.started_us()),
          .protection = static_cast<Protection>(table.protection()),
          .capacity_bytes = table.capacity_bytes(),
          .used_bytes = table.used_bytes(),
          .pinned_bytes = table.pinned_bytes(),
          .evictable_bytes = table.evictable_bytes(),
          .viewed_bytes = table.viewed_bytes(),
          .arrays = table.arrays(),
          .sessions = table.sessions(),
          .result_sets = table.result_sets(),
          .memory = memory_of(table)};
}

std::vector<std::string> strings_of(const flatbuffers::Vector<Offset<flatbuffers::String>>* texts) {
  std::vector<std::string> out;
  if (texts == nullptr) return out;
  for (const auto* text : *texts) out.emplace_back(view_of(text));
  return out;
}

}  // namespace cowmgr::detail
