// NumPy's type strings: which there are, how large an item is, how they are spelled.
#pragma once

#include <complex>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cowmgr/errors.hpp"

namespace cowmgr {

struct PyLiteral;

// The type of an array's items, as the `descr` of a .npy header spells it (NumPy, "The .npy format"):
// `<f4`, `|u1`, `>i8`, `|b1`, `<c16`, `<M8[ns]`, `|S12`, `<U5`, `|V16`, or a structured type such as
// `[('x', '<f4'), ('y', '<i2', (3,))]`. Always canonical: two equal types have equal text.
// Types that hold Python objects (`|O`) are refused: a pointer means nothing to another process.
class Dtype {
 public:
  // Parses and canonicalises. A missing byte order, and `=`, mean little-endian, this machine's own.
  // Errors: invalid_dtype.
  [[nodiscard]] static Result<Dtype> parse(std::string_view text);
  // The same from the value of a .npy header's 'descr', for those who parse such headers.
  [[nodiscard]] static Result<Dtype> from_literal(const PyLiteral& descr);

  // The type string of a C++ arithmetic or std::complex type: of<float>() is `<f4`.
  template <class T>
  [[nodiscard]] static Dtype of();

  [[nodiscard]] const std::string& str() const noexcept { return text_; }
  [[nodiscard]] std::uint64_t item_bytes() const noexcept { return item_bytes_; }
  [[nodiscard]] bool is_structured() const noexcept { return text_.front() == '['; }

  // `str()` as a Python expression: quoted unless structured.
  [[nodiscard]] std::string to_literal() const;

  friend bool operator==(const Dtype&, const Dtype&) = default;

 private:
  Dtype(std::string text, std::uint64_t item_bytes) : text_(std::move(text)), item_bytes_(item_bytes) {}

  std::string text_;
  std::uint64_t item_bytes_;
};

namespace detail {
template <class T>
inline constexpr bool kIsComplex = false;
template <std::floating_point T>
inline constexpr bool kIsComplex<std::complex<T>> = true;
}  // namespace detail

// C++ types that have a NumPy type string.
template <class T>
concept Scalar = std::is_arithmetic_v<T> || detail::kIsComplex<T>;

template <class T>
Dtype Dtype::of() {
  static_assert(Scalar<T>, "only arithmetic and std::complex types have a NumPy type string");
  const char kind = std::same_as<T, bool>         ? 'b'
                    : detail::kIsComplex<T>       ? 'c'
                    : std::is_floating_point_v<T> ? 'f'
                    : std::is_signed_v<T>         ? 'i'
                                                  : 'u';
  const char order = sizeof(T) == 1 ? '|' : '<';
  return {std::string{order, kind} + std::to_string(sizeof(T)), sizeof(T)};
}

}  // namespace cowmgr
