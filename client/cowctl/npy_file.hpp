// .npy files: one to put, which is checked before anything is asked of the daemon; one to get, which appears
// whole or not at all.
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

// A .npy file whose header is sound and which is as long as its header says, or longer.
class NpyInput {
 public:
  // Errors: not_found, permission_denied, invalid_file, invalid_dtype, invalid_shape.
  [[nodiscard]] static Result<NpyInput> open(const std::string& path);

  [[nodiscard]] const ArraySpec& spec() const noexcept { return header_.spec; }
  [[nodiscard]] std::uint64_t data_bytes() const noexcept { return header_.data_bytes; }

  // Reads the data into `memory`, which has data_bytes() bytes. Errors: invalid_file when the file has become
  // shorter, os_failure.
  [[nodiscard]] Result<void> read(std::span<std::byte> memory, const OnProgress& on_progress) const;

 private:
  NpyInput(UniqueFd fd, std::string path, NpyHeader header)
      : fd_(std::move(fd)), path_(std::move(path)), header_(std::move(header)) {}

  UniqueFd fd_;
  std::string path_;
  NpyHeader header_;
};

// A new file. It gets its name when it is complete; until then a failure, a signal or a kill leaves nothing.
// Devices and pipes are written to as they are. Move-only.
class OutputFile {
 public:
  // Errors: already_exists unless `overwrite`, invalid_argument for a directory, not_found when the directory
  // is missing, permission_denied, os_failure.
  [[nodiscard]] static Result<OutputFile> create(const std::string& path, bool overwrite);
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  // Appends. Errors: out_of_memory when the file system is full, os_failure.
  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes);
  // Gives the file its name. Errors: as write(), and already_exists when somebody else was faster.
  [[nodiscard]] Result<void> commit();

 private:
  enum class Kind : std::uint8_t {
    unnamed,  // O_TMPFILE: the kernel frees it with its last descriptor
    partial,  // named partial_, where the file system has no unnamed files
    direct,   // a device or a pipe
  };
  OutputFile(UniqueFd fd, Kind kind, std::string path, bool overwrite);
  [[nodiscard]] static Result<OutputFile> create_beside(const std::string& path, bool overwrite);
  [[nodiscard]] Result<void> give_partial_name();
  [[nodiscard]] Result<void> close();
  [[nodiscard]] Result<void> rename_to_path();

  UniqueFd fd_;
  Kind kind_;
  std::string path_;
  std::string partial_;  // the temporary name; empty when there is none on the disk
  bool overwrite_;
};

}  // namespace cowmgr::cli
