// Result sets on a store with real segments and made-up peers.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "daemon/store/results.hpp"
#include "proto/mapping.hpp"
#include "tests/support/result_memory.hpp"
#include "tests/support/store_fixture.hpp"

namespace cowmgr {

inline void PrintTo(ResultSetRecord::State state, std::ostream* out) {
  constexpr std::array<const char*, 5> kNames = {"running", "sealing", "done", "failed", "cancelled"};
  *out << kNames.at(static_cast<std::size_t>(state));
}

class ResultSetsTest : public StoreTest {
 protected:
  using SetState = ResultSetRecord::State;

  void TearDown() override {
    results_.reset();  // it holds descriptors of segments
    StoreTest::TearDown();
  }

  // ---- Time: it passes only when a test says so ----

  static Tick tick_at(int ms) { return Tick(std::chrono::milliseconds(ms)); }
  Moment now() { return {tick(), tick_at(now_ms_)}; }
  void pass(int ms) { now_ms_ += ms; }

  // ---- Sets ----

  // The segment of a set's slots, as the daemon makes it: room for four pages of values, or fewer.
  SlotMemory slot_memory(const ResultRecord& record, const ResultTerms& terms) {
    const ResultLayout layout = result_layout(record);
    const std::uint64_t size_bytes = std::min(layout.max_bytes, layout.values_offset + 4 * kPageBytes);
    auto room = store_->take_room(record.owner_uid, size_bytes);
    EXPECT_THAT(room, Succeeds());
    Segment segment = make_segment(store_->next_id(), size_bytes, "");
    segment.lease.reset();
    auto mapping = Mapping::map(segment.writer.get(), layout.max_bytes, Access::read_write);
    EXPECT_THAT(mapping, Succeeds());
    write_result_header(mapping->data(), record, layout, terms.job);
    return {std::move(segment), *std::move(room), *std::move(mapping)};
  }

  // What a set is to be, but for the number of its slots and whether it is ragged.
  struct Terms {
    bool is_detached = false;
    SlotLimits limits{};
    std::string queue{};
    std::vector<std::byte> job{};
  };
  static ResultTerms terms(std::uint64_t slots, bool is_ragged, const Terms& terms) {
    return {.slots = slots,
            .is_ragged = is_ragged,
            .is_detached = terms.is_detached,
            .limits = terms.limits,
            .queue = terms.queue,
            .job = terms.job};
  }
  struct SetOptions {
    bool replace = false;
    std::uint32_t mode = 0660;
  };

  // A dense set of `slots` slots over one page, made by `session`.
  ArrayId make(SessionId session, const std::string& name, std::uint64_t slots, const SetOptions& options,
               const Terms& set_terms) {
    auto wanted = request(name, {.replace = options.replace, .mode = options.mode});
    const auto id = store_->reserve(session, wanted, tick());
    EXPECT_THAT(id, Succeeds());
    EXPECT_THAT(store_->back(*id, make_segment(*id)), Succeeds());
    const ResultTerms all = terms(slots, false, set_terms);
    const auto described = ResultSets::record_of(session, all, record(*id));
    SlotMemory memory = slot_memory(described, all);
    const auto added = results_->add(described, memory);
    EXPECT_THAT(added, Succeeds());
    return (*added)->id;
  }
  ArrayId make(SessionId session, const std::string& name, std::uint64_t slots) {
    return make(session, name, slots, {}, {});
  }
  ArrayId make(SessionId session, const std::string& name, std::uint64_t slots, const SetOptions& options) {
    return make(session, name, slots, options, {});
  }

  ArrayId make_ragged(SessionId session, const std::string& name, std::uint64_t slots,
                      const SetOptions& options, const Terms& set_terms) {
    const ArrayId id = store_->next_id();
    const ResultTerms all = terms(slots, true, set_terms);
    const CreateRequest wanted{.name = name, .spec = {Dtype::of<std::uint8_t>(), {}}, .mode = options.mode};
    const auto described = results_->record_of(session, all, id, wanted, tick());
    SlotMemory memory = slot_memory(described, all);
    const auto added = results_->add(described, memory);
    EXPECT_THAT(added, Succeeds());
    return (*added)->id;
  }
  ArrayId make_ragged(SessionId session, const std::string& name, std::uint64_t slots) {
    return make_ragged(session, name, slots, {}, {});
  }
  ArrayId make_ragged(SessionId session, const std::string& name, std::uint64_t slots,
                      const SetOptions& options) {
    return make_ragged(session, name, slots, options, {});
  }

  ResultSetRecord& set(ArrayId id) {
    ResultSetRecord* found = results_->get(id);
    COWMGR_ASSERT(found != nullptr);
    return *found;
  }
  bool is_there(ArrayId id) { return results_->get(id) != nullptr; }
  std::uint64_t set_pages(ArrayId id) { return set(id).memory.segment.size_bytes / kPageBytes; }

  // ---- What readers of the set's segment see ----

  ResultSegment seen(ArrayId id) {
    const auto opened = ResultSegment::open(set(id).memory.mapping.data(), id);
    COWMGR_ASSERT(opened.has_value());
    return *opened;
  }
  SlotSnapshot seen(ArrayId id, SlotIndex slot) { return seen(id).slot(slot); }
  std::string text(ArrayId id, SlotIndex slot) { return text_of(seen(id), slot); }
  std::vector<SlotIndex> order(ArrayId id) {
    std::vector<SlotIndex> slots;
    for (std::uint64_t rank = 0; rank < seen(id).settled(); ++rank)
      slots.push_back(seen(id).settled_at(rank));
    return slots;
  }

  // ---- Working ----

  std::vector<SlotIndex> lease(SessionId session, ArrayId id, std::uint64_t count, bool is_shared) {
    std::vector<SlotIndex> slots;
    for (const auto& lease : results_->lease(session, set(id), count, is_shared, now()))
      slots.push_back(lease.slot);
    return slots;
  }
  SlotIndex lease(SessionId session, ArrayId id) {
    const auto slots = lease(session, id, 1, false);
    EXPECT_EQ(slots.size(), 1U);
    return slots.size() == 1 ? slots.front() : UINT64_MAX;
  }
  Result<void> commit(SessionId session, ArrayId id, SlotIndex slot) {
    return results_->commit_rows(session, set(id), slot, now().time);
  }
  void lease_and_commit(SessionId session, ArrayId id) {
    EXPECT_THAT(commit(session, id, lease(session, id)), Succeeds());
  }
  Result<void> commit_value(SessionId session, ArrayId id, SlotIndex slot, const std::string& value) {
    return results_->commit_value(session, set(id), slot, std::as_bytes(std::span(value)), now().time);
  }
  Result<void> fail(SessionId session, ArrayId id, SlotIndex slot, const std::string& reason) {
    return results_->fail(session, set(id), slot, reason, false, now().time);
  }
  // An array for a slot of a ragged set, being written.
  ArrayId allocate(SessionId session, ArrayId id, SlotIndex slot, std::uint64_t pages = 3) {
    auto wanted = request(fmt::format("{}/{}", set(id).name, slot), {.pages = pages});
    wanted.owner = set(id).owner;
    const auto array = store_->reserve(session, wanted, tick());
    EXPECT_THAT(array, Succeeds());
    EXPECT_THAT(store_->back(*array, make_segment(*array)), Succeeds());
    EXPECT_TRUE(results_->allocated(set(id), slot, *array));
    return *array;
  }
  // Seals what was allocated for the slot, and commits it.
  Result<void> commit_array(SessionId session, ArrayId id, SlotIndex slot) {
    const auto sealing = results_->begin_sealing(session, set(id), slot, 0);
    if (!sealing) return error_of(sealing);
    seal(kDaemonSession, sealing->array);
    return results_->commit_array(session, *sealing, now().time);
  }

  // ---- What the daemon does after each request, and when a session ends ----

  std::vector<ArrayId> finish() {
    results_->finish_settled(tick());
    for (const ArrayId id : std::set<ArrayId>(results_->unsealed()))
      std::ignore = results_->seal_again(id, tick());
    return {results_->unsealed().begin(), results_->unsealed().end()};
  }
  void forget_dropped() {
    for (const ArrayId array : store_->take_dropped()) results_->forget_array(array);
  }
  void end_session(SessionId session, const std::string& reason = "it went away") {
    results_->close_session(session, reason, tick());
    store_->close_session(session);
  }
  void ignore_changes() { std::ignore = results_->take_changed(); }
  // "changed free settled ended", as far as that was told of the set.
  std::string changes_of(ArrayId id) {
    const auto changed = results_->take_changed();
    const auto at = changed.find(id);
    if (at == changed.end()) return "";
    return fmt::format("changed{}{}{}", at->second.has_free ? " free" : "",
                       at->second.is_settled ? " settled" : "", at->second.has_ended ? " ended" : "");
  }

  std::optional<ResultSets> results_{std::in_place, *store_, kAdminUid};

 private:
  int now_ms_ = 0;
};

}  // namespace cowmgr
