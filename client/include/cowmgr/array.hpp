// Arrays as a worker sees them: a view to read, a writer to fill one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "cowmgr/array_spec.hpp"
#include "cowmgr/dtype.hpp"
#include "cowmgr/errors.hpp"

namespace cowmgr {

namespace detail {
class ArrayImpl;
class WriterImpl;
// Whether memory of type `dtype` may be read as `wanted`; the error says what it holds instead.
[[nodiscard]] Result<void> check_dtype(const Dtype& dtype, const Dtype& wanted);

// `bytes` as items of T. Errors: invalid_dtype.
template <class T>
[[nodiscard]] Result<std::span<T>> items_of(const Dtype& dtype, std::span<std::byte> bytes) {
  if (auto ok = check_dtype(dtype, Dtype::of<std::remove_const_t<T>>()); !ok) return error_of(ok);
  return std::span<T>(reinterpret_cast<T*>(bytes.data()), bytes.size() / sizeof(T));
}
}  // namespace detail

// How an array is mapped.
enum class View : std::uint8_t {
  shared,         // read-only; the one copy that all processes read
  copy_on_write,  // writable; pages that are written become private to this process
};

// One view of a sealed array. The memory stays valid and unchanged while this object lives, whatever happens
// to the name, to other processes, or to the daemon. Move-only; the destructor unmaps and never blocks for
// long. Reading is thread-safe; writing to a copy-on-write view needs the caller's own locking. In a forked
// child the view stays readable, though the daemon counts it for the parent alone.
class Array {
 public:
  Array(Array&&) noexcept;
  Array& operator=(Array&&) noexcept;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array();

  [[nodiscard]] const std::string& name() const noexcept;
  [[nodiscard]] std::uint64_t version() const noexcept;
  // Unique within the instance, and never used again: of this version, whatever becomes of the name.
  [[nodiscard]] std::uint64_t id() const noexcept;
  [[nodiscard]] const ArraySpec& spec() const noexcept;
  [[nodiscard]] const Dtype& dtype() const noexcept { return spec().dtype; }
  [[nodiscard]] const Shape& shape() const noexcept { return spec().shape; }

  // Reads all of the data, and compares it with the checksum that was taken when it was sealed. `show` is
  // called now and then with the number of bytes that are done. Blocks: a second or so for 8 GiB. Errors:
  // corrupted; unsupported when no checksum was asked for.
  [[nodiscard]] Result<void> verify(const std::function<void(std::uint64_t)>& show = {}) const;

  // The data, in the order that spec() says; starts at a multiple of 4096 bytes. Empty arrays have an empty
  // span. Valid while this object lives.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept;

  // The data as items of T. Errors: invalid_dtype when the array holds another type.
  template <Scalar T>
  [[nodiscard]] Result<std::span<const T>> as() const {
    return detail::items_of<const T>(dtype(), data());
  }

  // The data of a copy-on-write view, to change at will. Errors: permission_denied for a shared view.
  [[nodiscard]] Result<std::span<std::byte>> mutable_bytes();
  template <Scalar T>
  [[nodiscard]] Result<std::span<T>> mutable_as() {
    auto bytes = mutable_bytes();
    if (!bytes) return error_of(bytes);
    return detail::items_of<T>(dtype(), *bytes);
  }

 private:
  friend class Client;
  friend class ArrayWriter;
  friend class ResultSet;
  explicit Array(std::unique_ptr<detail::ArrayImpl> impl) noexcept;
  [[nodiscard]] std::span<std::byte> data() const noexcept;

  std::unique_ptr<detail::ArrayImpl> impl_;
};

// The one writer of an array that is not sealed yet. Nobody else sees the array. Move-only. Destroying a
// writer before a seal succeeded removes the array; so does the death of its process. Not thread-safe by
// itself: any number of threads may fill the memory, one may call seal(). A forked child does not inherit
// the mapping.
class ArrayWriter {
 public:
  ArrayWriter(ArrayWriter&&) noexcept;
  ArrayWriter& operator=(ArrayWriter&&) noexcept;
  ArrayWriter(const ArrayWriter&) = delete;
  ArrayWriter& operator=(const ArrayWriter&) = delete;
  ~ArrayWriter();

  [[nodiscard]] const ArraySpec& spec() const noexcept;

  // The data to fill, zeroed, backed by memory. Valid until the writer goes; after seal() read-only.
  [[nodiscard]] std::span<std::byte> bytes() const noexcept;
  template <Scalar T>
  [[nodiscard]] Result<std::span<T>> as() const {
    return detail::items_of<T>(spec().dtype, bytes());
  }

  // Makes the array immutable and visible under its name; pointers into bytes() stay valid, read-only, for
  // as long as the returned view lives. The writer is spent after success. Errors: still_writable while
  // another process can still write (the message names it; call seal() again once it cannot);
  // already_exists; corrupted when header or size were overwritten, and then the array is gone.
  [[nodiscard]] Result<Array> seal();

 private:
  friend class Client;
  explicit ArrayWriter(std::unique_ptr<detail::WriterImpl> impl) noexcept;

  std::unique_ptr<detail::WriterImpl> impl_;
};

}  // namespace cowmgr
