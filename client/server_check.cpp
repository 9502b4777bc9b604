#include "client/server_check.hpp"

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <optional>
#include <pwd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr::detail {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPasswordBytes = std::size_t{16} << 10;  // of one entry, with its texts
constexpr uid_t kUsualOverflow = 65534;

std::optional<uid_t> number_in(const std::string& text) {
  uid_t uid = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, uid);
  return error == std::errc() && stop == end ? std::optional(uid) : std::nullopt;
}

std::optional<uid_t> uid_of(const std::string& user) {
  if (const auto number = number_in(user)) return number;
  passwd entry{};
  passwd* found = nullptr;
  std::vector<char> texts(kPasswordBytes);
  if (::getpwnam_r(user.c_str(), &entry, texts.data(), texts.size(), &found) != 0 || found == nullptr)
    return std::nullopt;
  return entry.pw_uid;
}

std::string name_of(uid_t uid) {
  passwd entry{};
  passwd* found = nullptr;
  std::vector<char> texts(kPasswordBytes);
  if (::getpwuid_r(uid, &entry, texts.data(), texts.size(), &found) != 0 || found == nullptr)
    return fmt::format("user {}", uid);
  return fmt::format("{} (user {})", printable(entry.pw_name), uid);
}

// Whether `uid` may be any of many users: this namespace has no number for them.
bool is_overflow(uid_t uid) {
  uid_t overflow = kUsualOverflow;
  std::ifstream("/proc/sys/kernel/overflowuid") >> overflow;
  if (uid != overflow) return false;
  std::uint64_t inside = 0;
  std::uint64_t outside = 0;
  std::uint64_t count = 0;
  std::ifstream("/proc/self/uid_map") >> inside >> outside >> count;
  return count < UINT32_MAX;  // the first namespace has a number for each
}

bool only_root_writes(const struct stat& directory) {
  constexpr mode_t kOthersWrite = S_IWGRP | S_IWOTH;
  return S_ISDIR(directory.st_mode) && directory.st_uid == 0 && (directory.st_mode & kOthersWrite) == 0;
}

// Of a directory below such as only root can write to, up to the top: nobody else can have put it there.
std::optional<uid_t> appointed_by_root(const std::string& socket_path) {
  std::error_code error;
  const fs::path directory = fs::canonical(fs::absolute(socket_path, error).parent_path(), error);
  struct stat status {};
  if (error || ::stat(directory.c_str(), &status) != 0) return std::nullopt;
  for (fs::path parent = directory; parent != parent.root_path();) {
    parent = parent.parent_path();
    struct stat above {};
    if (::stat(parent.c_str(), &above) != 0 || !only_root_writes(above)) return std::nullopt;
  }
  return status.st_uid;
}

}  // namespace

Result<void> check_server(int socket, const std::string& path, const std::string& named) {
  ucred server{};
  socklen_t size_bytes = sizeof server;
  // Of a connected socket of this kind: of the process that called listen(2), at that time (unix(7)).
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &server, &size_bytes) != 0)
    return tl::unexpected(os_error("getsockopt", path, errno));
  const auto wanted = named.empty() ? std::nullopt : uid_of(named);
  if (!named.empty() && !wanted) {
    return fail(Errc::invalid_argument,
                fmt::format("there is no user {}, whose daemon would be trusted", printable(named)));
  }
  if (server.uid == wanted) return {};
  const bool is_known = !is_overflow(server.uid);
  if (is_known && (server.uid == 0 || server.uid == ::geteuid() || server.uid == appointed_by_root(path)))
    return {};
  return fail(
      Errc::permission_denied,
      fmt::format("{} is served by {}, process {}: that is {}. If it is the daemon that you mean, name its "
                  "user: COWMGR_DAEMON_USER={}, ConnectOptions::daemon_user or `cowctl --daemon-user {}`",
                  path, name_of(server.uid), server.pid,
                  is_known ? "neither you, nor root, nor the owner of a directory that root made for it"
                           : "somebody from outside this user namespace",
                  server.uid, server.uid));
}

}  // namespace cowmgr::detail
