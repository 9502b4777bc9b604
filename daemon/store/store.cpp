#include "daemon/store/store.hpp"

#include <algorithm>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using State = ArrayRecord::State;

constexpr ArrayId kEndOfIds = ArrayId{1} << 53;  // what is less is exact in a double, for whoever reads JSON
constexpr int kIdTries = 1000;                   // who has taken so many names in a row has taken all
constexpr std::uint32_t kMaxViews = UINT32_MAX - 1024;  // of one array; a request adds 64 at most

TrailerInfo trailer_of(const ArrayRecord& record) {
  return {.name = record.name,
          .id = record.id,
          .version = record.version,
          .data_bytes = record.data_bytes,
          .data_offset = record.header_bytes,
          .created_us = microseconds(record.created),
          .sealed_us = microseconds(record.seal_asked),
          .owner_uid = record.owner.uid,
          .owner_gid = record.owner.gid,
          .mode = record.owner.mode,
          .evictable = record.evictable,
          .checksum = record.checksum,
          .writer = record.writer == kDaemonSession ? 0 : record.writer};
}

tl::unexpected<Error> no_such_array(std::string_view name) {
  return fail(Errc::not_found,
              fmt::format("there is no array {}; `cowctl ls` lists those that there are", printable(name)));
}

tl::unexpected<Error> not_allowed(const ArrayRecord& record, std::string_view what) {
  return fail(Errc::permission_denied,
              fmt::format("array {} belongs to user {} with mode {:04o}, which does not let you {} it",
                          printable(record.name), record.owner.uid, record.owner.mode, what));
}

// A client that knows layout 1 alone would take the second page of the header for data.
tl::unexpected<Error> too_old_for(std::string_view what) {
  return fail(
      Errc::unsupported,
      fmt::format("{} has a dtype whose header takes two pages (layout 2), which this client does not read; "
                  "upgrade the client",
                  what));
}

}  // namespace

Result<std::string> header_of(const ArrayRecord& record) {
  auto header = make_segment_header(record.spec);
  if (header && header->size() == record.header_bytes) return header;
  return fail(Errc::corrupted,
              fmt::format("array {} has a header of {} bytes, which is not what this daemon writes",
                          printable(record.name), record.header_bytes));
}

TrailerPage trailer_page(const ArrayRecord& record) {
  return encode_trailer(trailer_of(record));
}

Store::Store(const ShmEnv& env, const StoreOptions& options)
    : env_(env),
      options_(options),
      memory_(options.capacity_bytes),
      charges_(options.quota),
      last_id_(options.first_id - 1) {
  open_session(kDaemonSession, {.pid = ::getpid(), .uid = options.admin, .gid = ::getegid()});
}

// ---- Sessions ----

void Store::open_session(SessionId session, Peer peer) {
  const bool is_new = sessions_.try_emplace(session, Holdings{std::move(peer)}).second;
  COWMGR_ASSERT(is_new);
}

void Store::close_session(SessionId session) {
  auto node = sessions_.extract(session);
  COWMGR_ASSERT(!node.empty());
  for (const auto& [id, count] : node.mapped().views) drop_views(records_.at(id), count);
  for (const ArrayId id : node.mapped().writing) drop(id);
}

const Store::Holdings& Store::holdings(SessionId session) const {
  return sessions_.at(session);
}
Store::Holdings& Store::holdings(SessionId session) {
  return sessions_.at(session);
}

// ---- Making arrays ----

Result<ArrayId> Store::reserve(SessionId session, const CreateRequest& request, Time now) {
  if (auto ok = check_name(request.name); !ok) return error_of(std::move(ok));
  const auto bytes = data_bytes(request.spec);
  if (!bytes) return error_of(bytes);
  const auto header = header_bytes_for(session, request.spec);
  if (!header) return error_of(header);
  if (auto ok = check_name_is_free(session, request); !ok) return error_of(std::move(ok));
  auto room = take_room(owner_of(session, request).uid, segment_bytes(*bytes, *header));
  if (!room) return error_of(std::move(room));
  return add_record(session, next_id(), request, *header, *std::move(room), now).id;
}

Result<std::uint32_t> Store::header_bytes_for(SessionId session, const ArraySpec& spec) const {
  const auto header = make_segment_header(spec);
  if (!header) return error_of(header);
  if (header->size() > kDataOffset && holdings(session).layout < 2) return too_old_for("the array");
  return static_cast<std::uint32_t>(header->size());
}

Ownership Store::owner_of(SessionId session, const CreateRequest& request) const {
  const Peer& peer = holdings(session).peer;
  return request.owner.value_or(Ownership{peer.uid, peer.gid, request.mode & 0777U});
}

ArrayRecord& Store::add_record(SessionId session, ArrayId id, const CreateRequest& request,
                               std::uint32_t header_bytes, Room room, Time now) {
  Versions& versions = names_[request.name];
  const std::uint64_t version = versions.numbers.empty() ? 1 : *versions.numbers.rbegin() + 1;
  versions.numbers.insert(version);
  versions.all.insert(id);
  versions.writing.insert(id);
  const auto [at, is_new] = records_.emplace(id, ArrayRecord{.id = id,
                                                             .name = request.name,
                                                             .version = version,
                                                             .spec = request.spec,
                                                             .header_bytes = header_bytes,
                                                             .data_bytes = data_bytes(request.spec).value(),
                                                             .owner = owner_of(session, request),
                                                             .replace = request.replace,
                                                             .evictable = request.evictable,
                                                             .writer = session,
                                                             .writer_pid = holdings(session).peer.pid,
                                                             .created = now,
                                                             .last_used = now,
                                                             .room = std::move(room)});
  COWMGR_ASSERT(is_new);
  at->second.used = ++uses_;
  begin_writing(session, at->second);
  account(at->second);
  return at->second;
}

Result<void> Store::check_name_is_free(SessionId session, const CreateRequest& request) const {
  if (const ArrayId current = current_of(request.name); current != 0) {
    const ArrayRecord& record = records_.at(current);
    if (!request.replace) {
      return fail(Errc::already_exists,
                  fmt::format("array {} exists; evict it, or ask to replace it", printable(request.name)));
    }
    if (!may(session, record, Right::write)) return not_allowed(record, "replace");
  }
  if (const ArrayRecord* record = being_written(request.name)) {
    if (!request.replace) {
      return fail(Errc::already_exists,
                  fmt::format("array {} is being written by process {}; wait for it, or ask to replace it",
                              printable(request.name), record->writer_pid));
    }
    // Who seals first takes the name: else anybody could take it from under the one who writes it.
    if (!may(session, *record, Right::write)) return not_allowed(*record, "replace");
  }
  return {};
}

ArrayId Store::current_of(const std::string& name) const {
  const auto at = names_.find(name);
  return at == names_.end() ? 0 : at->second.current;
}

const ArrayRecord* Store::being_written(const std::string& name) const {
  const auto at = names_.find(name);
  if (at == names_.end() || at->second.writing.empty()) return nullptr;
  return &records_.at(*at->second.writing.begin());
}

Result<const ArrayRecord*> Store::back(ArrayId id, Segment segment) {
  if (auto orphan = orphans_.extract(id)) {  // which counts as being given back already
    garbage_.push_back({std::move(segment), std::move(orphan.mapped())});
    return fail(Errc::not_found, "the array was given up while its memory was being reserved");
  }
  ArrayRecord& record = records_.at(id);
  record.segment = std::move(segment);
  record.state = State::writing;
  return &record;
}

const ArrayRecord* Store::hand_to_daemon(ArrayId id) {
  const auto at = records_.find(id);
  if (at == records_.end() || at->second.state != State::writing) return nullptr;
  ArrayRecord& record = at->second;
  end_writing(record.writer, record);
  begin_writing(kDaemonSession, record);
  record.writer = kDaemonSession;
  return &record;
}

void Store::fail_backing(ArrayId id) {
  if (!orphans_.contains(id)) drop(id);
  orphans_.erase(id);
}

void Store::abort(ArrayId id) {
  const auto at = records_.find(id);
  if (at == records_.end()) return;
  COWMGR_ASSERT(at->second.state == State::reserved || at->second.state == State::writing);
  drop(id);
}

void Store::retire(ArrayId id) {
  const auto at = records_.find(id);
  if (at == records_.end()) return;
  ArrayRecord& record = at->second;
  if (record.state == State::reserved || record.state == State::writing)
    drop(id);
  else if (record.state != State::draining && !record.pinned)
    drain(record);
}

Result<bool> Store::seal(SessionId session, ArrayId id, bool keep_view, Time now, std::uint64_t checksum) {
  const auto at = records_.find(id);
  if (at == records_.end() || at->second.state != State::writing || at->second.writer != session) {
    return fail(Errc::not_holder,
                "this session is not writing such an array; it may have been sealed already");
  }
  ArrayRecord& record = at->second;
  const ArrayId current = current_of(record.name);
  if (!record.replace && current != 0) {
    return fail(Errc::already_exists,
                fmt::format("array {} was sealed by somebody else meanwhile", printable(record.name)));
  }
  if (record.seal_asked == Time{}) {
    record.seal_asked = now;
    record.checksum = checksum;
  }
  // The name may be pinned, whatever its version.
  const bool is_pinned =
      current != 0 && records_.at(current).pinned && records_.at(current).version < record.version;
  const auto header = header_of(record);
  if (!header) return error_of(header);
  auto sealed = env_.seal(record.segment, *header, trailer_page(record), is_pinned);
  if (!sealed && sealed.error().code == Errc::corrupted) drop(id);
  if (!sealed) return error_of(std::move(sealed));
  if (!*sealed) return false;
  record.pinned = is_pinned;
  index_leases(record);
  end_writing(session, record);
  if (keep_view) add_views(holdings(session), record, 1, now);
  publish(record, now);
  return true;
}

// A name that is found taken is passed over: nobody can take the next one by intent, whatever he made before.
ArrayId Store::next_id() {
  for (int tries = 1;; ++tries) {
    last_id_ += 1 + (options_.id_step > 1 ? random_id() % options_.id_step : 0);
    if (last_id_ >= kEndOfIds) last_id_ = 1 + random_id() % options_.id_step;
    if (records_.contains(last_id_) || unclaimed_.contains(last_id_)) continue;
    if (tries >= kIdTries || !env_.has_name(last_id_)) return last_id_;
  }
}

void Store::note_id(ArrayId id) noexcept {
  if (id < kEndOfIds) last_id_ = std::max(last_id_, id);
}

// Of two versions of a name the higher sealed one counts; a lower one that is sealed later drains at once.
void Store::publish(ArrayRecord& record, Time now) {
  record.state = State::sealed;
  record.writer = 0;
  record.writer_pid = 0;
  record.sealed = record.seal_asked;
  record.last_used = now;
  record.used = ++uses_;
  account(record);
  changed_names_.push_back(record.name);
  served_.push_back(record.id);
  if (record.is_unlinked) unlinked_.insert(record.id);
  Versions& versions = names_.at(record.name);
  versions.writing.erase(record.id);
  ArrayId& current = versions.current;
  const ArrayId previous = current;
  if (previous != 0 && records_.at(previous).version > record.version) {
    drain(record);
    return;
  }
  current = record.id;
  if (previous != 0) drain(records_.at(previous));
}

// ---- Using them ----

Result<std::vector<const ArrayRecord*>> Store::attach(SessionId session, std::span<const std::string> names,
                                                      std::span<const ArrayId> ids, Time now) {
  std::vector<ArrayRecord*> found;
  for (const auto& name : names) {
    const ArrayId current = current_of(name);
    if (current == 0) return no_such_array(name);
    found.push_back(&records_.at(current));
  }
  for (const ArrayId id : ids) {
    const auto at = records_.find(id);
    if (at == records_.end() || at->second.state < State::sealed)
      return no_such_array(fmt::format("#{}", id));
    found.push_back(&at->second);
  }
  for (const ArrayRecord* record : found) {
    if (auto ok = check_attach(session, *record); !ok) return error_of(std::move(ok));
  }
  ++uses_;  // of all of them at once
  for (ArrayRecord* record : found) add_views(holdings(session), *record, 1, now);
  return std::vector<const ArrayRecord*>(found.begin(), found.end());
}

bool Store::may_hold(SessionId session, ArrayId id) const {
  const auto at = records_.find(id);
  return at != records_.end() && at->second.state >= State::sealed && may(session, at->second, Right::read) &&
         at->second.views < kMaxViews;
}

void Store::keep_only(SessionId session, const Views& views, const std::set<ArrayId>& writing, Time now) {
  Holdings& held = holdings(session);
  const Views before = std::exchange(held.views, {});
  held.use.views = 0;
  held.use.view_bytes = 0;
  for (const auto& [id, count] : views) {
    if (!may_hold(session, id)) continue;
    ArrayRecord& record = records_.at(id);
    add_views(held, record, std::min(count, kMaxViews - record.views), now);
  }
  for (const auto& [id, count] : before) drop_views(records_.at(id), count);
  for (const ArrayId id : std::set<ArrayId>(held.writing)) {
    if (!writing.contains(id)) drop(id);
  }
  drop_unclaimed(session);
}

const std::string* Store::first_missing(std::span<const std::string> names) const {
  const auto at =
      std::find_if(names.begin(), names.end(), [&](const auto& name) { return current_of(name) == 0; });
  return at == names.end() ? nullptr : &*at;
}

Result<void> Store::check_attach(SessionId session, const ArrayRecord& record) const {
  if (!may(session, record, Right::read)) return not_allowed(record, "attach");
  if (record.header_bytes > kDataOffset && holdings(session).layout < 2)
    return too_old_for("array " + printable(record.name));
  if (record.views >= kMaxViews)
    return fail(Errc::quota_exceeded, fmt::format("array {} has {} views, as many as one array may",
                                                  printable(record.name), record.views));
  if (record.harm.empty()) return {};
  return fail(Errc::tampered, fmt::format("array {} is not served any more: {}; put it again",
                                          printable(record.name), record.harm));
}

void Store::release(SessionId session, ArrayId id, Time now) {
  Holdings& held = holdings(session);
  auto& views = held.views;
  const auto at = views.find(id);
  if (at == views.end()) return;
  ArrayRecord& record = records_.at(id);
  --held.use.views;
  if (--at->second == 0) {
    views.erase(at);
    held.use.view_bytes -= record.segment_bytes();
  }
  record.last_used = now;
  record.used = ++uses_;
  drop_views(record, 1);
}

void Store::begin_writing(SessionId session, const ArrayRecord& record) {
  Holdings& held = holdings(session);
  if (!held.writing.insert(record.id).second) return;
  ++held.use.writing;
  held.use.writing_bytes += record.segment_bytes();
}

// A session that is just being closed is not there any more.
void Store::end_writing(SessionId session, const ArrayRecord& record) {
  const auto held = sessions_.find(session);
  if (held == sessions_.end() || held->second.writing.erase(record.id) == 0) return;
  --held->second.use.writing;
  held->second.use.writing_bytes -= record.segment_bytes();
}

void Store::add_views(Holdings& held, ArrayRecord& record, std::uint32_t count, Time now) {
  std::uint32_t& views = held.views[record.id];
  if (views == 0) held.use.view_bytes += record.segment_bytes();
  views += count;
  held.use.views += count;
  record.views += count;
  record.last_used = now;
  record.used = uses_;
  account(record);
}

void Store::drop_views(ArrayRecord& record, std::uint32_t count) {
  COWMGR_ASSERT(record.views >= count);
  record.views -= count;
  account(record);
  if (record.views > 0) return;
  for (auto& [segment, memory] : std::exchange(record.older, {})) {
    by_lease_.erase(segment.lease.get());
    throw_away(std::move(segment), std::move(memory), record.owner.uid);
  }
  if (record.state == State::draining && !record.is_awaited) drop(record.id);
}

Result<void> Store::check_change(SessionId session, const ArrayRecord& record) const {
  if (!may(session, record, Right::write)) return not_allowed(record, "change");
  return {};
}

tl::unexpected<Error> Store::not_to_be_changed(const std::string& name) const {
  const ArrayRecord* record = being_written(name);
  if (record == nullptr) return no_such_array(name);
  return fail(Errc::busy, fmt::format("array {} is still being written by process {}", printable(name),
                                      record->writer_pid));
}

// The name goes now, the memory with the last view. `record` may be gone afterwards.
void Store::drain(ArrayRecord& record) {
  record.state = State::draining;
  account(record);
  unlinked_.erase(record.id);
  if (ArrayId& current = names_.at(record.name).current; current == record.id) current = 0;
  changed_names_.push_back(record.name);
  // The file stays while anybody has it: the next daemon, too, must know of the memory, and find it by its
  // id. The mark says that it must not come back, also where a descriptor of it is kept.
  const bool is_marked = env_.mark_draining(record.segment).has_value();
  if (!is_marked && !record.is_unlinked) env_.unlink(record.segment);
  if (record.views == 0 && !record.is_awaited) drop(record.id);
}

void Store::drop(ArrayId id) {
  auto node = records_.extract(id);
  ArrayRecord& record = node.mapped();
  COWMGR_ASSERT(record.views == 0);
  discount(record);
  const auto versions = names_.find(record.name);
  versions->second.all.erase(id);
  versions->second.writing.erase(id);
  versions->second.numbers.erase(versions->second.numbers.find(record.version));
  if (versions->second.all.empty()) names_.erase(versions);
  if (record.writer != 0) end_writing(record.writer, record);
  changed_names_.push_back(record.name);
  dropped_.push_back(id);
  by_lease_.erase(record.segment.lease.get());
  if (record.is_unlinked) record.segment.name.clear();  // whatever has the name now is not ours
  if (record.state != State::reserved)
    return throw_away(std::move(record.segment), std::move(record.room.memory), record.owner.uid);
  record.room.memory.move_to(MemoryState::reclaiming);
  orphans_.emplace(id, std::move(record.room.memory));
}

// ---- Segments that somebody else opens, harms or removes ----

const ArrayRecord* Store::mark_tampered(int lease_fd) {
  const auto at = by_lease_.find(lease_fd);
  if (at == by_lease_.end()) return nullptr;
  ArrayRecord& record = records_.at(at->second);
  put_out_of_service(record, "somebody opened its segment for writing");
  return &record;
}

void Store::index_leases(const ArrayRecord& record) {
  if (record.segment.lease) by_lease_.insert_or_assign(record.segment.lease.get(), record.id);
}

const ArrayRecord* Store::mark_corrupted(ArrayId id) {
  const auto at = records_.find(id);
  if (at == records_.end()) return nullptr;
  put_out_of_service(at->second, "its data does not match its checksum");
  return &at->second;
}

void Store::put_out_of_service(ArrayRecord& record, std::string_view harm) {
  if (record.harm.empty()) record.harm = harm;
  if (record.state == State::sealed) record.state = State::tampered;
  account(record);
  unlinked_.erase(record.id);
  changed_names_.push_back(record.name);
}

bool Store::note_unlinked(ArrayId id) {
  const auto at = records_.find(id);
  if (at == records_.end()) return false;
  ArrayRecord& record = at->second;
  if (record.is_unlinked || !record.segment.reader || !ShmEnv::has_lost_name(record.segment)) return false;
  record.is_unlinked = true;
  if (record.state == State::sealed) unlinked_.insert(id);
  return true;
}

// ---- Looking ----

const ArrayRecord* Store::find(ArrayId id) const {
  const auto at = records_.find(id);
  return at == records_.end() ? nullptr : &at->second;
}

Result<const ArrayRecord*> Store::find(SessionId session, std::string_view name) const {
  const auto at = names_.find(std::string(name));
  if (at == names_.end()) return no_such_array(name);
  const Versions& versions = at->second;
  const ArrayRecord* found = &records_.at(versions.current != 0 ? versions.current : *versions.all.begin());
  if (!may(session, *found, Right::read)) return not_allowed(*found, "look at");
  return found;
}

bool Store::may(SessionId session, const ArrayRecord& record, Right right) const {
  return is_allowed(holdings(session).peer, record.owner, right, options_.admin);
}

std::uint32_t Store::views_of(SessionId session, ArrayId id) const {
  const auto& views = holdings(session).views;
  const auto at = views.find(id);
  return at == views.end() ? 0 : at->second;
}

bool Store::is_writing(SessionId session, ArrayId id) const {
  return holdings(session).writing.contains(id);
}

Store::SessionUse Store::use_of(SessionId session) const {
  return holdings(session).use;
}

}  // namespace cowmgr
