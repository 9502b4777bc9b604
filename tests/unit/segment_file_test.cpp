#include "proto/segment_file.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/result_segment.hpp"
#include "proto/unique_fd.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using Kind = SegmentFile::Kind;

constexpr std::uint64_t kId = 0xabc;

void expect_name(std::string_view file, std::string_view instance, std::uint64_t id, bool is_quarantined) {
  const auto name = parse_segment_file_name(file);
  ASSERT_TRUE(name) << file;
  EXPECT_EQ(name->instance, instance);
  EXPECT_EQ(name->id, id);
  EXPECT_EQ(name->is_quarantined, is_quarantined);
}

TEST(SegmentFileName, SaysWhoseItIs) {
  EXPECT_EQ(segment_name("default", kId), "/cowmgr.default.0000000000000abc");
  expect_name("cowmgr.default.0000000000000abc", "default", kId, false);
  expect_name("cowmgr.a-b_9.ffffffffffffffff", "a-b_9", UINT64_MAX, false);
  expect_name(quarantine_name("default", kId).substr(1), "default", kId, true);
}

TEST(SegmentFileName, OfOtherFilesSaysNothing) {
  for (const char* file : {"cowmgr.default.lock", "cowmgr.default.0000000000000ABC", "cowmgr.default.abc",
                           "cowmgr.default-0000000000000abc", "cowmgr..0000000000000abc", "default", "",
                           "cowmgr.default.000000000000 abc", "cowmgr.0000000000000abc",
                           "other.default.0000000000000abc", "cowmgr.a b.0000000000000abc"}) {
    EXPECT_FALSE(parse_segment_file_name(file)) << file;
  }
}

// A file as the daemon leaves it: an array of six doubles.
class File {
 public:
  File() : fd_(::memfd_create("segment", MFD_CLOEXEC)) {
    const std::string header = *make_npy_header(spec_, kDataOffset);
    write(0, std::as_bytes(std::span(header)));
    write_trailer(trailer_);
    mark(kModeWriting | kMarkSealed);
  }

  void write(std::uint64_t offset, std::span<const std::byte> bytes) const {
    ASSERT_EQ(::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)),
              static_cast<ssize_t>(bytes.size()));
  }
  void write(std::uint64_t offset, const std::string& text) const {
    write(offset, std::as_bytes(std::span(text)));
  }
  void write_trailer(const TrailerInfo& info) const {
    write(segment_bytes(48) - kTrailerBytes, encode_trailer(info));
  }
  void mark(mode_t mode) const { ASSERT_EQ(::fchmod(fd_.get(), mode), 0); }
  void resize(std::uint64_t size_bytes) const {
    ASSERT_EQ(::ftruncate(fd_.get(), static_cast<off_t>(size_bytes)), 0);
  }
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }
  [[nodiscard]] SegmentFile read() const {
    const auto file = read_segment_file(fd_.get(), kId);
    EXPECT_THAT(file, Succeeds());
    return *file;
  }
  void expect_damaged(const std::string& problem) const {
    EXPECT_EQ(read().kind, Kind::damaged);
    EXPECT_THAT(read().problem, HasSubstr(problem));
  }

  const ArraySpec spec_{Dtype::of<double>(), {2, 3}};
  TrailerInfo trailer_{.name = "x",
                       .id = kId,
                       .version = 3,
                       .data_bytes = 48,
                       .created_us = 1,
                       .sealed_us = 2,
                       .owner_uid = 7,
                       .owner_gid = 8,
                       .mode = 0640,
                       .evictable = true};

 private:
  UniqueFd fd_;
};

TEST(SegmentFile, OfTwoPagesOfHeaderTellsAllOfItsArrayToo) {
  std::string fields;
  for (int i = 0; i < 200; ++i) fields += fmt::format("('field_{:04}', '<f4'), ", i);
  const ArraySpec spec{*Dtype::parse("[" + fields + "]"), {2}};
  const File file;
  TrailerInfo trailer = file.trailer_;
  trailer.data_bytes = 1600;
  trailer.data_offset = kMaxDataOffset;
  const std::uint64_t size_bytes = segment_bytes(1600, kMaxDataOffset);
  const std::string header = *make_segment_header(spec);
  file.resize(size_bytes);
  file.write(0, header);
  file.write(size_bytes - kTrailerBytes, encode_trailer(trailer));
  const SegmentFile read = file.read();
  EXPECT_EQ(read.kind, Kind::sealed) << read.problem;
  EXPECT_EQ(read.spec, spec);
  EXPECT_EQ(read.header, header);
  EXPECT_EQ(read.trailer, trailer);
  file.write(5000, "XXXX");
  file.expect_damaged("header");
}

TEST(SegmentFile, OfANewerLayoutIsForANewerProgram) {
  const File file;
  TrailerPage page = encode_trailer(file.trailer_);
  page[8] = std::byte{3};
  file.write(segment_bytes(48) - kTrailerBytes, page);
  EXPECT_EQ(file.read().kind, Kind::newer);
  EXPECT_THAT(file.read().problem, HasSubstr("layout version 3"));
  file.mark(kModeWriting);
  EXPECT_EQ(file.read().kind, Kind::unsealed) << "its writer may have said so";
}

TEST(SegmentFile, OfASetWhoseArrayHasTwoPagesOfHeaderIsWholeOrDamaged) {
  std::string fields;
  for (int i = 0; i < 200; ++i) fields += fmt::format("('field_{:04}', '<f4'), ", i);
  const ArraySpec spec{*Dtype::parse("[" + fields + "]"), {4}};
  const ResultRecord record{.set = kId, .slots = 3, .name = "s", .npy_header = *make_segment_header(spec)};
  const ResultLayout layout = result_layout(record);
  std::vector<std::byte> memory(layout.values_offset);
  alignas(64) static std::array<std::byte, 1U << 16U> aligned{};
  ASSERT_LE(memory.size(), aligned.size());
  write_result_header(aligned.data(), record, layout);
  std::copy_n(aligned.begin(), memory.size(), memory.begin());
  const File file;
  file.resize(layout.values_offset);
  file.write(0, memory);
  const SegmentFile read = file.read();
  EXPECT_EQ(read.kind, Kind::slots) << read.problem;
  EXPECT_EQ(read.results, record);
  EXPECT_EQ(read.spec, spec);
  file.write(layout.npy_offset + 100, "X");
  file.expect_damaged("crc");
}

TEST(SegmentFile, ThatIsSealedTellsAllOfItsArray) {
  const File file;
  const SegmentFile read = file.read();
  EXPECT_EQ(read.kind, Kind::sealed);
  EXPECT_THAT(read.problem, IsEmpty());
  EXPECT_EQ(read.trailer, file.trailer_);
  EXPECT_EQ(read.spec, file.spec_);
  EXPECT_EQ(read.header, *make_npy_header(file.spec_, kDataOffset));
  EXPECT_EQ(read.size_bytes, segment_bytes(48));
  EXPECT_EQ(read.file_owner, ::geteuid());
  EXPECT_FALSE(read.is_pinned);
  file.mark(kModeWriting | kMarkSealed | kMarkPinned);
  EXPECT_TRUE(file.read().is_pinned);
}

TEST(SegmentFile, ThatCannotBeReadIsNotDamaged) {
  const File file;
  const UniqueFd path(::open(fmt::format("/proc/self/fd/{}", file.fd()).c_str(), O_PATH | O_CLOEXEC));
  ASSERT_TRUE(path);  // fstat(2) works on it, pread(2) does not
  EXPECT_THAT(read_segment_file(path.get(), kId), FailsWith(Errc::os_failure));
}

TEST(SegmentFile, WithoutTheMarkIsUnsealedWhateverItSays) {
  const File file;
  file.mark(kModeWriting);
  EXPECT_EQ(file.read().kind, Kind::unsealed);
}

TEST(SegmentFile, OfAResultSetIsKnownByItsMagic) {
  const File file;
  const ResultRecord record{.set = 9,
                            .slots = 3,
                            .name = "set",
                            .queue = "queue",
                            .maker = 5,
                            .token = 6,
                            .created_us = 7,
                            .owner_uid = 1,
                            .owner_gid = 2,
                            .mode = 0640,
                            .is_detached = true,
                            .replace = true,
                            .evictable = true,
                            .attempts = 4,
                            .lease_ms = 8,
                            .npy_header = *make_npy_header(file.spec_, kDataOffset)};
  const ResultLayout layout = result_layout(record);
  std::vector<std::byte> memory(layout.values_offset);
  write_result_header(memory.data(), record, layout);
  file.write(0, memory);
  file.resize(layout.values_offset);
  const SegmentFile read = file.read();
  ASSERT_EQ(read.kind, Kind::slots) << read.problem;
  EXPECT_EQ(read.results, record);
  EXPECT_EQ(read.spec, file.spec_);
  file.mark(kModeWriting);
  EXPECT_EQ(file.read().kind, Kind::unsealed) << "a writer may have put it there";
}

TEST(SegmentFile, OfAResultSetThatContradictsItselfIsDamaged) {
  const File file;
  const ResultRecord record{.set = 9, .slots = 3, .name = "set", .is_ragged = true};
  const ResultLayout layout = result_layout(record);
  std::vector<std::byte> memory(layout.values_offset);
  const auto expect_damaged = [&](std::uint64_t size_bytes) {
    file.write(0, memory);
    file.resize(size_bytes);
    EXPECT_EQ(file.read().kind, Kind::damaged);
    EXPECT_THAT(file.read().problem, Not(IsEmpty()));
  };
  write_result_header(memory.data(), record, layout);
  expect_damaged(layout.values_offset - 1);
  expect_damaged(layout.max_bytes + 1);
  for (const std::size_t offset : {16U, 24U, 64U, 80U, 120U, 136U, 4092U, 4096U}) {
    memory[offset] ^= std::byte{1};
    expect_damaged(layout.values_offset);
    memory[offset] ^= std::byte{1};
  }
  memory[72] = std::byte{1};  // the number of settled slots changes
  file.write(0, memory);
  file.resize(layout.values_offset);
  EXPECT_EQ(file.read().kind, Kind::slots);
  ResultRecord nameless = record;
  nameless.name = "a\nb";
  write_result_header(memory.data(), nameless, layout);
  expect_damaged(layout.values_offset);
}

// It is what the session that writes it may claim; what it says may be the writer's invention.
TEST(SegmentFile, ThatIsUnsealedSaysWhoWritesIt) {
  File file;
  file.trailer_.writer = 42;
  file.write_trailer(file.trailer_);
  file.mark(kModeWriting);
  EXPECT_EQ(file.read().trailer.writer, 42U);
  EXPECT_EQ(file.read().spec, file.spec_);
  file.write(0, "damage");
  EXPECT_EQ(file.read().kind, Kind::unsealed);
  EXPECT_EQ(file.read().trailer, TrailerInfo());
}

TEST(SegmentFile, IsDamagedWhenItContradictsItself) {
  const std::uint64_t trailer = segment_bytes(48) - kTrailerBytes;
  const auto with = [](const auto& damage) {
    auto file = std::make_unique<File>();
    damage(*file);
    return file;
  };
  with([](const File& file) { file.write(0, "damage"); })->expect_damaged("header");
  with([](const File& file) {
    file.write(0, *make_npy_header({Dtype::of<float>(), {2, 3}}, kDataOffset));
  })->expect_damaged("contradict");
  with([&](const File& file) { file.write(trailer, "damage"); })->expect_damaged("no magic");
  with([&](const File& file) { file.write(trailer + 104, "y"); })->expect_damaged("crc");
  const auto with_trailer = [&](const auto& change) {
    return with([&](const File& file) {
      TrailerInfo info = file.trailer_;
      change(info);
      file.write_trailer(info);
    });
  };
  with_trailer([](TrailerInfo& info) { info.id = kId + 1; })->expect_damaged("trailer is that of segment");
  with_trailer([](TrailerInfo& info) { info.name.clear(); })->expect_damaged("names no array");
  with_trailer([](TrailerInfo& info) { info.version = 0; })->expect_damaged("names no array");
  with_trailer([](TrailerInfo& info) { info.data_bytes = 40; })->expect_damaged("contradict");
  with([](const File& file) { file.resize(0); })->expect_damaged("too short");
  with([](const File& file) { file.resize(kPageBytes); })->expect_damaged("too short");
  with([](const File& file) { file.resize(segment_bytes(48) - 1); })->expect_damaged("trailer");
  with([&](const File& file) {
    file.resize(segment_bytes(48) + kPageBytes);
    file.write(segment_bytes(48), encode_trailer(file.trailer_));
  })->expect_damaged("size");
}

}  // namespace
}  // namespace cowmgr
