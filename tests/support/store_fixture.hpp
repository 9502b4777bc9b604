// A store with real segments and made-up peers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "daemon/store/store.hpp"
#include "tests/support/shm_fixture.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {

inline void PrintTo(ArrayRecord::State state, std::ostream* out) {
  constexpr std::array<const char*, 5> kNames = {"reserved", "writing", "sealed", "draining", "tampered"};
  *out << kNames.at(static_cast<std::size_t>(state));
}

class StoreTest : public ShmTest {
 protected:
  using State = ArrayRecord::State;
  using Names = std::vector<std::string>;

  // Sessions: two processes of one user, one of her group, a stranger, root, and the daemon's own user.
  static constexpr SessionId kAlice = session_id(1, 11), kAlice2 = session_id(2, 12),
                             kMate = session_id(3, 13), kStranger = session_id(4, 14),
                             kRoot = session_id(5, 15), kAdmin = session_id(6, 16);
  static constexpr uid_t kAliceUid = 1000, kAdminUid = 900;
  static constexpr std::uint64_t kCapacityPages = 100;

  explicit StoreTest(std::uint64_t capacity_pages = kCapacityPages, QuotaLimits quota = {})
      : env_(instance_, test_lease_signal()),
        store_(std::in_place, env_, StoreOptions{capacity_pages * kPageBytes, quota, kAdminUid}) {
    store_->open_session(kAlice, {.pid = 11, .uid = kAliceUid, .gid = 1000});
    store_->open_session(kAlice2, {.pid = 12, .uid = kAliceUid, .gid = 1000});
    store_->open_session(kMate, {.pid = 13, .uid = 1001, .gid = 1001, .groups = {7, 1000}});
    store_->open_session(kStranger, {.pid = 14, .uid = 1002, .gid = 1002});
    store_->open_session(kRoot, {.pid = 15, .uid = 0, .gid = 0});
    store_->open_session(kAdmin, {.pid = 16, .uid = kAdminUid, .gid = kAdminUid});
  }

  // The daemon stops: its segments go with it.
  void TearDown() override {
    store_.reset();
    env_.remove_leftovers();
    ShmTest::TearDown();
  }

  Time tick() { return Time{std::chrono::microseconds(++ticks_)}; }

  struct Options {
    std::uint64_t pages = 3;  // of the whole segment: header, data, trailer
    bool replace = false;
    bool evictable = false;
    std::uint32_t mode = 0600;
  };
  static CreateRequest request(std::string name, const Options& options) {
    return {.name = std::move(name),
            .spec = bytes_spec((options.pages - 2) * kPageBytes),
            .replace = options.replace,
            .evictable = options.evictable,
            .mode = options.mode};
  }
  static CreateRequest request(std::string name) { return request(std::move(name), Options()); }

  Result<ArrayId> try_reserve(SessionId session, const std::string& name, const Options& options) {
    return store_->reserve(session, request(name, options), tick());
  }
  Result<ArrayId> try_reserve(SessionId session, const std::string& name) {
    return try_reserve(session, name, Options());
  }

  ArrayId reserve(SessionId session, const std::string& name, const Options& options) {
    const auto id = try_reserve(session, name, options);
    EXPECT_THAT(id, Succeeds());
    return id.value_or(0);
  }
  ArrayId reserve(SessionId session, const std::string& name) { return reserve(session, name, Options()); }

  [[nodiscard]] Segment make_segment(ArrayId id) const {
    return make_segment(id, record(id).segment_bytes(), *header_of(record(id)));
  }
  [[nodiscard]] Segment make_segment(ArrayId id, std::uint64_t size_bytes, const std::string& header) const {
    auto segment = env_.create(id, size_bytes, header, {}, never_);
    EXPECT_THAT(segment, Succeeds());
    return *std::move(segment);
  }

  // Reserved and backed: being written.
  ArrayId write(SessionId session, const std::string& name, const Options& options) {
    const ArrayId id = reserve(session, name, options);
    EXPECT_THAT(store_->back(id, make_segment(id)), Succeeds());
    return id;
  }
  ArrayId write(SessionId session, const std::string& name) { return write(session, name, Options()); }

  void seal(SessionId session, ArrayId id) {
    EXPECT_THAT(store_->seal(session, id, false, tick()), testing::Optional(true));
  }

  // Sealed, and nobody views it.
  ArrayId put(SessionId session, const std::string& name, const Options& options) {
    const ArrayId id = write(session, name, options);
    seal(session, id);
    return id;
  }
  ArrayId put(SessionId session, const std::string& name) { return put(session, name, Options()); }

  Result<std::vector<const ArrayRecord*>> try_attach(SessionId session, const Names& names,
                                                     const std::vector<ArrayId>& ids = {}) {
    return store_->attach(session, names, ids, tick());
  }
  // The id of what was attached.
  ArrayId attach(SessionId session, const std::string& name) {
    const auto found = try_attach(session, {name});
    EXPECT_THAT(found, Succeeds());
    return found ? found->front()->id : 0;
  }
  void release(SessionId session, ArrayId id) { store_->release(session, id, tick()); }

  // Names, where there are such arrays, else patterns.
  [[nodiscard]] Selection select(SessionId session, const Names& texts) const {
    auto selection = *store_->names_or_patterns(texts);
    while (!*store_->search(session, selection)) {
    }
    return selection;
  }
  Result<Store::Evicted> evict(SessionId session, const Names& texts) {
    return evict(session, select(session, texts));
  }
  Result<Store::Evicted> evict(SessionId session, Selection selection) {
    Store::Evicted evicted;
    for (;;) {
      const auto is_done = store_->evict_some(session, selection, evicted);
      if (!is_done) return error_of(is_done);
      if (*is_done) return evicted;
    }
  }
  Result<Store::Evicted> evict_lru(SessionId session, std::uint64_t size_bytes) {
    return evict(session, store_->least_used(session, size_bytes));
  }
  Result<Names> pin(SessionId session, const Names& texts, bool pinned = true) {
    Selection selection = select(session, texts);
    Names names;
    for (;;) {
      const auto is_done = store_->pin_some(session, selection, pinned, names);
      if (!is_done) return error_of(is_done);
      if (*is_done) return names;
    }
  }
  Result<Names> unpin(SessionId session, const Names& texts) { return pin(session, texts, false); }

  // What the daemon does in the background: gives the memory of gone arrays back.
  void reclaim() {
    for (Garbage& garbage : store_->take_garbage()) {
      EXPECT_TRUE(env_.try_remove(garbage.segment)) << "nobody else has it";
    }
  }

  [[nodiscard]] const ArrayRecord& record(ArrayId id) const {
    const ArrayRecord* found = store_->find(id);
    COWMGR_ASSERT(found != nullptr);
    return *found;
  }
  [[nodiscard]] bool exists(ArrayId id) const { return store_->find(id) != nullptr; }
  [[nodiscard]] std::uint64_t used_pages() const { return store_->memory_use().used_bytes / kPageBytes; }
  [[nodiscard]] Names listed(SessionId session, const std::string& pattern = "*") const {
    Names names;
    const NameFilter filter{.pattern = *Glob::parse(pattern)};
    for (const ArrayRecord* found : store_->list(session, filter, 0, SIZE_MAX).entries)
      names.push_back(found->name);
    return names;
  }

  const ShmEnv env_;
  std::optional<Store> store_;
  const std::atomic<bool> never_{false};  // the peer that everything is made for stays

 private:
  std::int64_t ticks_ = 0;
};

}  // namespace cowmgr
