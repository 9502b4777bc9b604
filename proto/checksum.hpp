// The checksum of an array's data: XXH3 with 64 bits and seed 0 (xxHash's specification), where 0 stands for
// 1 because 0 says that there is none. It finds what a machine does to memory by mistake, not what somebody
// does on purpose. Runs at the speed of memory: a second or less for 8 GiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace cowmgr {

// Of data that comes in pieces. Move-only.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(Checksum&&) noexcept;
  Checksum& operator=(Checksum&&) noexcept;
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;

  void add(std::span<const std::byte> bytes) noexcept;
  // Of all that was added so far; never 0.
  [[nodiscard]] std::uint64_t value() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Of data that is here as a whole.
[[nodiscard]] std::uint64_t checksum_of(std::span<const std::byte> bytes) noexcept;

}  // namespace cowmgr
