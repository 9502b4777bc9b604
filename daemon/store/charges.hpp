// What one owner may hold at most, so that nobody exhausts what others need.
#pragma once

#include <cstdint>
#include <sys/types.h>
#include <unordered_map>
#include <utility>

#include "daemon/shm/descriptors.hpp"
#include "proto/errors.hpp"

namespace cowmgr {

struct QuotaLimits {
  std::uint64_t owner_bytes = UINT64_MAX;  // of segments; default: no limit but the capacity
  std::uint32_t owner_arrays =
      65536;  // each takes three descriptors of the daemon until it is sealed, then two
  std::uint32_t owner_sessions = 4096;  // connections; each takes one descriptor, and one for its process
  std::uint32_t sessions = UINT32_MAX;  // of all users together
};

// Fills in the limits that nobody gave (0): what one user may have, so that the plan holds for the others,
// too.
[[nodiscard]] QuotaLimits limits_within(const DescriptorPlan& plan, QuotaLimits limits) noexcept;

// Counts by uid. A charge that would pass a limit is refused with quota_exceeded and changes nothing.
class Charges {
 public:
  // What was taken in a user's name, until this goes. Move-only.
  class Charge {
   public:
    Charge() noexcept = default;
    Charge(Charge&& other) noexcept { *this = std::move(other); }
    Charge& operator=(Charge&& other) noexcept;
    Charge(const Charge&) = delete;
    Charge& operator=(const Charge&) = delete;
    ~Charge() { give_back(); }

    [[nodiscard]] uid_t user() const noexcept { return user_; }
    // What was charged takes more, or less than it did.
    [[nodiscard]] Result<void> grow(std::uint64_t more_bytes);
    void shrink(std::uint64_t less_bytes) noexcept;
    void give_back() noexcept;

   private:
    friend class Charges;

    Charges* charges_ = nullptr;
    uid_t user_ = 0;
    std::uint64_t size_bytes_ = 0;
    std::uint32_t arrays_ = 0;
    std::uint32_t connections_ = 0;
  };

  explicit Charges(const QuotaLimits& limits) : limits_(limits) {}
  ~Charges() = default;
  Charges(const Charges&) = delete;
  Charges& operator=(const Charges&) = delete;

  // An array, or what is counted as one.
  [[nodiscard]] Result<Charge> array(uid_t user, std::uint64_t size_bytes);
  // One that is there already, of before the daemon's start: no limit refuses it.
  [[nodiscard]] Charge array_there_is(uid_t user, std::uint64_t size_bytes);
  [[nodiscard]] Result<Charge> connection(uid_t user);

 private:
  struct Use {
    std::uint64_t size_bytes = 0;
    std::uint32_t arrays = 0;
    std::uint32_t connections = 0;
  };
  [[nodiscard]] Use use_of(uid_t user) const;
  [[nodiscard]] Result<void> check_bytes(uid_t user, std::uint64_t more_bytes) const;
  [[nodiscard]] Charge take(uid_t user, std::uint64_t size_bytes, std::uint32_t arrays,
                            std::uint32_t connections);

  QuotaLimits limits_;
  std::unordered_map<uid_t, Use> uses_;
  std::uint32_t connections_ = 0;  // of all
};

using Charge = Charges::Charge;

}  // namespace cowmgr
