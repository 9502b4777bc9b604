// Where the capacity is: every byte that is taken is in one state. Knows no arrays: it keeps totals, and an
// order of what may go.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <utility>

namespace cowmgr {

// Of each byte, the first that fits.
enum class MemoryState : std::uint8_t {
  writing,     // reserved, being written or copied, or waiting for its writer
  draining,    // evicted, replaced or rewritten, and kept for its views
  pinned,      // viewed or not
  viewed,      // served, and somebody views it
  evictable,   // goes when room is needed
  kept,        // nobody views it, and it stays until somebody evicts it
  results,     // slots and values of result sets
  reclaiming,  // being given back
  outside,     // gone for us, but processes have it mapped or open without a view
};
inline constexpr std::size_t kMemoryStates = 9;

class Memory {
 public:
  // Bytes that are taken, until this goes. Move-only.
  class Share {
   public:
    Share() noexcept = default;
    Share(Share&& other) noexcept { *this = std::move(other); }
    Share& operator=(Share&& other) noexcept {
      give_back();
      memory_ = std::exchange(other.memory_, nullptr);
      size_bytes_ = std::exchange(other.size_bytes_, 0);
      state_ = other.state_;
      return *this;
    }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;
    ~Share() { give_back(); }

    [[nodiscard]] std::uint64_t size_bytes() const noexcept { return size_bytes_; }
    void move_to(MemoryState state) noexcept;
    // In the state that it is in.
    void grow(std::uint64_t more_bytes) noexcept;
    void shrink(std::uint64_t less_bytes) noexcept;
    void give_back() noexcept;

   private:
    friend class Memory;
    Share(Memory& memory, std::uint64_t size_bytes, MemoryState state) noexcept;

    Memory* memory_ = nullptr;
    std::uint64_t size_bytes_ = 0;
    MemoryState state_{};
  };

  explicit Memory(std::uint64_t capacity_bytes) noexcept : capacity_bytes_(capacity_bytes) {}
  ~Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Takes so many bytes, whether there is room or not.
  [[nodiscard]] Share take(std::uint64_t size_bytes, MemoryState state) noexcept {
    return {*this, size_bytes, state};
  }
  [[nodiscard]] std::uint64_t capacity_bytes() const noexcept { return capacity_bytes_; }
  [[nodiscard]] std::uint64_t used_bytes() const noexcept { return used_bytes_; }
  [[nodiscard]] std::uint64_t bytes(MemoryState state) const noexcept {
    return bytes_[static_cast<std::size_t>(state)];
  }
  // Whether so many more bytes are free now; and whether they will be when all is given back that is on its
  // way; and whether they would be if all that is evictable went, too.
  [[nodiscard]] bool has_room(std::uint64_t size_bytes) const noexcept {
    return fits(size_bytes, used_bytes_);
  }
  [[nodiscard]] bool expects_room(std::uint64_t size_bytes) const noexcept {
    return fits(size_bytes, used_bytes_ - bytes(MemoryState::reclaiming));
  }
  [[nodiscard]] bool can_make_room(std::uint64_t size_bytes) const noexcept {
    return fits(size_bytes, used_bytes_ - bytes(MemoryState::reclaiming) - bytes(MemoryState::evictable));
  }

 private:
  [[nodiscard]] bool fits(std::uint64_t size_bytes, std::uint64_t used_bytes) const noexcept {
    return used_bytes <= capacity_bytes_ && size_bytes <= capacity_bytes_ - used_bytes;
  }

  std::uint64_t capacity_bytes_;
  std::uint64_t used_bytes_ = 0;
  std::array<std::uint64_t, kMemoryStates> bytes_{};
};

// What nobody uses, in the order in which it was used last.
class UseOrder {
 public:
  using Id = std::uint64_t;
  using Use = std::uint64_t;  // when something was used: a later use is a higher number

  void insert(Use use, Id id) { idle_.emplace(use, id); }
  void erase(Use use, Id id) noexcept { idle_.erase({use, id}); }
  [[nodiscard]] std::optional<Id> oldest() const noexcept {
    return idle_.empty() ? std::nullopt : std::optional(idle_.begin()->second);
  }
  [[nodiscard]] const std::set<std::pair<Use, Id>>& all() const noexcept { return idle_; }

 private:
  std::set<std::pair<Use, Id>> idle_;
};

}  // namespace cowmgr
