// The store against a plain model of it: thousands of random steps, and after each one the same arrays in the
// same states, and the same account of the memory.

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/store_fixture.hpp"

namespace cowmgr {
namespace {

using State = ArrayRecord::State;

struct PlainArray {
  std::string name;
  std::uint64_t version = 0;
  std::uint64_t pages = 0;
  State state = State::reserved;
  bool replace = false;
  bool evictable = false;
  bool pinned = false;
  SessionId writer = 0;
  std::map<SessionId, std::uint32_t> views{};
  Time last_used{};

  [[nodiscard]] std::uint32_t view_count() const {
    std::uint32_t count = 0;
    for (const auto& [session, views_of_it] : views) count += views_of_it;
    return count;
  }
  [[nodiscard]] bool is_unsealed() const { return state == State::reserved || state == State::writing; }
  [[nodiscard]] bool is_evictable() const {
    return state == State::sealed && evictable && !pinned && views.empty();
  }
};

// What store.hpp promises, told without indexes and without sharing a line with store.cpp.
struct PlainStore {
  std::uint64_t capacity_pages = 0;
  std::uint64_t last_id = 0;
  std::map<ArrayId, PlainArray> arrays{};
  std::map<ArrayId, std::uint64_t> orphans{};
  std::uint64_t reclaiming_pages = 0;  // the orphans' too, and what outsiders keep
  std::uint64_t outside_pages = 0;     // of them

  [[nodiscard]] ArrayId current(const std::string& name) const {
    for (const auto& [id, array] : arrays) {
      if (array.name == name && array.state == State::sealed) return id;
    }
    return 0;
  }
  [[nodiscard]] bool is_written(const std::string& name) const {
    return std::any_of(arrays.begin(), arrays.end(), [&](const auto& entry) {
      return entry.second.name == name && entry.second.is_unsealed();
    });
  }
  template <class Wanted>
  [[nodiscard]] std::uint64_t pages_of(const Wanted& wanted) const {
    std::uint64_t pages = 0;
    for (const auto& [id, array] : arrays) pages += wanted(array) ? array.pages : 0;
    return pages;
  }
  [[nodiscard]] std::uint64_t held_pages() const {
    return pages_of([](const PlainArray&) { return true; });
  }

  void drop(ArrayId id) {
    const PlainArray array = arrays.at(id);
    reclaiming_pages += array.pages;
    if (array.state == State::reserved) orphans[id] = array.pages;
    arrays.erase(id);
  }
  void drain(ArrayId id) {
    arrays.at(id).state = State::draining;
    drop_if_done(id);
  }
  void drop_if_done(ArrayId id) {
    if (arrays.at(id).state == State::draining && arrays.at(id).views.empty()) drop(id);
  }

  // The least recently used one that `wanted` takes, or 0.
  template <class Wanted>
  [[nodiscard]] ArrayId oldest(const Wanted& wanted) const {
    ArrayId found = 0;
    for (const auto& [id, array] : arrays) {
      if (wanted(array) && (found == 0 || array.last_used < arrays.at(found).last_used)) found = id;
    }
    return found;
  }

  std::optional<Errc> reserve(const PlainArray& wish) {
    if (!wish.replace && (current(wish.name) != 0 || is_written(wish.name))) return Errc::already_exists;
    const auto is_evictable = [](const PlainArray& array) { return array.is_evictable(); };
    const std::uint64_t evictable = pages_of(is_evictable);
    const std::uint64_t taken_pages = outside_pages + wish.pages;
    if (held_pages() - evictable + taken_pages > capacity_pages) return Errc::out_of_memory;
    while (held_pages() + taken_pages > capacity_pages) drain(oldest(is_evictable));
    if (held_pages() + reclaiming_pages + wish.pages > capacity_pages) return Errc::out_of_memory;
    std::uint64_t version = 0;
    for (const auto& [id, array] : arrays)
      version = array.name == wish.name ? std::max(version, array.version) : version;
    PlainArray& made = arrays[++last_id] = wish;
    made.version = version + 1;
    return std::nullopt;
  }

  void seal(ArrayId id, bool keep_view, Time now) {
    PlainArray& array = arrays.at(id);
    const ArrayId previous = current(array.name);
    array.state = State::sealed;
    array.last_used = now;
    if (keep_view) ++array.views[array.writer];
    array.writer = 0;
    if (previous == 0) return;
    if (arrays.at(previous).version > array.version) return drain(id);
    array.pinned = arrays.at(previous).pinned;
    drain(previous);
  }

  void close(SessionId session) {
    for (const ArrayId id : ids()) {
      if (arrays.at(id).writer == session) {
        drop(id);
      } else if (arrays.at(id).views.erase(session) > 0) {
        drop_if_done(id);
      }
    }
  }

  [[nodiscard]] std::vector<ArrayId> ids() const {
    std::vector<ArrayId> found;
    found.reserve(arrays.size());
    for (const auto& [id, array] : arrays) found.push_back(id);
    return found;
  }
};

class StoreWalk : public StoreTest, public testing::WithParamInterface<unsigned> {
 protected:
  StoreWalk() {
    for (auto& session : sessions_) open(session);
  }

  std::uint64_t pick(std::uint64_t end) {
    return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_);
  }
  bool toss() { return pick(2) == 0; }
  SessionId pick_session() { return sessions_[pick(sessions_.size())]; }
  std::string pick_name() { return fmt::format("n{}", pick(6)); }
  // Any array, or one that never was.
  ArrayId pick_id() {
    const auto ids = model_.ids();
    return ids.empty() || pick(10) == 0 ? 99999 : ids[pick(ids.size())];
  }

  void open(SessionId& session) {
    session = ++last_session_;
    store_->open_session(session, {.pid = static_cast<pid_t>(session), .uid = kAliceUid, .gid = kAliceUid});
  }

  template <class T>
  static void expect(const Result<T>& result, std::optional<Errc> refusal) {
    ASSERT_EQ(result.has_value(), !refusal.has_value()) << testing::PrintToString(result);
    if (refusal) {
      ASSERT_EQ(result.error().code, *refusal);
    }
  }

  void reserve_one() {
    const SessionId session = pick_session();
    const Options options{.pages = 2 + pick(30), .replace = toss(), .evictable = toss()};
    const std::string name = pick_name();
    const Time now = tick();
    const auto refusal = model_.reserve({.name = name,
                                         .pages = options.pages,
                                         .replace = options.replace,
                                         .evictable = options.evictable,
                                         .writer = session,
                                         .last_used = now});
    const auto id = store_->reserve(session, request(name, options), now);
    expect(id, refusal);
    if (!id) return;
    ASSERT_EQ(*id, model_.last_id);
    making_[*id] = {options.pages * kPageBytes, *header_of(record(*id))};
  }

  // What is being made is there now, or could not be had.
  void end_making() {
    if (making_.empty()) return;
    const auto at = std::next(making_.begin(), static_cast<std::ptrdiff_t>(pick(making_.size())));
    const ArrayId id = at->first;
    const bool is_orphan = model_.orphans.erase(id) > 0;
    if (pick(5) > 0) {
      expect(store_->back(id, make_segment(id, at->second.first, at->second.second)),
             is_orphan ? std::optional(Errc::not_found) : std::nullopt);
      if (!is_orphan) model_.arrays.at(id).state = State::writing;
    } else {
      store_->fail_backing(id);
      if (is_orphan)
        model_.reclaiming_pages -= at->second.first / kPageBytes;
      else
        model_.arrays.erase(id);
    }
    making_.erase(at);
  }

  void seal_one() {
    const ArrayId id = pick_id();
    const auto at = model_.arrays.find(id);
    const bool is_writing = at != model_.arrays.end() && at->second.state == State::writing;
    const SessionId session = is_writing && pick(10) > 0 ? at->second.writer : pick_session();
    const bool keep_view = toss();
    const Time now = tick();
    std::optional<Errc> refusal;
    if (!is_writing || at->second.writer != session)
      refusal = Errc::not_holder;
    else if (!at->second.replace && model_.current(at->second.name) != 0)
      refusal = Errc::already_exists;
    if (!refusal) model_.seal(id, keep_view, now);
    expect(store_->seal(session, id, keep_view, now), refusal);
  }

  void abort_one() {
    const ArrayId id = pick_id();
    const auto at = model_.arrays.find(id);
    if (at != model_.arrays.end() && !at->second.is_unsealed()) return;
    if (at != model_.arrays.end()) model_.drop(id);
    store_->abort(id);
  }

  void attach_some() {
    const SessionId session = pick_session();
    const Names names = {pick_name(), pick_name()};
    const std::vector<ArrayId> ids = {pick_id()};
    const Time now = tick();
    std::vector<ArrayId> found = ids;
    for (const auto& name : names) found.push_back(model_.current(name));
    const bool is_there = std::all_of(found.begin(), found.end(), [&](ArrayId id) {
      const auto at = model_.arrays.find(id);
      return at != model_.arrays.end() && !at->second.is_unsealed();
    });
    for (const ArrayId id : is_there ? found : std::vector<ArrayId>()) {
      ++model_.arrays.at(id).views[session];
      model_.arrays.at(id).last_used = now;
    }
    expect(store_->attach(session, names, ids, now),
           is_there ? std::nullopt : std::optional(Errc::not_found));
  }

  void release_one() {
    const SessionId session = pick_session();
    const ArrayId id = pick_id();
    const Time now = tick();
    store_->release(session, id, now);
    const auto at = model_.arrays.find(id);
    if (at == model_.arrays.end() || !at->second.views.contains(session)) return;
    at->second.last_used = now;
    if (--at->second.views.at(session) == 0) at->second.views.erase(session);
    model_.drop_if_done(id);
  }

  // What a name that is spelled out leads to, or why it leads nowhere.
  std::optional<Errc> refusal_of(const std::string& name) {
    if (model_.current(name) != 0) return std::nullopt;
    return model_.is_written(name) ? Errc::busy : Errc::not_found;
  }

  void evict_one() {
    const std::string name = pick_name();
    auto refusal = refusal_of(name);
    if (!refusal && model_.arrays.at(model_.current(name)).pinned) refusal = Errc::pinned;
    if (!refusal) model_.drain(model_.current(name));
    expect(evict(pick_session(), {name}), refusal);
  }

  void evict_all() {
    std::set<std::string> expected;
    bool is_any = false;
    for (const ArrayId id : model_.ids()) {
      if (model_.arrays.at(id).state != State::sealed) continue;
      is_any = true;
      if (model_.arrays.at(id).pinned) continue;
      expected.insert(model_.arrays.at(id).name);
      model_.drain(id);
    }
    const auto evicted = evict(pick_session(), {"n*"});
    expect(evicted, !is_any            ? std::optional(Errc::not_found)
                    : expected.empty() ? std::optional(Errc::pinned)
                                       : std::nullopt);
    if (evicted) {
      ASSERT_EQ(std::set<std::string>(evicted->names.begin(), evicted->names.end()), expected);
    }
  }

  void evict_old() {
    const std::uint64_t pages = pick(40);
    Store::Evicted expected;
    const auto is_wanted = [](const PlainArray& array) {
      return array.state == State::sealed && !array.pinned && array.views.empty();
    };
    while (expected.freed_bytes < pages * kPageBytes) {
      const ArrayId id = model_.oldest(is_wanted);
      if (id == 0) break;
      expected.names.push_back(model_.arrays.at(id).name);
      expected.freed_bytes += model_.arrays.at(id).pages * kPageBytes;
      model_.drain(id);
    }
    const auto evicted = evict_lru(pick_session(), pages * kPageBytes);
    ASSERT_THAT(evicted, Succeeds());
    ASSERT_EQ(evicted->names, expected.names);
    ASSERT_EQ(evicted->freed_bytes, expected.freed_bytes);
  }

  void pin_one() {
    const std::string name = pick_name();
    const bool pinned = pick(3) == 0;
    const auto refusal = refusal_of(name);
    if (!refusal) model_.arrays.at(model_.current(name)).pinned = pinned;
    expect(pinned ? pin(pick_session(), {name}) : unpin(pick_session(), {name}), refusal);
  }

  void end_session() {
    SessionId& session = sessions_[pick(sessions_.size())];
    model_.close(session);
    store_->close_session(session);
    open(session);
  }

  // Some of what is garbage has somebody who keeps it.
  void keep_outside() {
    for (Garbage& garbage : store_->take_garbage()) {
      store_->begin_outside(garbage);
      model_.outside_pages += garbage.memory.size_bytes() / kPageBytes;
      outside_.push_back(std::move(garbage));
    }
  }

  void give_memory_back() {
    reclaim();
    for (Garbage& garbage : outside_) {
      EXPECT_TRUE(env_.try_remove(garbage.segment));
    }
    outside_.clear();
    model_.outside_pages = 0;
    model_.reclaiming_pages = 0;
    for (const auto& [id, pages] : model_.orphans) model_.reclaiming_pages += pages;
  }

  void step() {
    const auto what = pick(100);
    if (what < 18)
      reserve_one();
    else if (what < 34)
      end_making();
    else if (what < 52)
      seal_one();
    else if (what < 54)
      abort_one();
    else if (what < 66)
      attach_some();
    else if (what < 82)
      release_one();
    else if (what < 86)
      evict_one();
    else if (what < 87)
      evict_all();
    else if (what < 89)
      evict_old();
    else if (what < 92)
      pin_one();
    else if (what < 94)
      end_session();
    else if (what < 96)
      keep_outside();
    else
      give_memory_back();
  }

  void check() const {
    ASSERT_EQ(store_->size(), model_.arrays.size());
    for (const auto& [id, array] : model_.arrays) {
      const ArrayRecord* found = store_->find(id);
      ASSERT_NE(found, nullptr) << id;
      ASSERT_EQ(found->state, array.state) << id;
      ASSERT_EQ(found->version, array.version);
      ASSERT_EQ(found->views, array.view_count());
      ASSERT_EQ(found->pinned, array.pinned);
      ASSERT_EQ(found->writer, array.writer);
      for (const SessionId session : sessions_) {
        const auto views = array.views.find(session);
        ASSERT_EQ(store_->views_of(session, id), views == array.views.end() ? 0 : views->second);
      }
    }
    const MemoryUse use = store_->memory_use();
    ASSERT_EQ(use.used_bytes / kPageBytes, model_.held_pages() + model_.reclaiming_pages);
    ASSERT_LE(use.used_bytes, use.capacity_bytes);
    ASSERT_EQ(store_->bytes(MemoryState::reclaiming) / kPageBytes,
              model_.reclaiming_pages - model_.outside_pages);
    ASSERT_EQ(use.pinned_bytes / kPageBytes, model_.pages_of([](const auto& array) { return array.pinned; }));
    ASSERT_EQ(use.evictable_bytes / kPageBytes,
              model_.pages_of([](const auto& array) { return array.is_evictable(); }));
    ASSERT_EQ(use.viewed_bytes / kPageBytes,
              model_.pages_of([](const auto& array) { return !array.views.empty(); }));
    check_states(use);
  }

  // Every byte is in one state, and the states add up to the capacity.
  void check_states(const MemoryUse& use) const {
    const MemoryStates& states = use.states;
    ASSERT_EQ(states.used_bytes(), use.used_bytes);
    ASSERT_EQ(states.used_bytes() + states.free_bytes, use.capacity_bytes);
    const auto expect = [&](std::uint64_t bytes, const auto& wanted) {
      ASSERT_EQ(bytes / kPageBytes, model_.pages_of(wanted));
    };
    const auto is_served = [](const PlainArray& array) { return array.state == State::sealed; };
    expect(states.writing_bytes, [](const PlainArray& array) { return array.is_unsealed(); });
    expect(states.draining_bytes, [](const PlainArray& array) { return array.state == State::draining; });
    expect(states.pinned_bytes, [&](const PlainArray& array) { return is_served(array) && array.pinned; });
    expect(states.viewed_bytes, [&](const PlainArray& array) {
      return is_served(array) && !array.pinned && !array.views.empty();
    });
    expect(states.evictable_bytes, [](const PlainArray& array) { return array.is_evictable(); });
    expect(states.kept_bytes, [&](const PlainArray& array) {
      return is_served(array) && !array.pinned && array.views.empty() && !array.evictable;
    });
    ASSERT_EQ(states.reclaiming_bytes / kPageBytes, model_.reclaiming_pages - model_.outside_pages);
    ASSERT_EQ(states.outside_bytes / kPageBytes, model_.outside_pages);
  }

  // Everybody goes: what is pinned or sealed stays, and nothing else.
  void end_everything() {
    while (!making_.empty()) end_making();
    for (const SessionId session : sessions_) {
      model_.close(session);
      store_->close_session(session);
    }
    give_memory_back();
    sessions_.clear();
  }

  PlainStore model_{.capacity_pages = kCapacityPages};

 private:
  std::mt19937 random_{GetParam()};
  SessionId last_session_ = 100;
  std::vector<SessionId> sessions_ = std::vector<SessionId>(4);
  std::vector<Garbage> outside_;
  std::map<ArrayId, std::pair<std::uint64_t, std::string>> making_;  // size and header of what is being made
};

TEST_P(StoreWalk, TheStoreDoesWhatAPlainModelDoes) {
  for (int i = 0; i < 3000 && !HasFatalFailure(); ++i) {
    SCOPED_TRACE(fmt::format("step {}", i));
    step();
    if (!HasFatalFailure()) check();
  }
  if (HasFatalFailure()) return;
  end_everything();
  check();
  EXPECT_EQ(names_of(instance_).size(), store_->size());
}

INSTANTIATE_TEST_SUITE_P(Seeds, StoreWalk, testing::Range(1U, 7U));

}  // namespace
}  // namespace cowmgr
