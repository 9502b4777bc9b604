#include "daemon/requests/wire.hpp"

#include <fmt/format.h>

#include "daemon/requests/bounds.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kMaxHoldersTold = 1024;  // pids of a set's workers: what packs a set is bounded

wire::ArrayState state_of(const ArrayRecord& record) {
  switch (record.state) {
    case ArrayRecord::State::sealed:
      return record.is_unlinked ? wire::ArrayState::unlinked : wire::ArrayState::sealed;
    case ArrayRecord::State::draining:
      return wire::ArrayState::draining;
    case ArrayRecord::State::tampered:
      return wire::ArrayState::tampered;
    default:
      return wire::ArrayState::writing;
  }
}

}  // namespace

wire::Protection protection_of(const ShmEnv& env, uid_t owner, uid_t daemon_uid) {
  if (!env.has_leases()) return wire::Protection::advisory;
  return owner == daemon_uid ? wire::Protection::verified : wire::Protection::enforced;
}

Offset<wire::ArrayInfo> pack(Builder& builder, const ArrayRecord& record, wire::Protection protection) {
  const auto name = builder.CreateString(record.name);
  const auto dtype = builder.CreateString(record.spec.dtype.str());
  const auto shape = builder.CreateVector(record.spec.shape);
  const auto segment = builder.CreateString(record.segment.name);
  wire::ArrayInfoBuilder info(builder);
  info.add_id(record.id);
  info.add_name(name);
  info.add_version(record.version);
  info.add_dtype(dtype);
  info.add_shape(shape);
  info.add_order(order_of(record.spec.order));
  info.add_data_bytes(record.data_bytes);
  info.add_segment_bytes(record.segment_bytes());
  info.add_segment(segment);
  info.add_state(state_of(record));
  info.add_protection(protection);
  info.add_views(record.views);
  info.add_pinned(record.pinned);
  info.add_evictable(record.evictable);
  info.add_owner_uid(record.owner.uid);
  info.add_owner_gid(record.owner.gid);
  info.add_mode(record.owner.mode);
  info.add_created_us(microseconds(record.created));
  info.add_sealed_us(microseconds(record.sealed));
  info.add_last_used_us(microseconds(record.last_used));
  info.add_writer_pid(record.writer_pid);
  info.add_checksum(record.checksum);
  info.add_data_offset(record.header_bytes);
  return info.Finish();
}

Offset<wire::MemoryStates> pack(Builder& builder, const MemoryStates& states) {
  return wire::CreateMemoryStates(builder, states.free_bytes, states.writing_bytes, states.draining_bytes,
                                  states.pinned_bytes, states.viewed_bytes, states.evictable_bytes,
                                  states.kept_bytes, states.results_bytes, states.reclaiming_bytes,
                                  states.outside_bytes);
}

Offset<wire::ResultsInfo> pack(Builder& builder, const ResultSetRecord& set) {
  std::vector<std::int32_t> pids;
  for (const SessionId session : set.workers) {
    if (pids.size() < kMaxHoldersTold) pids.push_back(pid_of(session));
  }
  const auto name = builder.CreateString(set.name);
  const auto dtype = builder.CreateString(set.spec.dtype.str());
  const auto shape = builder.CreateVector(set.spec.shape);
  const auto message = builder.CreateString(set.message);
  const auto holders = builder.CreateVector(pids);
  const auto segment = builder.CreateString(set.memory.segment.name);
  const auto queue = builder.CreateString(set.terms.queue);
  wire::ResultsInfoBuilder info(builder);
  info.add_id(set.id);
  info.add_name(name);
  info.add_ragged(set.terms.is_ragged);
  info.add_dtype(dtype);
  info.add_shape(shape);
  info.add_slots(set.table.size());
  info.add_data_bytes(set.data_bytes);
  info.add_state(static_cast<wire::ResultsState>(set.state));
  info.add_revision(set.revision);
  info.add_free(set.table.free());
  info.add_leased(set.table.leased());
  info.add_committed(set.table.committed());
  info.add_failed(set.table.failed());
  info.add_message(message);
  info.add_owner_uid(set.owner.uid);
  info.add_owner_gid(set.owner.gid);
  info.add_mode(set.owner.mode);
  info.add_owner_pid(set.owner_pid);
  info.add_created_us(microseconds(set.created));
  info.add_holders(holders);
  info.add_attempts(set.terms.limits.attempts);
  info.add_lease_ms(static_cast<std::uint32_t>(set.terms.limits.lease.count()));
  info.add_detached(set.terms.is_detached);
  info.add_value_bytes(set.table.value_bytes());
  info.add_segment(segment);
  info.add_queue(queue);
  info.add_data_offset(set.data_offset);
  return info.Finish();
}

std::vector<std::string> strings_of(const flatbuffers::Vector<Offset<flatbuffers::String>>* texts) {
  std::vector<std::string> out;
  if (texts == nullptr) return out;
  for (const auto* text : *texts) out.emplace_back(view_of(text));
  return out;
}

Result<Dtype> dtype_of(const flatbuffers::String* text) {
  if (text != nullptr && text->size() > kMaxDtypeBytes) {
    return fail(Errc::invalid_dtype, fmt::format("a dtype's description has at most {} bytes, not {}",
                                                 kMaxDtypeBytes, text->size()));
  }
  return Dtype::parse(view_of(text));
}

Shape shape_of(const flatbuffers::Vector<std::uint64_t>* dims) {
  return dims == nullptr ? Shape{} : Shape(dims->begin(), dims->end());
}

Result<NameFilter> filter_of(const flatbuffers::String* name, const flatbuffers::String* pattern) {
  NameFilter filter;
  if (name != nullptr) filter.name = view_of(name);
  if (name != nullptr || pattern == nullptr || pattern->size() == 0) return filter;
  auto parsed = Glob::parse(view_of(pattern));
  if (!parsed) return error_of(std::move(parsed));
  filter.pattern = *std::move(parsed);
  return filter;
}

}  // namespace cowmgr
