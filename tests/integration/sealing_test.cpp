// Sealing: nobody can write to what is sealed. The kernel says so, whatever a hostile writer does.
#include <algorithm>
#include <csignal>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "proto/segment.hpp"
#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"
#include "tests/support/raw_peer.hpp"

namespace cowmgr::test {
namespace {

using Builder = RawPeer::Builder;

constexpr std::size_t kSize = 100'000;

const ArraySpec& spec() {
  static const ArraySpec bytes{Dtype::of<std::uint8_t>(), {kSize}};
  return bytes;
}

class Sealing : public DaemonTest {
 protected:
  void SetUp() override {
    DaemonTest::SetUp();
    is_proven_ = connect().ping()->protection != Protection::advisory;
  }
  bool is_proven_ = false;  // some sandboxes give no leases
};

// A writer that speaks the protocol, and keeps what the library would give up.
struct HostileWriter {
  explicit HostileWriter(const std::string& socket) : peer(RawPeer::greeted(socket)) {
    const auto* created = peer.ask<wire::Created>([](Builder& b) {
      const std::vector<std::uint64_t> shape = {kSize};
      return wire::CreateMakeArrayDirect(b, "a", "|u1", &shape, wire::ByteOrder::c, false, false, 0600);
    });
    EXPECT_NE(created, nullptr);
    id = created->array()->id();
    writer = std::move(peer.fds()[0]);
    reader = std::move(peer.fds()[1]);
    peer.fds().clear();
  }
  [[nodiscard]] auto seal() const {
    return [id = id](Builder& b) { return wire::CreateSealArray(b, id); };
  }

  RawPeer peer;
  std::uint64_t id = 0;
  UniqueFd writer;
  UniqueFd reader;
};

std::vector<std::string> own_mappings(const std::string& segment) {
  std::vector<std::string> modes;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(segment) != std::string::npos) modes.push_back(line.substr(line.find(' ') + 1, 4));
  }
  return modes;
}

TEST_F(Sealing, KeepsPointersValid) {
  const Client client = connect();
  auto writer = client.create("a", spec());
  ASSERT_THAT(writer, Succeeds());
  const std::string segment = client.stat("a")->array.segment;
  EXPECT_THAT(own_mappings(segment), testing::ElementsAre("rw-s"));
  const auto bytes = writer->bytes();
  const auto data = pattern_bytes(kSize);
  std::copy(data.begin(), data.end(), bytes.begin());
  const auto array = writer->seal();
  ASSERT_THAT(array, Succeeds());
  EXPECT_EQ(array->bytes().data(), bytes.data());
  EXPECT_EQ(copy_of(bytes), data);
  EXPECT_THAT(own_mappings(segment), testing::ElementsAre("r--s")) << "and no writable mapping anywhere";
  EXPECT_THAT(writer->seal(), FailsWith(Errc::not_holder)) << "the writer is spent";
}

TEST_F(Sealing, MakesPointersReadOnly) {
  Child child([&](const Link& test) {
    const Client client = connect();
    auto writer = client.create("a", spec());
    volatile std::byte* const byte = writer->bytes().data();
    *byte = std::byte{1};
    const auto array = writer->seal();
    test.say("sealed");
    ::signal(SIGSEGV, SIG_DFL);  // a sanitizer would report it
    *byte = std::byte{2};
    test.say("still alive");
  });
  child.expect("sealed");
  EXPECT_EQ(child.wait(), -SIGSEGV);
}

TEST_F(Sealing, IsRefusedWhileADescriptorCanWrite) {
  if (!is_proven_) return;
  HostileWriter hostile(socket());
  const Error refused = hostile.peer.refusal(hostile.seal());
  EXPECT_EQ(refused.code, Errc::still_writable);
  EXPECT_THAT(refused.message, testing::HasSubstr("process " + std::to_string(::getpid()) + " "));
  EXPECT_THAT(connect().attach("a"), FailsWith(Errc::not_found));

  hostile.writer.reset();
  EXPECT_NE(hostile.peer.ask<wire::Arrays>(hostile.seal()), nullptr) << "asked again, it works";
  EXPECT_THAT(connect().attach("a"), Succeeds());
}

TEST_F(Sealing, IsRefusedWhileAMappingCanWrite) {
  if (!is_proven_) return;
  HostileWriter hostile(socket());
  void* const mapped = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, hostile.writer.get(), 0);
  ASSERT_NE(mapped, MAP_FAILED);
  hostile.writer.reset();
  Error refused = hostile.peer.refusal(hostile.seal());
  EXPECT_EQ(refused.code, Errc::still_writable);
  EXPECT_THAT(refused.message, testing::HasSubstr("process " + std::to_string(::getpid()) + " "));

  ASSERT_EQ(::mprotect(mapped, kSize, PROT_READ), 0);
  EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::still_writable)
      << "it could be made writable again";
  ::munmap(mapped, kSize);
  EXPECT_NE(hostile.peer.ask<wire::Arrays>(hostile.seal()), nullptr);
}

TEST_F(Sealing, NamesTheProcessThatCanWrite) {
  if (!is_proven_) return;
  HostileWriter hostile(socket());
  Child keeper([&](const Link& test) {  // inherits the descriptor
    test.say("here");
    test.await_word();
  });
  keeper.expect("here");
  hostile.writer.reset();
  const Error refused = hostile.peer.refusal(hostile.seal());
  EXPECT_EQ(refused.code, Errc::still_writable);
  EXPECT_THAT(refused.message, testing::HasSubstr("process " + std::to_string(keeper.pid()) + " "));
  keeper.kill();
  EXPECT_NE(hostile.peer.ask<wire::Arrays>(hostile.seal()), nullptr);
}

TEST_F(Sealing, IsRefusedWhileADescriptorIsOnItsWay) {
  if (!is_proven_) return;
  HostileWriter hostile(socket());
  int ends[2] = {-1, -1};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd inbox(ends[0]);
  const UniqueFd outbox(ends[1]);
  const std::vector<int> fds = {hostile.writer.get()};
  ASSERT_EQ(send_frame(outbox.get(), std::vector<std::byte>(1), fds), true);
  hostile.writer.reset();
  EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::still_writable);
  std::vector<std::byte> buffer(kMaxFrameBytes);
  ASSERT_THAT(receive_frame(inbox.get(), buffer), Succeeds());
  EXPECT_NE(hostile.peer.ask<wire::Arrays>(hostile.seal()), nullptr) << "it was received, and closed";
}

TEST_F(Sealing, RefusesAChangedFile) {
  const std::vector<std::pair<std::string, std::function<void(const HostileWriter&)>>> crimes = {
      {"header", [](const HostileWriter& w) { EXPECT_EQ(::pwrite(w.writer.get(), "x", 1, 0), 1); }},
      {"end of the header",
       [](const HostileWriter& w) { EXPECT_EQ(::pwrite(w.writer.get(), "x", 1, 4095), 1); }},
      {"cut short", [](const HostileWriter& w) { EXPECT_EQ(::ftruncate(w.writer.get(), 8192), 0); }},
      {"made longer", [](const HostileWriter& w) { EXPECT_EQ(::ftruncate(w.writer.get(), 1 << 20), 0); }},
      {"hole",
       [](const HostileWriter& w) {
         EXPECT_EQ(::fallocate(w.writer.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 8192), 0);
       }},
  };
  for (const auto& [crime, commit] : crimes) {
    HostileWriter hostile(socket());
    commit(hostile);
    hostile.writer.reset();
    EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::corrupted) << crime;
    EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::not_holder) << crime << ": the array is gone";
  }
  const Client client = connect();
  EXPECT_TRUE(eventually([&] { return client.ping()->used_bytes == 0; }));
}

TEST_F(Sealing, RefusesATrailerWrittenAfterTheDaemon) {
  if (!is_proven_) return;
  HostileWriter hostile(socket());
  EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::still_writable);
  const auto end = static_cast<off_t>(segment_bytes(kSize)) - 100;
  EXPECT_EQ(::pwrite(hostile.writer.get(), "forged", 6, end), 6);
  hostile.writer.reset();
  EXPECT_EQ(hostile.peer.refusal(hostile.seal()).code, Errc::corrupted);
}

TEST_F(Sealing, IsForTheWriterAlone) {
  HostileWriter hostile(socket());
  RawPeer other = RawPeer::greeted(socket());
  EXPECT_EQ(other.refusal(hostile.seal()).code, Errc::not_holder);
  EXPECT_EQ(other.refusal([&](Builder& b) { return wire::CreateAbortArray(b, hostile.id); }).code,
            Errc::not_holder);
}

TEST_F(Sealing, GivesReadersNoWayToWrite) {
  const Client client = connect();
  const auto array = client.put("a", spec(), pattern_bytes(kSize));
  RawPeer peer = RawPeer::greeted(socket());
  ASSERT_NE(peer.ask<wire::Arrays>([](Builder& b) {
    const std::vector<flatbuffers::Offset<flatbuffers::String>> names = {b.CreateString("a")};
    return wire::CreateAttachDirect(b, &names);
  }),
            nullptr);
  const int fd = peer.fds().front().get();
  EXPECT_EQ(::fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
  EXPECT_EQ(::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_NE(::ftruncate(fd, 0), 0);
  EXPECT_LT(::pwrite(fd, "x", 1, 4096), 0);
  void* const mapped = ::mmap(nullptr, kSize, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  EXPECT_NE(::mprotect(mapped, kSize, PROT_READ | PROT_WRITE), 0);
  ::munmap(mapped, kSize);
}

TEST_F(Sealing, NoticesWhoOpensASegmentForWriting) {
  if (!is_proven_) return;
  const Client client = connect();
  const auto array = client.put("a", spec(), pattern_bytes(kSize));
  const auto other = client.put("b", spec(), pattern_bytes(kSize));
  const std::string path = "/dev/shm" + client.stat("a")->array.segment;
  EXPECT_EQ(::chmod(path.c_str(), 0600), 0);  // root would not need it
  const UniqueFd opened(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  EXPECT_TRUE(opened) << "the owner may: the daemon cannot forbid it, only see it";
  EXPECT_TRUE(eventually([&] { return client.stat("a")->array.state == ArrayState::tampered; }));
  EXPECT_THAT(client.attach("a"), FailsWith(Errc::tampered));
  EXPECT_THAT(client.attach("b"), Succeeds()) << "nothing happened to this one";
  ASSERT_THAT(client.put("a", spec(), pattern_bytes(kSize, 2), {.replace = true}), Succeeds());
  EXPECT_EQ(copy_of(client.attach("a")->bytes()), pattern_bytes(kSize, 2));
}

}  // namespace
}  // namespace cowmgr::test
