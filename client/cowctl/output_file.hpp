// A file that appears whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <sys/stat.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::cli {

// A new file. It gets its name when it is complete; until then a failure, a signal or a kill leaves nothing.
// What it overwrites keeps its mode, and, where we may say so, its owner. Devices and pipes are written to as
// they are. Move-only.
class OutputFile {
 public:
  // Errors: already_exists unless `overwrite`, invalid_argument for a directory, not_found when the directory
  // is missing, permission_denied, os_failure.
  [[nodiscard]] static Result<OutputFile> create(const std::string& path, bool overwrite);
  // Writes to standard output, as it is.
  [[nodiscard]] static Result<OutputFile> standard_output();
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  // Appends. Errors: os_failure, also when the file system is full.
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
  [[nodiscard]] static Result<OutputFile> create_beside(const std::string& path, bool overwrite,
                                                        const struct stat* replaced);
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
