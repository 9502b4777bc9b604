// The storm: many clients that do everything that clients do, a daemon and clients that are killed at any
// instant, and a model that knows what was acknowledged.
//
// Each client is a process with a number. It alone writes the arrays of its number, and makes the sets of its
// number; it reads and works on all. Before a request that changes something it writes a record to the
// harness, after the answer another one: what the model knows outlives the client.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cowmgr/client.hpp"
#include "cowmgr/results.hpp"

namespace cowmgr::test {

inline constexpr std::uint32_t kStormClients = 4;
inline constexpr std::uint32_t kArraysEach = 5;
inline constexpr const char* kStormQueue = "storm";

// ---- What arrays and results hold: all of it follows from their names ----

// An array of that number; each put of it has a number too, which grows.
[[nodiscard]] std::string array_name(std::uint32_t array);
[[nodiscard]] std::vector<std::byte> array_bytes(std::uint32_t array, std::uint64_t put);
// The put that the bytes are whole of; none if they are not.
[[nodiscard]] std::optional<std::uint64_t> put_of(std::uint32_t array, std::span<const std::byte> bytes);

struct StormSet {
  std::uint32_t maker = 0;  // number of the client
  std::uint32_t number = 0;
  friend auto operator<=>(const StormSet&, const StormSet&) = default;

  [[nodiscard]] std::string name() const;
  [[nodiscard]] static std::optional<StormSet> parse(const std::string& name);
  [[nodiscard]] bool is_ragged() const noexcept { return number % 2 == 0; }
  [[nodiscard]] bool is_detached() const noexcept { return number % 3 != 0; }
  [[nodiscard]] std::uint64_t slots() const noexcept { return 3 + number % 7; }
  [[nodiscard]] std::uint64_t rows() const noexcept { return slots() * 100 + number % 5; }
  [[nodiscard]] std::uint64_t item(
      std::uint64_t at) const noexcept;  // row of a dense set, or what a slot holds
  [[nodiscard]] bool holds_array(std::uint64_t slot) const noexcept { return slot % 3 == 1; }
};
// Makes the result of a slot, to be committed.
[[nodiscard]] Result<void> fill(const StormSet& set, Slot& slot);
// What is wrong with what a committed slot of an open set holds; empty: nothing.
[[nodiscard]] std::string check_slot(const StormSet& set, const ResultSet& open, std::uint64_t slot);

// ---- What the harness is told ----

struct Record {
  enum class What : std::uint32_t { put, evict, make_set, commit, forget_set, count };
  What what{};
  std::uint32_t client = 0;
  std::uint32_t array = 0;  // put, evict
  StormSet set{};           // the others
  std::uint64_t put = 0;
  std::uint64_t slot = 0;       // commit
  std::uint32_t is_answer = 0;  // 0: it will be asked for now. 1: it was done
};

// ---- The model ----

class StormModel {
 public:
  void note(const Record& record);
  [[nodiscard]] std::uint64_t records() const noexcept { return records_; }

  // The puts that the array may show: what was acknowledged last, and all that was asked for since. No
  // number: that there is none.
  using Shown = std::optional<std::uint64_t>;
  [[nodiscard]] std::set<Shown> possible(std::uint32_t array) const;
  // It was looked at when nobody wrote to it.
  void settle(std::uint32_t array, Shown shown);
  [[nodiscard]] std::uint64_t last_put(std::uint32_t array) const;

  struct Set {
    bool is_made = false;                 // acknowledged
    bool may_be_gone = false;             // somebody asked to forget it, or its maker died
    std::set<std::uint64_t> committed{};  // acknowledged
  };
  [[nodiscard]] const std::map<StormSet, Set>& sets() const noexcept { return sets_; }
  [[nodiscard]] std::uint32_t last_set(std::uint32_t client) const;
  // The client is dead: what goes with it goes.
  void client_died(std::uint32_t client);
  void forget(const StormSet& set) { sets_.erase(set); }

 private:
  struct Array {
    Shown shown{};
    std::set<Shown> asked{};
    std::uint64_t last_put = 0;
  };
  std::map<std::uint32_t, Array> arrays_;
  std::map<StormSet, Set> sets_;
  std::map<std::uint32_t, std::uint32_t> last_set_;
  std::uint64_t records_ = 0;
};

// ---- A client ----

struct StormClientPlan {
  std::string socket;
  std::uint32_t number = 0;
  unsigned seed = 0;
  int records = -1;                                  // pipe(7) to the harness
  const std::atomic<bool>* is_over = nullptr;        // in shared memory
  std::map<std::uint32_t, StormModel::Shown> own{};  // what its arrays show
  std::map<std::uint32_t, std::uint64_t> last_put{};
  std::optional<StormSet> left{};  // a set that the client of this number before it left
  std::uint32_t last_set = 0;
};
// Runs in a process of its own until it is over. Returns what went wrong; empty: nothing.
[[nodiscard]] std::string run_storm_client(const StormClientPlan& plan);

}  // namespace cowmgr::test
