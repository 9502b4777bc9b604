#include "client/greeter.hpp"

#include <mutex>
#include <new>
#include <utility>

#include <fmt/format.h>

#include "client/fork_guard.hpp"
#include "client/server_check.hpp"
#include "proto/segment.hpp"
#include "proto/version.hpp"

namespace cowmgr::detail {

Error error_of_failure(const wire::Failure& failure) {
  return {static_cast<Errc>(failure.code()), std::string(view_of(failure.message()))};
}

// A channel among those that say Hello, for as long as this object lives.
class Greeter::Opening {
 public:
  Opening(Greeter& greeter, const Channel& channel) : greeter_(greeter), channel_(channel) {
    const std::lock_guard lock(pool_mutex());
    greeter_.opening_.insert(&channel_);
    if (greeter_.is_closed_) channel_.shutdown();
  }
  Opening(const Opening&) = delete;
  Opening& operator=(const Opening&) = delete;
  ~Opening() {
    const std::lock_guard lock(pool_mutex());
    greeter_.opening_.erase(&channel_);
  }

 private:
  Greeter& greeter_;
  const Channel& channel_;
};

Result<Greeter::Opened> Greeter::open(const Hello& hello, const Limit& limit, Tries& tries) {
  try {
    return greet(hello, limit, tries);
  } catch (const std::bad_alloc&) {
    return fail(Errc::out_of_memory, "this process has no memory left");
  }
}

Result<Greeter::Opened> Greeter::greet(const Hello& hello, const Limit& limit, Tries& tries) {
  auto connected = Channel::connect(options_.socket, hello.epoch, limit);
  if (!connected) {
    tries.was_kept_out = connected.error().code == Errc::permission_denied;
    return error_of(std::move(connected));
  }
  auto channel = *std::move(connected);
  if (auto ok = check_server(channel->fd(), options_.socket, options_.daemon_user); !ok)
    return error_of(std::move(ok));
  const Opening opening(*this, *channel);
  channel->finish(wire::CreateHelloDirect(channel->builder(), kProtocolVersion, options_.command.c_str(),
                                          hello.session, hello.resumes, kLayoutVersion));
  const auto reply = channel->exchange(limit);
  if (!reply) {
    if (reply.error().code == Errc::disconnected && channel->was_read()) ++tries.deaths;
    if (reply.error().code == Errc::timed_out)
      return fail(Errc::timed_out,
                  fmt::format("the daemon at {} does not answer; is it stopped?", options_.socket));
    return error_of(reply);
  }
  if (const auto* failure = (*reply)->body_as_Failure()) return tl::unexpected(error_of_failure(*failure));
  const auto* welcome = (*reply)->body_as_Welcome();
  if (welcome == nullptr) return fail(Errc::protocol_error, "the daemon does not greet");
  const std::uint64_t session = welcome->session();
  return Opened{std::move(channel), session};
}

void Greeter::close() noexcept {
  is_closed_ = true;
  for (const Channel* channel : opening_) channel->shutdown();
}

}  // namespace cowmgr::detail
