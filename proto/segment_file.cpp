#include "proto/segment_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <span>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

using Page = std::array<std::byte, kPageBytes>;

// Zeros where the file is shorter.
Result<Page> read_page(int fd, std::uint64_t id, std::uint64_t offset) {
  Page page{};
  std::size_t have = 0;
  while (have < page.size()) {
    const auto count = ::pread(fd, page.data() + have, page.size() - have, static_cast<off_t>(offset + have));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return tl::unexpected(os_error("pread", fmt::format("segment {:016x}", id), errno));
    if (count == 0) break;
    have += static_cast<std::size_t>(count);
  }
  return page;
}

std::string text_of(const Page& page) {
  return {reinterpret_cast<const char*>(page.data()), page.size()};
}

// Why a file is not what it should be; nothing if it is whole.
struct Problem {
  std::string text{};
  bool is_newer = false;
};
Problem problem_of(const Error& error) {
  return {error.message, error.code == Errc::unsupported};
}

// Fills in what an array's segment says of itself.
Result<Problem> fill_array(SegmentFile& file, int fd, std::uint64_t id, const Page& first) {
  const auto damaged = [](std::string text) { return Problem{std::move(text)}; };
  if (file.size_bytes < kDataOffset + kTrailerBytes) return damaged("it is too short");
  const auto last = read_page(fd, id, file.size_bytes - kTrailerBytes);
  if (!last) return error_of(last);
  auto trailer = decode_trailer(*last);
  if (!trailer) return problem_of(trailer.error());
  std::string text = text_of(first);
  if (trailer->data_offset > kDataOffset) {
    const auto second = read_page(fd, id, kDataOffset);
    if (!second) return error_of(second);
    text += text_of(*second);
  }
  const auto header = parse_npy_header(std::as_bytes(std::span(text)));
  if (!header) return damaged(fmt::format("its header is damaged: {}", header.error().message));
  if (trailer->id != id) return damaged(fmt::format("its trailer is that of segment {:016x}", trailer->id));
  if (trailer->name.empty() || trailer->version == 0) return damaged("its trailer names no array");
  if (header->data_offset != trailer->data_offset || header->data_bytes != trailer->data_bytes)
    return damaged("its header and its trailer contradict each other");
  if (file.size_bytes != segment_bytes(trailer->data_bytes, trailer->data_offset))
    return damaged("its size is not what its trailer says");
  file.trailer = *std::move(trailer);
  file.spec = header->spec;
  file.header = std::move(text);
  return Problem();
}

// The same of a result set's.
Result<Problem> fill_slots(SegmentFile& file, int fd, std::uint64_t id, const Page& first) {
  std::array<std::byte, kSlotsOffset> pages{};
  const auto second = read_page(fd, id, kPageBytes);
  if (!second) return error_of(second);
  std::copy(first.begin(), first.end(), pages.begin());
  std::copy(second->begin(), second->end(), pages.begin() + kPageBytes);
  auto record = read_result_header(pages, file.size_bytes);
  if (!record) return problem_of(record.error());
  if (const auto more = more_npy_header(*record)) {
    const auto third = read_page(fd, id, *more);
    if (!third) return error_of(third);
    if (auto ok = add_npy_header(*record, pages, *third); !ok) return problem_of(ok.error());
  }
  if (!record->is_ragged) {
    const auto header = parse_npy_header(std::as_bytes(std::span(record->npy_header)));
    if (!header || header->data_offset != record->npy_header.size() || header->spec.shape.empty())
      return Problem{"the header of its output array is damaged"};
    file.spec = header->spec;
  }
  file.results = *std::move(record);
  return Problem();
}

}  // namespace

std::optional<SegmentFileName> parse_segment_file_name(std::string_view file) {
  constexpr std::string_view kPrefix = "cowmgr.";
  constexpr std::string_view kAside = ".quarantine";
  constexpr std::size_t kDigits = 16;
  if (!file.starts_with(kPrefix) || file.size() < kPrefix.size() + 1 + kDigits) return std::nullopt;
  const std::string_view digits = file.substr(file.size() - kDigits);
  if (file[file.size() - kDigits - 1] != '.' ||
      digits.find_first_not_of("0123456789abcdef") != std::string_view::npos)
    return std::nullopt;
  SegmentFileName name;
  std::from_chars(digits.data(), digits.data() + digits.size(), name.id, 16);
  std::string_view instance = file.substr(kPrefix.size(), file.size() - kPrefix.size() - 1 - kDigits);
  name.is_quarantined = instance.ends_with(kAside);
  if (name.is_quarantined) instance.remove_suffix(kAside.size());
  if (!check_instance(instance)) return std::nullopt;
  name.instance = instance;
  return name;
}

std::string quarantine_name(std::string_view instance, std::uint64_t id) {
  return fmt::format("/cowmgr.{}.quarantine.{:016x}", instance, id);
}

Result<SegmentFile> read_segment_file(int fd, std::uint64_t id) {
  struct stat info {};
  if (::fstat(fd, &info) != 0)
    return tl::unexpected(os_error("fstat", fmt::format("segment {:016x}", id), errno));
  SegmentFile file{.kind = SegmentFile::Kind::unsealed,
                   .is_pinned = (info.st_mode & kMarkPinned) != 0,
                   .is_draining = (info.st_mode & kMarkDraining) != 0,
                   .file_owner = info.st_uid,
                   .size_bytes = static_cast<std::uint64_t>(info.st_size)};
  const auto first = read_page(fd, id, 0);
  if (!first) return error_of(first);
  const bool is_unsealed = (info.st_mode & kMarkSealed) == 0;
  const bool is_slots = !is_unsealed && is_result_segment(*first);
  auto problem = is_slots ? fill_slots(file, fd, id, *first) : fill_array(file, fd, id, *first);
  if (!problem) return error_of(std::move(problem));
  if (is_unsealed) {
    if (!problem->text.empty()) file.trailer = {};
    return file;
  }
  file.problem = std::move(problem->text);
  if (!file.problem.empty())
    file.kind = problem->is_newer ? SegmentFile::Kind::newer : SegmentFile::Kind::damaged;
  else
    file.kind = is_slots ? SegmentFile::Kind::slots : SegmentFile::Kind::sealed;
  return file;
}

}  // namespace cowmgr
