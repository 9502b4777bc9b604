// What an earlier daemon left, as the store takes it over.
#include <algorithm>

#include <fmt/format.h>

#include "daemon/store/store.hpp"

namespace cowmgr {

using State = ArrayRecord::State;

void Store::adopt(Segment segment, const SegmentFile& file, bool is_tampered, Time now) {
  const TrailerInfo& trailer = file.trailer;
  Versions& versions = names_[trailer.name];
  versions.all.insert(trailer.id);
  versions.numbers.insert(trailer.version);
  Room room = take_over_room(trailer.owner_uid, segment.size_bytes);
  const auto [at, is_new] =
      records_.emplace(trailer.id, ArrayRecord{.id = trailer.id,
                                               .name = trailer.name,
                                               .version = trailer.version,
                                               .spec = file.spec,
                                               .header_bytes = static_cast<std::uint32_t>(file.header.size()),
                                               .data_bytes = trailer.data_bytes,
                                               .owner = {trailer.owner_uid, trailer.owner_gid, trailer.mode},
                                               .evictable = trailer.evictable,
                                               .pinned = file.is_pinned,
                                               .checksum = trailer.checksum,
                                               .created = time_at(trailer.created_us),
                                               .seal_asked = time_at(trailer.sealed_us),
                                               .segment = std::move(segment),
                                               .room = std::move(room)});
  COWMGR_ASSERT(is_new);
  ArrayRecord& record = at->second;
  if (is_tampered) record.harm = "somebody can write to its segment";
  record.sealed = record.seal_asked;
  record.last_used = now;
  record.used = ++uses_;
  index_leases(record);
  served_.push_back(record.id);
  // Who views what has no name any more has yet to say so.
  const auto drain_later = [&](ArrayRecord& nameless) {
    nameless.is_awaited = true;
    drain(nameless);
  };
  ArrayId& current = versions.current;
  if (file.is_draining || (current != 0 && records_.at(current).version > record.version))
    return drain_later(record);
  if (current != 0) drain_later(records_.at(current));
  current = record.id;
  record.state = is_tampered ? State::tampered : State::sealed;
  account(record);
}

bool Store::has_awaited() const {
  return std::any_of(records_.begin(), records_.end(),
                     [](const auto& entry) { return entry.second.is_awaited; });
}

void Store::drop_unviewed() {
  for (auto at = records_.begin(); at != records_.end();) {
    ArrayRecord& record = at++->second;
    if (std::exchange(record.is_awaited, false) && record.views == 0) drop(record.id);
  }
}

void Store::keep_unclaimed(ArrayId id, Segment segment, const SegmentFile& file) {
  auto memory = memory_.take(segment.size_bytes, MemoryState::writing);
  unclaimed_.emplace(id, Unclaimed{.segment = std::move(segment),
                                   .memory = std::move(memory),
                                   .spec = file.spec,
                                   .writer = file.trailer.writer,
                                   .owner = file.trailer.owner_uid});
}

bool Store::may_claim(SessionId session, ArrayId id) const {
  const auto at = unclaimed_.find(id);
  if (at == unclaimed_.end()) return false;
  return session == kDaemonSession ||
         (at->second.writer == session && at->second.owner == holdings(session).peer.uid);
}

// Whatever the segment says, it was written by whoever could: that it names `session` as its writer is
// believed only of a process that says so too. What it may do is decided as if it were a new array.
Result<const ArrayRecord*> Store::claim(SessionId session, ArrayId id, const CreateRequest& request,
                                        Time now) {
  const auto at = unclaimed_.find(id);
  const auto bytes = data_bytes(request.spec);
  const bool is_own = session == kDaemonSession;
  const auto header = header_bytes_for(session, request.spec);
  if (!may_claim(session, id) || !bytes || !header ||
      at->second.segment.size_bytes != segment_bytes(*bytes, *header))
    return fail(Errc::not_found, "there is no such array that this session was writing");
  // The daemon itself goes on with what was granted before, whoever took the name since: its seal will tell.
  auto is_free = is_own ? Result<void>() : check_name_is_free(session, request);
  if (!is_free) return error_of(std::move(is_free));
  Unclaimed& kept = at->second;
  if (auto ok = env_.open_writer(kept.segment); !ok) return error_of(std::move(ok));
  const uid_t owner = owner_of(session, request).uid;
  auto charge = is_own ? Result<Charge>(charges_.array_there_is(owner, kept.segment.size_bytes))
                       : charges_.array(owner, kept.segment.size_bytes);
  if (!charge) return error_of(std::move(charge));
  ArrayRecord& record =
      add_record(session, id, request, *header, {*std::move(charge), std::move(kept.memory)}, now);
  record.segment = std::move(kept.segment);
  record.state = State::writing;
  unclaimed_.erase(at);
  return &record;
}

const ArraySpec* Store::unclaimed_spec(ArrayId id) const {
  const auto at = unclaimed_.find(id);
  return at == unclaimed_.end() ? nullptr : &at->second.spec;
}

std::set<SessionId> Store::unclaimed_writers() const {
  std::set<SessionId> writers;
  for (const auto& [id, kept] : unclaimed_) writers.insert(kept.writer);
  return writers;
}

void Store::drop_unclaimed(SessionId writer) {
  for (auto at = unclaimed_.begin(); at != unclaimed_.end();) {
    if (at->second.writer == writer) {
      throw_away(std::move(at->second.segment), std::move(at->second.memory), std::nullopt);
      at = unclaimed_.erase(at);
    } else {
      ++at;
    }
  }
}

}  // namespace cowmgr
