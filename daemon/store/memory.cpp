#include "daemon/store/memory.hpp"

#include "proto/errors.hpp"

namespace cowmgr {

Memory::Share::Share(Memory& memory, std::uint64_t size_bytes, MemoryState state) noexcept
    : memory_(&memory), state_(state) {
  grow(size_bytes);
}

void Memory::Share::grow(std::uint64_t more_bytes) noexcept {
  if (memory_ == nullptr) return;
  size_bytes_ += more_bytes;
  memory_->used_bytes_ += more_bytes;
  memory_->bytes_[static_cast<std::size_t>(state_)] += more_bytes;
}

void Memory::Share::shrink(std::uint64_t less_bytes) noexcept {
  if (memory_ == nullptr) return;
  COWMGR_ASSERT(size_bytes_ >= less_bytes);
  size_bytes_ -= less_bytes;
  memory_->used_bytes_ -= less_bytes;
  memory_->bytes_[static_cast<std::size_t>(state_)] -= less_bytes;
}

void Memory::Share::move_to(MemoryState state) noexcept {
  if (memory_ == nullptr) return;
  memory_->bytes_[static_cast<std::size_t>(state_)] -= size_bytes_;
  memory_->bytes_[static_cast<std::size_t>(state)] += size_bytes_;
  state_ = state;
}

void Memory::Share::give_back() noexcept {
  shrink(size_bytes_);
  memory_ = nullptr;
}

}  // namespace cowmgr
