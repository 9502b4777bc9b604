// For programs that would rather catch than check. Header-only: the library itself never throws.
#pragma once

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cowmgr/errors.hpp"

namespace cowmgr {

// An Error as an exception; what() is its message.
class Exception : public std::runtime_error {
 public:
  explicit Exception(const Error& error) : std::runtime_error(error.message), code_(error.code) {}

  [[nodiscard]] Errc code() const noexcept { return code_; }

 private:
  Errc code_;
};

// What the call returned, or, where it was refused, an Exception:
//   auto array = cowmgr::or_throw(client.attach("train"));
template <class T>
T or_throw(Result<T> result) {
  if (!result) throw Exception(result.error());
  if constexpr (!std::is_void_v<T>) return *std::move(result);
}

}  // namespace cowmgr
