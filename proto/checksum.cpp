#include "proto/checksum.hpp"

#include <algorithm>

#define XXH_INLINE_ALL  // nobody who links this library needs another one
#ifndef NDEBUG
#define XXH_NO_INLINE_HINTS 1  // gcc refuses them without optimization
#endif
#include <xxhash.h>

namespace cowmgr {
namespace {

std::uint64_t not_none(std::uint64_t hash) noexcept {
  return std::max<std::uint64_t>(hash, 1);
}

}  // namespace

struct Checksum::State {
  XXH3_state_t xxh3;
};

Checksum::Checksum() : state_(std::make_unique<State>()) {
  XXH3_64bits_reset(&state_->xxh3);
}
Checksum::~Checksum() = default;
Checksum::Checksum(Checksum&&) noexcept = default;
Checksum& Checksum::operator=(Checksum&&) noexcept = default;

void Checksum::add(std::span<const std::byte> bytes) noexcept {
  XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size());
}

std::uint64_t Checksum::value() const noexcept {
  return not_none(XXH3_64bits_digest(&state_->xxh3));
}

std::uint64_t checksum_of(std::span<const std::byte> bytes) noexcept {
  return not_none(XXH3_64bits(bytes.data(), bytes.size()));
}

}  // namespace cowmgr
