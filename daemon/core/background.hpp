// Work that takes too long for the loop.
//
// 1. A lane has threads of its own, for work of one kind: nobody's gigabytes hold up what others do in a
// moment.
// 2. In a lane users take turns: whoever asks for much waits for himself.
// 3. Everything here but the work itself runs in the loop, which owns all state; the work touches none of it.
#pragma once

#include <cstddef>
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

enum class LaneKind : std::uint8_t {
  small,   // a moment, as to make or free some megabytes
  large,   // to make, copy or free more
  scan,    // to read /proc, which takes as long as there are processes
  check,   // to read arrays from end to end
  notify,  // to tell the service manager, who may not read
};

// In which lane to make, copy or free so much memory; and what takes no longer than to hand it over.
[[nodiscard]] LaneKind lane_for(std::uint64_t size_bytes) noexcept;
inline constexpr std::uint64_t kAtOnceBytes = std::uint64_t{256} << 10;

class Lane {
 public:
  // `nice`: how far its threads stand back behind the loop.
  Lane(asio::io_context& io, std::size_t threads, int nice)
      : io_(io), nice_(nice), free_(threads), threads_(threads) {}
  ~Lane() { threads_.join(); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Runs `work` in a thread of the lane when it is `user`'s turn; resumes in the loop with what it returned.
  template <class Work>
  [[nodiscard]] asio::awaitable<std::invoke_result_t<Work>> run(uid_t user, Work work) {
    if (free_ > 0)
      --free_;
    else
      co_await wait_for_turn(user);
    const Turn turn(*this);
    co_return co_await asio::co_spawn(threads_, in_the_thread(std::move(work), nice_), asio::use_awaitable);
  }

 private:
  // A thread is this one's until it goes, and then the next one's.
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
  std::size_t free_;
  std::map<uid_t, std::deque<asio::steady_timer*>> waiting_;  // by user; none is empty
  uid_t last_ = 0;                                            // whose turn it was
  asio::thread_pool threads_;
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
  Lane check_;
  Lane notify_;
};

}  // namespace cowmgr
