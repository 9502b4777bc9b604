// What an array is: the type of its items, its shape and its order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cowmgr/dtype.hpp"
#include "cowmgr/errors.hpp"

namespace cowmgr {

inline constexpr std::size_t kMaxDimensions = 32;  // NumPy 1's limit

enum class Order : std::uint8_t { c, fortran };

// The length of each axis; empty for a single value (0 dimensions).
using Shape = std::vector<std::uint64_t>;

// What the bytes of an array mean.
struct ArraySpec {
  Dtype dtype;
  Shape shape;
  Order order = Order::c;

  friend bool operator==(const ArraySpec&, const ArraySpec&) = default;
};

// Number of bytes of data that `spec` describes. Errors: invalid_shape when it has over 32 dimensions, or
// when the count passes 2^48 (what a process can map), empty axes notwithstanding.
[[nodiscard]] Result<std::uint64_t> data_bytes(const ArraySpec& spec);

// "(60000, 784)", "(3,)", "()": as Python writes a tuple.
[[nodiscard]] std::string to_string(const Shape& shape);

}  // namespace cowmgr
