#include "daemon/store/recovery.hpp"

#include <algorithm>
#include <vector>

#include <spdlog/spdlog.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

class Recoverer {
 public:
  Recoverer(const ShmEnv& env, Store& store, ResultSets& results, FdStore& kept, const Moment& now)
      : env_(env), store_(store), results_(results), kept_(kept), now_(now) {}

  // Arrays before sets: a set asks for its arrays.
  Result<Recovery> run() {
    const auto ids = env_.list();
    if (!ids) return error_of(ids);
    for (const std::uint64_t id : *ids) {
      auto found = env_.find(id);
      if (!found && found.error().code == Errc::not_found) continue;
      if (!found && found.error().code == Errc::permission_denied) {
        if (recovery_.foreign++ == 0) first_foreign_ = found.error().message;
        continue;
      }
      if (!found) return error_of(std::move(found));
      if (auto ok = take(*std::move(found)); !ok) return error_of(std::move(ok));
    }
    if (recovery_.foreign > 0)
      spdlog::warn("{} file(s) with names of segments are left alone, the first one since {}",
                   recovery_.foreign, first_foreign_);
    if (auto ok = take_kept(); !ok) return error_of(std::move(ok));
    std::ranges::sort(sets_, {}, [](const auto& found) { return found.file.results.created_us; });
    for (auto& found : sets_) {
      if (auto ok = adopt_set(std::move(found)); !ok) return error_of(std::move(ok));
    }
    auto sessions = results_.sessions();
    sessions.merge(store_.unclaimed_writers());
    for (const SessionId session : sessions) {
      if (has_process(session)) {
        recovery_.awaited.insert(session);
        continue;
      }
      results_.close_session(session, end_of(pid_of(session)), now_.time);
      store_.drop_unclaimed(session);
    }
    return recovery_;
  }

 private:
  Result<void> take(ShmEnv::Found found) {
    store_.note_id(found.id);
    switch (found.file.kind) {
      case SegmentFile::Kind::sealed:
        if (!found.is_free) return adopt_array(std::move(found));
        env_.remove(std::move(found.segment));
        break;
      case SegmentFile::Kind::slots:
        sets_.push_back(std::move(found));
        break;
      case SegmentFile::Kind::unsealed:
        ++recovery_.unsealed;
        store_.keep_unclaimed(found.id, std::move(found.segment), found.file);
        break;
      case SegmentFile::Kind::newer:
        ++recovery_.foreign;
        spdlog::warn("{} is left alone: {}", found.segment.name, found.file.problem);
        break;
      default:
        move_aside(found.id, found.segment.name, found.file.problem);
    }
    return {};
  }

  // A file counts more than what was kept: it is the newer one if somebody removed an older.
  Result<void> take_kept() {
    for (const auto& [id, fd] : kept_.take_kept()) {
      store_.note_id(id);
      auto found = env_.find(id, fd);
      if (!found && found.error().code != Errc::permission_denied) return error_of(std::move(found));
      const ArrayRecord* served = store_.find(id);
      if (found && served == nullptr && found->file.kind == SegmentFile::Kind::sealed) {
        if (auto ok = adopt_array(*std::move(found)); !ok) return ok;
        if (store_.note_unlinked(id)) ++recovery_.unlinked;
        kept_.note_kept(id);
      } else if (found && served != nullptr && is_same_file(served->segment, found->segment)) {
        kept_.note_kept(id);
      } else {
        kept_.forget(id);
      }
    }
    return {};
  }

  Result<void> adopt_array(ShmEnv::Found found) {
    const auto proven = env_.prove_sealed(found.segment);
    if (!proven && proven.error().code != Errc::still_writable) return error_of(proven);
    const bool is_tampered = !proven;
    ++recovery_.arrays;
    recovery_.array_bytes += found.segment.size_bytes;
    if (is_tampered) {
      ++recovery_.tampered;
      spdlog::warn("array {} ({}) can be written by somebody; it is not served any more",
                   printable(found.file.trailer.name), found.segment.name);
    }
    store_.adopt(std::move(found.segment), found.file, is_tampered, now_.time);
    return {};
  }

  Result<void> adopt_set(ShmEnv::Found found) {
    const std::string name = found.segment.name;
    SlotMemory memory{.segment = std::move(found.segment)};
    memory.segment.lease.reset();
    if (auto ok = env_.open_writer(memory.segment); !ok) return ok;
    // Behind its end the file may grow: what is mapped there is touched when it has.
    auto mapping = Mapping::map(memory.segment.writer.get(), result_layout(found.file.results).max_bytes,
                                Access::read_write);
    if (!mapping) return error_of(std::move(mapping));
    memory.mapping = *std::move(mapping);
    const auto adopted = results_.adopt(found.file.results, found.file.spec, memory, now_);
    if (adopted) {
      ++recovery_.sets;
    } else if (adopted.error().code == Errc::corrupted) {
      move_aside(found.id, name, adopted.error().message);
    } else {
      if (adopted.error().code != Errc::not_found) return error_of(adopted);
      // Its clients may have it mapped still: it counts until they have not.
      ++recovery_.removed;
      auto room = store_.take_over_room(found.file.results.owner_uid, memory.segment.size_bytes);
      store_.discard(std::move(room), std::move(memory.segment));
    }
    return {};
  }

  void move_aside(std::uint64_t id, const std::string& name, const std::string& problem) {
    ++recovery_.quarantined;
    if (const auto moved = env_.quarantine(id); !moved) {
      spdlog::error("{} is damaged ({}), and cannot be moved aside: {}", name, problem,
                    moved.error().message);
      return;
    }
    spdlog::error("{} is damaged: {}; it is now {}, for you to look at and to remove", name, problem,
                  quarantine_name(env_.instance(), id));
  }

  const ShmEnv& env_;
  Store& store_;
  ResultSets& results_;
  FdStore& kept_;
  const Moment now_;
  std::vector<ShmEnv::Found> sets_;
  std::string first_foreign_;  // why it is left alone
  Recovery recovery_;
};

}  // namespace

Result<Recovery> recover(const ShmEnv& env, Store& store, ResultSets& results, FdStore& kept,
                         const Moment& now) {
  return Recoverer(env, store, results, kept, now).run();
}

}  // namespace cowmgr
