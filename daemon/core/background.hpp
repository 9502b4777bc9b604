// Work that takes too long for the loop.
//
// 1. A lane is one thread, for work of a kind: nobody's gigabytes hold up what others do in a moment.
// 2. In a lane users take turns: whoever asks for much waits for himself.
// 3. Everything here but the work itself runs in the loop, which owns all state; the work touches none of it.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <sys/types.h>
#include <type_traits>
#include <utility>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>

namespace cowmgr {

namespace asio = boost::asio;

// small: a moment, as a segment of some megabytes takes. large: all that takes as long as its size says.
// scan: reading of /proc, which takes as long as there are processes; the service manager, who may not
// answer.
enum class LaneKind : std::uint8_t { small, large, scan };

// In which lane to make, copy or free so much memory; and what takes no longer than to hand it over.
[[nodiscard]] LaneKind lane_for(std::uint64_t size_bytes) noexcept;
inline constexpr std::uint64_t kAtOnceBytes = std::uint64_t{256} << 10;

class Lane {
 public:
  // `nice`: how far its thread stands back behind the loop.
  Lane(asio::io_context& io, int nice) : io_(io), nice_(nice), thread_(1) {}
  ~Lane() { thread_.join(); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Runs `work` in the lane's thread when it is `user`'s turn; resumes in the loop with what it returned.
  template <class Work>
  [[nodiscard]] asio::awaitable<std::invoke_result_t<Work>> run(uid_t user, Work work) {
    if (std::exchange(is_busy_, true)) co_await wait_for_turn(user);
    const Turn turn(*this);
    co_return co_await asio::co_spawn(thread_, in_the_thread(std::move(work), nice_), asio::use_awaitable);
  }

 private:
  // The lane is this one's until it goes, and then the next one's.
  class Turn {
   public:
    explicit Turn(Lane& lane) : lane_(lane) {}
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { lane_.next(); }

   private:
    Lane& lane_;
  };
  template <class Work>
  static asio::awaitable<std::invoke_result_t<Work>> in_the_thread(Work work, int nice) {
    stand_back(nice);
    co_return work();
  }
  static void stand_back(int nice) noexcept;
  [[nodiscard]] asio::awaitable<void> wait_for_turn(uid_t user);
  void next() noexcept;

  asio::io_context& io_;
  int nice_;
  bool is_busy_ = false;
  std::map<uid_t, std::deque<asio::steady_timer*>> waiting_;  // by user; none is empty
  uid_t last_ = 0;                                            // whose turn it was
  asio::thread_pool thread_;
};

class Background {
 public:
  explicit Background(asio::io_context& io);

  // As Lane::run().
  template <class Work>
  [[nodiscard]] asio::awaitable<std::invoke_result_t<Work>> run(LaneKind kind, uid_t user, Work work) {
    return lane(kind).run(user, std::move(work));
  }
  // The same for work on so many bytes, which is done in the loop if they are few.
  template <class Work>
  [[nodiscard]] asio::awaitable<std::invoke_result_t<Work>> run_sized(std::uint64_t size_bytes, uid_t user,
                                                                      Work work) {
    if (size_bytes <= kAtOnceBytes) co_return work();
    co_return co_await run(lane_for(size_bytes), user, std::move(work));
  }

 private:
  [[nodiscard]] Lane& lane(LaneKind kind) noexcept;

  Lane small_;
  Lane large_;
  Lane scan_;
};

}  // namespace cowmgr
