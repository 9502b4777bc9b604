#include "daemon/core/core.hpp"

#include <algorithm>
#include <span>
#include <unistd.h>

#include <fmt/format.h>

#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kNamedWriters = 8;  // in a message
// Many more than anybody makes files, and few enough for 2^31 ids until they begin anew.
constexpr std::uint64_t kIdStep = std::uint64_t{1} << 22;

std::string in_words(std::span<const Holder> holders) {
  std::string text;
  for (const auto& holder : holders.first(std::min(holders.size(), kNamedWriters))) {
    text += fmt::format("{}process {} ({})", text.empty() ? "" : ", ", holder.pid, printable(holder.command));
  }
  if (holders.size() > kNamedWriters) text += fmt::format(" and {} more", holders.size() - kNamedWriters);
  return text.empty() ? "a process of another user, or a descriptor on its way through a socket" : text;
}

}  // namespace

Core::Core(asio::io_context& io_context, const Config& options, const ShmEnv& shm)
    : io(io_context),
      log(io_context),
      config(options),
      env(shm),
      background(io_context),
      store(shm, {.capacity_bytes = options.capacity_bytes,
                  .quota = options.quota,
                  .admin = ::geteuid(),
                  .first_id = random_id() + 1,
                  .id_step = kIdStep}),
      results(store, ::geteuid()),
      fd_store(options.instance, options.fd_store && options.parent_fd < 0),
      reclaimer(io_context, shm, store, background, waits),
      started(now()),
      purges(options.purge) {}

Time Core::now() {
  return std::chrono::time_point_cast<std::chrono::microseconds>(std::chrono::system_clock::now());
}

void Core::forget_dropped() {
  for (const ArrayId array : store.take_dropped()) {
    results.forget_array(array);
    fd_store.forget(array);
  }
}

asio::awaitable<std::string> Core::writers_in_words(ArrayId id) {
  const ArrayRecord* record = store.find(id);
  if (record == nullptr) co_return "nobody";
  co_return co_await writers_in_words(record->owner.uid, reader_of(record->segment));
}

asio::awaitable<std::string> Core::writers_in_words(uid_t owner, Result<Segment> copy) {
  if (!copy) co_return fmt::format("somebody ({})", copy.error().message);
  auto work = [this, from = *std::move(copy)] { return env.writers_of(from); };
  co_return in_words(co_await background.run(LaneKind::scan, owner, std::move(work)));
}

}  // namespace cowmgr
