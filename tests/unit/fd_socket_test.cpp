#include "proto/fd_socket.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <iterator>
#include <poll.h>
#include <string>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using namespace std::string_literals;

struct SocketPair {
  explicit SocketPair(int flags = 0) {
    int fds[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0, fds), 0);
    ours = UniqueFd(fds[0]);
    theirs = UniqueFd(fds[1]);
  }

  UniqueFd ours;
  UniqueFd theirs;
};

struct Pipe {
  Pipe() {
    int fds[2] = {-1, -1};
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    reader = UniqueFd(fds[0]);
    writer = UniqueFd(fds[1]);
  }

  UniqueFd reader;
  UniqueFd writer;
};

class Buffer {
 public:
  operator std::span<std::byte>() { return bytes_; }  // NOLINT(google-explicit-constructor)

 private:
  std::vector<std::byte> bytes_ = std::vector<std::byte>(kMaxFrameBytes);
};

std::vector<std::byte> pattern(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 31 + i / 251);
  return bytes;
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string text_of(const Frame& frame) {
  return {reinterpret_cast<const char*>(frame.bytes.data()), frame.bytes.size()};
}

std::ptrdiff_t open_descriptors() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                       std::filesystem::directory_iterator());
}

// What a peer can do that does not use send_frame().
void send_raw(int socket, std::size_t size_bytes, std::size_t fd_count, int fd) {
  const std::vector<std::byte> bytes(size_bytes, std::byte{'r'});
  const std::vector<int> fds(fd_count, fd);
  std::vector<char> control(CMSG_SPACE(fd_count * sizeof(int)));
  iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd_count > 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fd_count * sizeof(int));
  }
  ASSERT_EQ(::sendmsg(socket, &message, MSG_NOSIGNAL), static_cast<ssize_t>(size_bytes))
      << std::strerror(errno);
}

// A directory of its own for sockets; gone with its content at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string path = testing::TempDir() + "cowmgr-XXXXXX";
    EXPECT_NE(::mkdtemp(path.data()), nullptr);
    path_ = path;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }

  [[nodiscard]] std::string file(const std::string& name) const { return path_ + "/" + name; }
  // A path here of exactly `size` bytes.
  [[nodiscard]] std::string file_of_length(std::size_t size) const {
    return file(std::string(size - path_.size() - 1, 's'));
  }

 private:
  std::string path_;
};

// ---- Frames ----

TEST(Frame, ArrivesAsItWasSent) {
  SocketPair pair;
  Buffer buffer;
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{2}, std::size_t{4096}, kMaxFrameBytes - 1, kMaxFrameBytes}) {
    const auto sent = pattern(size);
    ASSERT_EQ(send_frame(pair.theirs.get(), sent), true);
    const auto frame = receive_frame(pair.ours.get(), buffer);
    ASSERT_THAT(frame, Succeeds());
    ASSERT_TRUE(frame->has_value());
    EXPECT_TRUE(std::equal(sent.begin(), sent.end(), (*frame)->bytes.begin(), (*frame)->bytes.end())) << size;
    EXPECT_TRUE((*frame)->fds.empty());
  }
}

TEST(Frame, IsNeverJoinedWithTheNext) {
  SocketPair pair;
  Buffer buffer;
  for (const auto& text : {"first"s, "2"s, "the third"s})
    ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of(text)), true);
  for (const auto& text : {"first"s, "2"s, "the third"s}) {
    EXPECT_EQ(text_of(**receive_frame(pair.ours.get(), buffer)), text);
  }
}

TEST(Frame, BringsItsDescriptorsWithIt) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const std::vector<int> fds = {pipe.writer.get(), pipe.reader.get()};
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("no descriptors"s)), true);
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("two"s), fds), true);
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("none again"s)), true);
  EXPECT_TRUE((*receive_frame(pair.ours.get(), buffer))->fds.empty());

  const auto frame = receive_frame(pair.ours.get(), buffer);
  EXPECT_EQ(text_of(**frame), "two");
  ASSERT_EQ((*frame)->fds.size(), 2U);
  char byte = 0;
  ASSERT_EQ(::write((*frame)->fds[0].get(), "x", 1), 1);
  ASSERT_EQ(::read((*frame)->fds[1].get(), &byte, 1), 1);
  EXPECT_EQ(byte, 'x') << "in the order in which they were sent";

  EXPECT_TRUE((*receive_frame(pair.ours.get(), buffer))->fds.empty());
}

TEST(Frame, HoldsDescriptorsThatCloseOnExec) {
  SocketPair pair;
  Buffer buffer;
  UniqueFd inherited(::open("/dev/null", O_RDONLY));  // NOLINT: without O_CLOEXEC
  ASSERT_EQ(::fcntl(inherited.get(), F_GETFD), 0);
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("fd"s), std::vector{inherited.get()}), true);
  const auto frame = receive_frame(pair.ours.get(), buffer);
  EXPECT_EQ(::fcntl((*frame)->fds.at(0).get(), F_GETFD), FD_CLOEXEC);
}

TEST(Frame, LeavesTheSenderItsDescriptors) {
  SocketPair pair;
  Pipe pipe;
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("fd"s), std::vector{pipe.reader.get()}), true);
  EXPECT_EQ(::fcntl(pipe.reader.get(), F_GETFD), FD_CLOEXEC) << "still open";
}

TEST(Frame, ClosesItsDescriptorsWhenItGoes) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  {
    ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("fds"s), std::vector(kMaxFrameFds, pipe.reader.get())),
              true);
    const auto frame = receive_frame(pair.ours.get(), buffer);
    ASSERT_EQ((*frame)->fds.size(), kMaxFrameFds);
    EXPECT_EQ(open_descriptors(), before + static_cast<std::ptrdiff_t>(kMaxFrameFds));
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(Frame, TakesTheLargestSizeAndTheMostDescriptorsAtOnce) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  ASSERT_EQ(
      send_frame(pair.theirs.get(), pattern(kMaxFrameBytes), std::vector(kMaxFrameFds, pipe.reader.get())),
      true);
  const auto frame = receive_frame(pair.ours.get(), buffer);
  EXPECT_EQ((*frame)->bytes.size(), kMaxFrameBytes);
  EXPECT_EQ((*frame)->fds.size(), kMaxFrameFds);
}

// ---- What is not sent ----

TEST(SendFrame, RefusesWhatIsTooLarge) {
  SocketPair pair(SOCK_NONBLOCK);
  Buffer buffer;
  const auto refused = send_frame(pair.theirs.get(), pattern(kMaxFrameBytes + 1));
  EXPECT_THAT(refused, FailsWith(Errc::invalid_argument));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("131073 bytes"));
  EXPECT_EQ(*receive_frame(pair.ours.get(), buffer), std::nullopt) << "nothing was sent";
}

TEST(SendFrame, RefusesTooManyDescriptors) {
  SocketPair pair(SOCK_NONBLOCK);
  Pipe pipe;
  Buffer buffer;
  const auto refused =
      send_frame(pair.theirs.get(), bytes_of("x"s), std::vector(kMaxFrameFds + 1, pipe.reader.get()));
  EXPECT_THAT(refused, FailsWith(Errc::invalid_argument));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("65 descriptors"));
  EXPECT_EQ(*receive_frame(pair.ours.get(), buffer), std::nullopt) << "nothing was sent";
}

// A record of no bytes reads like the end of the connection: the other side would hang up.
TEST(SendFrame, NeverSendsAnEmptyFrame) {
  SocketPair pair;
  EXPECT_DEATH(static_cast<void>(send_frame(pair.theirs.get(), {})), "does not hold");
}

TEST(SendFrame, ReturnsFalseWhenThereIsNoRoom) {
  SocketPair pair(SOCK_NONBLOCK);
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  int sent = 0;
  while (*send_frame(pair.theirs.get(), pattern(50'000), std::vector{pipe.reader.get()})) ++sent;
  EXPECT_GT(sent, 0);
  EXPECT_EQ(*send_frame(pair.theirs.get(), pattern(50'000)), false) << "and again, without harm";

  int received = 0;
  for (auto frame = receive_frame(pair.ours.get(), buffer); *frame;
       frame = receive_frame(pair.ours.get(), buffer)) {
    EXPECT_EQ((*frame)->bytes.size(), 50'000U);
    EXPECT_EQ((*frame)->fds.size(), 1U);
    ++received;
  }
  EXPECT_EQ(received, sent) << "no frame is lost, none is cut";
  EXPECT_EQ(open_descriptors(), before);
  EXPECT_EQ(*send_frame(pair.theirs.get(), bytes_of("room again"s)), true);
}

TEST(SendFrame, SaysThatNobodyReadsAnyMore) {
  SocketPair pair;
  pair.ours.reset();
  EXPECT_THAT(send_frame(pair.theirs.get(), bytes_of("x"s)), FailsWith(Errc::disconnected))
      << "and no SIGPIPE";
}

TEST(SendFrame, NamesTheSystemCallThatFailed) {
  Pipe pipe;
  SocketPair pair;
  EXPECT_THAT(send_frame(pipe.writer.get(), bytes_of("x"s)), FailsWith(Errc::os_failure)) << "not a socket";
  EXPECT_THAT(send_frame(-1, bytes_of("x"s)), FailsWith(Errc::os_failure));
  EXPECT_THAT(send_frame(pair.theirs.get(), bytes_of("x"s), std::vector{-1}), FailsWith(Errc::os_failure));
}

// ---- What is not received ----

TEST(ReceiveFrame, IsEmptyWhenNothingCame) {
  SocketPair pair(SOCK_NONBLOCK);
  Buffer buffer;
  const auto nothing = receive_frame(pair.ours.get(), buffer);
  ASSERT_THAT(nothing, Succeeds());
  EXPECT_EQ(*nothing, std::nullopt);
}

TEST(ReceiveFrame, DeliversWhatWasSentBeforeTheEnd) {
  SocketPair pair;
  Buffer buffer;
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("last words"s)), true);
  pair.theirs.reset();
  EXPECT_EQ(text_of(**receive_frame(pair.ours.get(), buffer)), "last words");
  const auto end = receive_frame(pair.ours.get(), buffer);
  ASSERT_THAT(end, FailsWith(Errc::disconnected));
  EXPECT_FALSE(left_unread(end.error()));
  EXPECT_THAT(receive_frame(pair.ours.get(), buffer), FailsWith(Errc::disconnected)) << "and stays so";
}

TEST(ReceiveFrame, KnowsTheEndAlsoWhenTheOtherSideDidNotRead) {
  SocketPair pair;
  Buffer buffer;
  ASSERT_EQ(send_frame(pair.ours.get(), bytes_of("unread"s)), true);
  pair.theirs.reset();  // ECONNRESET for us (unix(7))
  const auto end = receive_frame(pair.ours.get(), buffer);
  ASSERT_THAT(end, FailsWith(Errc::disconnected));
  EXPECT_TRUE(left_unread(end.error()));
}

TEST(ReceiveFrame, NamesTheSystemCallThatFailed) {
  Pipe pipe;
  Buffer buffer;
  EXPECT_THAT(receive_frame(pipe.reader.get(), buffer), FailsWith(Errc::os_failure));
  EXPECT_THAT(receive_frame(-1, buffer), FailsWith(Errc::os_failure));
}

TEST(ReceiveFrame, WantsRoomForTheLargestFrame) {
  SocketPair pair;
  std::vector<std::byte> small(kMaxFrameBytes - 1);
  EXPECT_DEATH(static_cast<void>(receive_frame(pair.ours.get(), small)), "does not hold");
}

TEST(ReceiveFrame, RefusesAFrameThatIsTooLong) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  for (const std::size_t size : {kMaxFrameBytes + 1, std::size_t{200} << 10U}) {
    send_raw(pair.theirs.get(), size, 0, -1);
    EXPECT_THAT(receive_frame(pair.ours.get(), buffer), FailsWith(Errc::protocol_error)) << size;
    send_raw(pair.theirs.get(), size, 3, pipe.reader.get());
    EXPECT_THAT(receive_frame(pair.ours.get(), buffer), FailsWith(Errc::protocol_error)) << size;
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(ReceiveFrame, RefusesAFrameThatIsTooLongAlsoIntoALargerBuffer) {
  SocketPair pair;
  std::vector<std::byte> large(2 * kMaxFrameBytes);
  send_raw(pair.theirs.get(), kMaxFrameBytes + 1, 0, -1);
  EXPECT_THAT(receive_frame(pair.ours.get(), large), FailsWith(Errc::protocol_error));
}

TEST(ReceiveFrame, RefusesTooManyDescriptors) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  for (const std::size_t count : {kMaxFrameFds + 1, std::size_t{100}, std::size_t{253}}) {
    send_raw(pair.theirs.get(), 10, count, pipe.reader.get());
    EXPECT_THAT(receive_frame(pair.ours.get(), buffer), FailsWith(Errc::protocol_error)) << count;
    EXPECT_EQ(open_descriptors(), before) << count;
  }
}

TEST(ReceiveFrame, ClosesTheDescriptorsOfAnEmptyRecord) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, kMaxFrameFds, std::size_t{100}}) {
    send_raw(pair.theirs.get(), 0, count, pipe.reader.get());
    EXPECT_THAT(receive_frame(pair.ours.get(), buffer), FailsWith(Errc::disconnected)) << count;
    EXPECT_EQ(open_descriptors(), before) << count;
  }
}

TEST(ReceiveFrame, ClosesDescriptorsThatNobodyFetched) {
  Pipe pipe;
  {
    SocketPair pair;
    send_raw(pair.theirs.get(), 10, 10, pipe.writer.get());
  }
  pipe.writer.reset();
  char byte = 0;
  EXPECT_EQ(::read(pipe.reader.get(), &byte, 1), 0) << "no writer is left in flight";
}

// The kernel cuts the descriptors off that this process has no room for (unix(7), MSG_CTRUNC): not the peer's
// fault, and the bytes are there.
TEST(ReceiveFrame, DeliversTheBytesThoughThisProcessHasTooManyOpenFiles) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  for (const rlim_t free_descriptors : {0U, 1U}) {
    send_raw(pair.theirs.get(), 10, 3, pipe.reader.get());
    const int lowest_free = UniqueFd(::dup(pipe.reader.get())).get();
    const rlimit tight{static_cast<rlim_t>(lowest_free) + free_descriptors, limit.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
    auto frame = receive_frame(pair.ours.get(), buffer);
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
    ASSERT_THAT(frame, Succeeds());
    EXPECT_EQ((*frame)->bytes.size(), 10U);
    EXPECT_TRUE((*frame)->lacks_fds);
    EXPECT_EQ((*frame)->fds.size(), free_descriptors);
    (*frame)->fds.clear();
    EXPECT_EQ(open_descriptors(), before);
  }
}

// ---- Where no descriptors are expected ----

TEST(ReceiveBytes, DeliversARecordAndClosesItsDescriptors) {
  SocketPair pair;
  Pipe pipe;
  Buffer buffer;
  const auto before = open_descriptors();
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("bare"s)), true);
  ASSERT_EQ(send_frame(pair.theirs.get(), bytes_of("laden"s), std::vector{pipe.writer.get()}), true);
  send_raw(pair.theirs.get(), 0, 1, pipe.writer.get());
  pipe.writer.reset();
  const auto text = [](std::span<const std::byte> bytes) {
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  EXPECT_EQ(text(**receive_bytes(pair.ours.get(), buffer)), "bare");
  EXPECT_EQ(text(**receive_bytes(pair.ours.get(), buffer)), "laden");
  EXPECT_THAT(receive_bytes(pair.ours.get(), buffer), FailsWith(Errc::disconnected));
  EXPECT_EQ(open_descriptors(), before - 1);
  char byte = 0;
  EXPECT_EQ(::read(pipe.reader.get(), &byte, 1), 0) << "no writer is left in flight";
}

TEST(ReceiveBytes, RefusesARecordThatIsTooLong) {
  SocketPair pair;
  std::vector<std::byte> large(2 * kMaxFrameBytes);
  send_raw(pair.theirs.get(), kMaxFrameBytes + 1, 0, -1);
  EXPECT_THAT(receive_bytes(pair.ours.get(), large), FailsWith(Errc::protocol_error));
  send_raw(pair.theirs.get(), kMaxFrameBytes, 0, -1);
  EXPECT_EQ((**receive_bytes(pair.ours.get(), large)).size(), kMaxFrameBytes);
}

TEST(ReceiveBytes, TellsNothingYetFromTheEndAndFromAFailure) {
  SocketPair pair(SOCK_NONBLOCK);
  Buffer buffer;
  EXPECT_EQ(*receive_bytes(pair.ours.get(), buffer), std::nullopt);
  ASSERT_EQ(send_frame(pair.ours.get(), bytes_of("unread"s)), true);
  pair.theirs.reset();
  EXPECT_THAT(receive_bytes(pair.ours.get(), buffer), FailsWith(Errc::disconnected));
  EXPECT_THAT(receive_bytes(-1, buffer), FailsWith(Errc::os_failure));
}

TEST(ReceiveFrame, IsNotEndedByASignal) {
  static volatile std::sig_atomic_t alarms;
  static volatile std::sig_atomic_t alarmed_socket;
  SocketPair pair;
  Buffer buffer;
  alarms = 0;
  alarmed_socket = pair.theirs.get();
  struct sigaction action {};  // without SA_RESTART
  action.sa_handler = [](int) {
    alarms = alarms + 1;
    if (alarms == 3) ::send(alarmed_socket, "woken", 5, MSG_NOSIGNAL);
  };
  struct sigaction old {};
  ASSERT_EQ(::sigaction(SIGALRM, &action, &old), 0);
  const itimerval every_millisecond{{0, 1000}, {0, 1000}};
  ASSERT_EQ(::setitimer(ITIMER_REAL, &every_millisecond, nullptr), 0);
  const auto frame = receive_frame(pair.ours.get(), buffer);
  const itimerval never{};
  ::setitimer(ITIMER_REAL, &never, nullptr);
  ::sigaction(SIGALRM, &old, nullptr);
  ASSERT_THAT(frame, Succeeds());
  EXPECT_EQ(text_of(**frame), "woken");
  EXPECT_GE(alarms, 3);
}

// ---- Connecting ----

TEST(ConnectTo, ReachesWhoListens) {
  TemporaryDirectory directory;
  const auto path = directory.file("socket");
  const auto listener = listen_at(path, 0600);
  ASSERT_THAT(listener, Succeeds());
  const auto client = connect_to(path);
  ASSERT_THAT(client, Succeeds());
  const UniqueFd server(::accept4(listener->get(), nullptr, nullptr, SOCK_CLOEXEC));
  ASSERT_TRUE(server);

  Buffer buffer;
  ASSERT_EQ(send_frame(client->get(), bytes_of("hello"s)), true);
  EXPECT_EQ(text_of(**receive_frame(server.get(), buffer)), "hello");
  EXPECT_EQ(::fcntl(client->get(), F_GETFD), FD_CLOEXEC);
  EXPECT_EQ(::fcntl(client->get(), F_GETFL) & O_NONBLOCK, 0);
}

TEST(ConnectTo, SaysThatThereIsNoDaemon) {
  TemporaryDirectory directory;
  EXPECT_THAT(connect_to(directory.file("nothing")), FailsWith(Errc::no_daemon));
  EXPECT_THAT(connect_to(directory.file("no/such/directory")), FailsWith(Errc::no_daemon));

  const auto left_behind = directory.file("left-behind");
  ASSERT_THAT(listen_at(left_behind, 0600), Succeeds());  // gone at once, its path stays
  EXPECT_THAT(connect_to(left_behind), FailsWith(Errc::no_daemon));
  EXPECT_THAT(connect_to(left_behind + "/below"), FailsWith(Errc::no_daemon));
  EXPECT_THAT(connect_to(left_behind).error().message, testing::HasSubstr(left_behind));
}

TEST(ConnectTo, LeaksNothingWhereItFails) {
  TemporaryDirectory directory;
  const auto before = open_descriptors();
  EXPECT_THAT(connect_to(directory.file("nothing")), FailsWith(Errc::no_daemon));
  EXPECT_THAT(listen_at(directory.file("no/such/directory"), 0600), FailsWith(Errc::not_found));
  EXPECT_EQ(open_descriptors(), before);
}

TEST(ConnectTo, IsDeniedWhereThePeerMayNot) {
  TemporaryDirectory directory;
  const auto path = directory.file("socket");
  const auto listener = listen_at(path, 0000);
  ASSERT_THAT(listener, Succeeds());
  std::filesystem::permissions(std::filesystem::path(path).parent_path(), std::filesystem::perms{0711});
  const pid_t child = ::fork();
  if (child == 0) {
    constexpr uid_t kNobody = 65534;
    if (::geteuid() == 0 && ::setresuid(kNobody, kNobody, kNobody) != 0) ::_exit(99);
    const auto client = connect_to(path);
    ::_exit(client ? 0 : static_cast<int>(client.error().code));
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(static_cast<Errc>(WEXITSTATUS(status)), Errc::permission_denied);
}

TEST(ConnectTo, RefusesPathsThatNoSocketCanHave) {
  TemporaryDirectory directory;
  for (const auto& path :
       {""s, directory.file_of_length(108), directory.file_of_length(5000), "/tmp/a\0b"s, "\0abstract"s}) {
    EXPECT_THAT(connect_to(path), FailsWith(Errc::invalid_argument)) << printable(path);
    EXPECT_THAT(listen_at(path, 0600), FailsWith(Errc::invalid_argument)) << printable(path);
  }
}

TEST(ConnectTo, TakesTheLongestPath) {
  TemporaryDirectory directory;
  const auto path = directory.file_of_length(107);
  EXPECT_THAT(connect_to(path), FailsWith(Errc::no_daemon));
  const auto listener = listen_at(path, 0600);
  ASSERT_THAT(listener, Succeeds());
  EXPECT_THAT(connect_to(path), Succeeds());
}

// ---- Looking ----

TEST(NextRecord, TellsWhetherDescriptorsComeAndLeavesThem) {
  SocketPair pair;
  Pipe pipe;
  EXPECT_EQ(next_record(pair.ours.get()), NextRecord::none);
  send_raw(pair.theirs.get(), 10, 0, -1);
  for (const std::size_t count : {std::size_t{1}, std::size_t{250}})
    send_raw(pair.theirs.get(), 10, count, pipe.writer.get());
  pipe.writer.reset();
  Buffer buffer;
  EXPECT_EQ(next_record(pair.ours.get()), NextRecord::plain);
  EXPECT_THAT(receive_bytes(pair.ours.get(), buffer), Succeeds());
  const auto before = open_descriptors();
  EXPECT_EQ(next_record(pair.ours.get()), NextRecord::with_descriptors);
  EXPECT_EQ(next_record(pair.ours.get()), NextRecord::with_descriptors);
  EXPECT_EQ(open_descriptors(), before);
  EXPECT_FALSE(shut_and_drain(pair.ours.get()));
  pollfd end{pipe.reader.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&end, 1, 0), 0) << "a writer is still in the queue";
  pair.ours.reset();
  EXPECT_EQ(::poll(&end, 1, 0), 1);
}

TEST(NextRecord, LeavesTheEndToWhoeverReceives) {
  SocketPair pair;
  pair.theirs.reset();
  EXPECT_EQ(next_record(pair.ours.get()), NextRecord::plain);
}

TEST(ShutAndDrain, TakesAllThatHasCome) {
  for (const bool is_gone : {false, true}) {
    SocketPair pair;
    send_raw(pair.theirs.get(), 10, 0, -1);
    send_raw(pair.theirs.get(), 0, 0, -1);
    send_raw(pair.theirs.get(), 1000, 0, -1);
    if (is_gone) pair.theirs.reset();
    EXPECT_TRUE(shut_and_drain(pair.ours.get()));
    if (is_gone) continue;
    EXPECT_THAT(send_frame(pair.theirs.get(), bytes_of("x"s)), FailsWith(Errc::disconnected));
  }
}

// A record of no bytes reads like the end, and is not.
TEST(ShutAndDrain, IsNotDeceivedByEmptyRecords) {
  Pipe pipe;
  for (const bool is_gone : {false, true}) {
    SocketPair pair;
    for (int i = 0; i < 3; ++i) send_raw(pair.theirs.get(), 0, 0, -1);
    send_raw(pair.theirs.get(), 0, 1, pipe.reader.get());
    if (is_gone) pair.theirs.reset();
    EXPECT_FALSE(shut_and_drain(pair.ours.get()));
  }
}

// ---- Listening ----

TEST(ListenAt, GivesThePathItsMode) {
  TemporaryDirectory directory;
  const auto old_mask = ::umask(0077);
  for (const int mode : {0600, 0660, 0666}) {
    const auto path = directory.file("socket" + std::to_string(mode));
    const auto listener = listen_at(path, mode);
    ASSERT_THAT(listener, Succeeds());
    struct stat status {};
    ASSERT_EQ(::stat(path.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode, static_cast<mode_t>(S_IFSOCK | mode)) << "whatever the umask";
  }
  ::umask(old_mask);
}

// There is no moment in which connect(2) is denied: the file is made with its mode, and not changed.
TEST(ListenAt, GivesThePathItsModeFromTheFirstMoment) {
  TemporaryDirectory directory;
  const UniqueFd watch(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  ASSERT_GE(::inotify_add_watch(watch.get(), directory.file("").c_str(), IN_CREATE | IN_ATTRIB), 0);
  const auto old_mask = ::umask(0077);
  const auto listener = listen_at(directory.file("s"), 0666);
  EXPECT_EQ(::umask(old_mask), 0077U) << "the umask is as it was";
  ASSERT_THAT(listener, Succeeds());
  alignas(inotify_event) std::array<char, 4096> events{};
  const auto count = ::read(watch.get(), events.data(), events.size());
  ASSERT_GE(count, static_cast<ssize_t>(sizeof(inotify_event)));
  const auto* made = reinterpret_cast<const inotify_event*>(events.data());
  EXPECT_EQ(made->mask, static_cast<std::uint32_t>(IN_CREATE));
  EXPECT_EQ(static_cast<std::size_t>(count), sizeof(inotify_event) + made->len) << "the file was changed";
}

TEST(ListenAt, TakesNoDescriptorsWhereTheKernelCanRefuseThem) {
  TemporaryDirectory directory;
  const auto listener = listen_at(directory.file("s"), 0600);
  ASSERT_THAT(listener, Succeeds());
  const SocketPair pair;
  EXPECT_TRUE(takes_descriptors(pair.ours.get())) << "as every socket does that was not asked to refuse them";
  if (takes_descriptors(listener->get())) GTEST_SKIP() << "Linux before 6.16";
  const auto peer = connect_to(directory.file("s"));
  ASSERT_THAT(peer, Succeeds());
  const Pipe pipe;
  const int fd = pipe.reader.get();
  EXPECT_THAT(send_frame(peer->get(), bytes_of("x"s), {&fd, 1}), FailsWith(Errc::permission_denied));
  EXPECT_THAT(send_frame(peer->get(), bytes_of("x"s)), testing::Optional(true));
}

TEST(ListenAt, DoesNotTakeAPathFromAnother) {
  TemporaryDirectory directory;
  const auto path = directory.file("socket");
  const auto first = listen_at(path, 0600);
  ASSERT_THAT(first, Succeeds());
  EXPECT_THAT(listen_at(path, 0600), FailsWith(Errc::os_failure));
  EXPECT_THAT(connect_to(path), Succeeds()) << "the first one still listens";
}

TEST(ListenAt, DoesNotBlock) {
  TemporaryDirectory directory;
  const auto listener = listen_at(directory.file("socket"), 0600);
  ASSERT_THAT(listener, Succeeds());
  EXPECT_EQ(::accept4(listener->get(), nullptr, nullptr, SOCK_CLOEXEC), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(::fcntl(listener->get(), F_GETFD), FD_CLOEXEC);
}

}  // namespace
}  // namespace cowmgr
