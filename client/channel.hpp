// A socket to the daemon, with the buffers of the request and the reply that it carries.
//
// 1. One request at a time: the next one is sent when the reply has come.
// 2. Whoever stops waiting leaves a channel that is owed a reply: nothing can be asked on it until that was
//    taken. The reply counts, and what it grants with it (grants.hpp).
// 3. A record is a frame, whatever is in it: one that makes no sense does not spoil the next.
// 4. A program may close our descriptor, and be given its number again: it is not used before it is seen to
//    be still the socket that it was. When it is not, the channel has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/limit.hpp"
#include "client/socket_mark.hpp"
#include "proto/errors.hpp"
#include "proto/frames.hpp"
#include "proto/unique_fd.hpp"

namespace cowmgr::detail {

using Builder = flatbuffers::FlatBufferBuilder;
template <class T>
using Offset = flatbuffers::Offset<T>;

class Channel {
 public:
  enum class State : std::uint8_t {
    ready,   // for the next request
    owed,    // a reply is still to come: receive() takes it
    ended,   // the daemon has closed the connection, or the program its descriptor
    broken,  // it cannot be used
  };

  // Errors: as connect_to(); timed_out.
  [[nodiscard]] static Result<std::unique_ptr<Channel>> connect(const std::string& path, std::uint64_t epoch,
                                                                const Limit& limit);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Starts a request; finish it, then send() or exchange() it.
  [[nodiscard]] Builder& builder() noexcept;
  template <class Table>
  void finish(Offset<Table> table, const std::vector<std::uint64_t>& released = {}, bool is_again = false) {
    const auto ids = released.empty() ? 0 : builder_.CreateVector(released);
    builder_.Finish(wire::CreateRequest(builder_, wire::RequestBodyTraits<Table>::enum_value, table.Union(),
                                        ids, is_again));
  }
  // The request that was finished last.
  [[nodiscard]] const wire::Request& request() const noexcept {
    return *flatbuffers::GetRoot<wire::Request>(builder_.GetBufferPointer());
  }

  // Sends what was finished, and expects no reply. Errors: timed_out, disconnected, invalid_argument when it
  // does not fit a frame.
  [[nodiscard]] Result<void> send(const Limit& limit);
  // Sends, and receives the reply, which is valid until the next request. Errors: as send() and receive().
  [[nodiscard]] Result<const wire::Reply*> exchange(const Limit& limit);
  // The reply that the channel is owed. Errors: timed_out, and it still is; disconnected; protocol_error for
  // one that makes no sense.
  [[nodiscard]] Result<const wire::Reply*> receive(const Limit& limit);

  [[nodiscard]] std::vector<UniqueFd> take_fds() noexcept { return std::move(fds_); }
  // Whether the reply brought descriptors that this process had no room for.
  [[nodiscard]] bool lacks_fds() const noexcept { return lacks_fds_; }
  [[nodiscard]] State state() const noexcept { return state_; }
  // Whether the last request may have reached the daemon.
  [[nodiscard]] bool was_sent() const noexcept { return was_sent_; }
  // Whether the daemon had read the last request when the connection ended.
  [[nodiscard]] bool was_read() const noexcept { return was_sent_ && !was_left_unread_; }
  [[nodiscard]] std::uint64_t epoch() const noexcept { return epoch_; }
  [[nodiscard]] int fd() const noexcept { return socket_.get(); }
  // Ends an exchange() of another thread: with the reply, if it is there already.
  void shutdown() const noexcept;
  // Another descriptor of the socket, to be told of its end by.
  [[nodiscard]] UniqueFd duplicate() const noexcept;
  // False when the program closed the descriptor, or put another file in its place.
  [[nodiscard]] bool is_intact() const noexcept { return mark_.is_still(socket_.get()); }

 private:
  Channel(UniqueFd socket, std::uint64_t epoch);
  [[nodiscard]] bool await(const Limit& limit) const;
  [[nodiscard]] tl::unexpected<Error> robbed();
  [[nodiscard]] Result<const wire::Reply*> take_reply(const Limit& limit);

  UniqueFd socket_;
  SocketMark mark_;
  State state_ = State::ready;
  bool was_sent_ = false;
  bool was_left_unread_ = false;
  bool lacks_fds_ = false;
  std::uint64_t epoch_;
  Builder builder_;
  std::unique_ptr<std::byte[]> buffer_;
  std::vector<UniqueFd> fds_;
  std::uint64_t generation_;
};

}  // namespace cowmgr::detail
