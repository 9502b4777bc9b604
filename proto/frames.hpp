// FlatBuffers in frames: building, and verifying what came from the other side, in every build.
#pragma once

#include <cstddef>
#include <span>

#include <flatbuffers/flatbuffers.h>

#include "proto/cowmgr_generated.h"
#include "proto/npy.hpp"

namespace cowmgr {

// The verified root of a frame, or null when the bytes are not a well-formed `Root`. Limits on depth and on
// tables keep the time that a hostile frame takes proportional to its length. Texts and lists that many
// tables share are not counted: who reads them counts them.
template <class Root>
[[nodiscard]] const Root* verified_root(std::span<const std::byte> frame) noexcept {
  constexpr std::size_t kMaxDepth = 8;
  constexpr std::size_t kMaxTables = 8192;
  flatbuffers::Verifier verifier(reinterpret_cast<const std::uint8_t*>(frame.data()), frame.size(), kMaxDepth,
                                 kMaxTables);
  return verifier.VerifyBuffer<Root>(nullptr) ? flatbuffers::GetRoot<Root>(frame.data()) : nullptr;
}

[[nodiscard]] inline std::span<const std::byte> bytes_of(
    const flatbuffers::FlatBufferBuilder& builder) noexcept {
  return {reinterpret_cast<const std::byte*>(builder.GetBufferPointer()), builder.GetSize()};
}

[[nodiscard]] constexpr Order order_of(wire::ByteOrder order) noexcept {
  return order == wire::ByteOrder::fortran ? Order::fortran : Order::c;
}
[[nodiscard]] constexpr wire::ByteOrder order_of(Order order) noexcept {
  return order == Order::fortran ? wire::ByteOrder::fortran : wire::ByteOrder::c;
}

// An absent string of a frame reads as an empty one.
[[nodiscard]] inline std::string_view view_of(const flatbuffers::String* text) noexcept {
  return text == nullptr ? std::string_view() : std::string_view(text->c_str(), text->size());
}

}  // namespace cowmgr
