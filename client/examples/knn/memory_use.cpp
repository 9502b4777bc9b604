#include "client/examples/knn/memory_use.hpp"

#include <cerrno>
#include <fstream>
#include <sstream>
#include <string>

#include <fmt/format.h>

namespace cowmgr::knn {

Result<MemoryUse> memory_use(pid_t pid) {
  constexpr std::uint64_t kKib = 1024;  // the kernel says kB and means KiB
  const std::string path = fmt::format("/proc/{}/smaps_rollup", pid);
  std::ifstream file(path);
  if (!file) return tl::unexpected(os_error("open", path, errno));
  MemoryUse use;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string key;
    std::uint64_t kib = 0;
    if (!(words >> key >> kib)) continue;  // the first line: a range of addresses
    if (key == "Rss:") use.rss_bytes = kib * kKib;
    if (key == "Pss:") use.pss_bytes = kib * kKib;
    if (key == "Private_Clean:" || key == "Private_Dirty:") use.private_bytes += kib * kKib;
  }
  // The file of a process that has ended can be opened, and is empty.
  if (use.rss_bytes == 0) return fail(Errc::not_found, fmt::format("process {} has ended", pid));
  return use;
}

}  // namespace cowmgr::knn
