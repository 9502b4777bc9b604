// A file that appears whole or not at all.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <sys/stat.h>

#include "proto/errors.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::cli {

// A new file. It gets its name when it is complete; until then a failure, a signal or a kill leaves nothing.
// (On a file system without unnamed files, as NFS, what ends the process leaves ".cowctl-<pid>-<n>.partial".)
// What it overwrites keeps its mode, and, where we may say so, its owner. Devices and pipes are written to as
// they are. Move-only.
class OutputFile {
 public:
  // Errors: already_exists unless `overwrite`, invalid_argument for a directory, not_found when the directory
  // is missing, permission_denied, os_failure.
  [[nodiscard]] static Result<OutputFile> create(const std::string& path, bool overwrite);
  // Writes to standard output, as it is.
  [[nodiscard]] static Result<OutputFile> standard_output();
  OutputFile(OutputFile&& other) noexcept
      : OutputFile(std::move(other.fd_), std::move(other.path_), other.overwrite_, other.is_direct_) {
    partial_.swap(other.partial_);
  }
  OutputFile& operator=(OutputFile&&) = delete;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (!partial_.empty()) ::unlink(partial_.c_str());
  }

  // Appends. Errors: os_failure, also when the file system is full.
  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes);
  // Gives the file its name. Errors: as write(), and already_exists when somebody else was faster.
  [[nodiscard]] Result<void> commit();

 private:
  OutputFile(UniqueFd fd, std::string path, bool overwrite, bool is_direct)
      : fd_(std::move(fd)), path_(std::move(path)), overwrite_(overwrite), is_direct_(is_direct) {}
  [[nodiscard]] static Result<OutputFile> create_beside(const std::string& path, bool overwrite,
                                                        const struct stat* replaced);
  [[nodiscard]] Result<void> rename_to_path();

  UniqueFd fd_;
  std::string path_;
  std::string partial_;  // the name on the disk until the file is complete; empty: none
  bool overwrite_;
  bool is_direct_;  // a device, a pipe or standard output: it has its name
};

}  // namespace cowmgr::cli
