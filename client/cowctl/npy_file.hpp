// A .npy file to put, which is checked before anything is asked of the daemon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "proto/errors.hpp"
#include "proto/npy.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::cli {

// Called with the number of bytes that are done.
using OnProgress = std::function<void(std::uint64_t)>;

// A .npy file whose header is sound and which is as long as its header says, or longer; of standard input,
// which may be a pipe, read() finds that out.
class NpyInput {
 public:
  // Errors: not_found, permission_denied, invalid_file, invalid_dtype, invalid_shape.
  [[nodiscard]] static Result<NpyInput> open(const std::string& path);
  // What comes from standard input, from where it stands.
  [[nodiscard]] static Result<NpyInput> standard_input();

  [[nodiscard]] const ArraySpec& spec() const noexcept { return header_.spec; }
  [[nodiscard]] std::uint64_t data_bytes() const noexcept { return header_.data_bytes; }

  // Reads the data into `memory`, which has data_bytes() bytes; once. Errors: invalid_file when there is
  // less, os_failure.
  [[nodiscard]] Result<void> read(std::span<std::byte> memory, const OnProgress& on_progress);

 private:
  NpyInput(UniqueFd fd, std::string path, NpyHeader header)
      : fd_(std::move(fd)), path_(std::move(path)), header_(std::move(header)) {}

  UniqueFd fd_;
  std::string path_;
  NpyHeader header_;
};

}  // namespace cowmgr::cli
