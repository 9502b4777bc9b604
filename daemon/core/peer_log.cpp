#include "daemon/core/peer_log.hpp"

#include <algorithm>

namespace cowmgr {
namespace {

constexpr auto kTellAfter = std::chrono::seconds(10);
constexpr std::size_t kManyUsers = 1024;  // from then on those whose budget is whole are forgotten

}  // namespace

bool LogBudget::take(uid_t uid, Tick now) {
  if (users_.size() >= kManyUsers && !users_.contains(uid)) forget_idle(now);
  User& user = users_.try_emplace(uid, User{limits_.lines, now, 0}).first->second;
  user.lines = lines_left(user, now);
  user.since = now;
  if (user.lines >= 1) {
    user.lines -= 1;
    return true;
  }
  ++user.left_out;
  return false;
}

double LogBudget::lines_left(const User& user, Tick now) const {
  const std::chrono::duration<double> passed = now - user.since;
  return std::min(limits_.lines, user.lines + passed.count() * limits_.per_second);
}

void LogBudget::forget_idle(Tick now) {
  std::erase_if(users_, [&](const auto& entry) {
    return entry.second.left_out == 0 && lines_left(entry.second, now) >= limits_.lines;
  });
}

std::vector<LogBudget::LeftOut> LogBudget::take_left_out() {
  std::vector<LeftOut> out;
  for (auto& [uid, user] : users_) {
    if (const std::uint64_t lines = std::exchange(user.left_out, 0); lines > 0) out.push_back({uid, lines});
  }
  std::ranges::sort(out, {}, &LeftOut::uid);
  return out;
}

bool PeerLog::may_write(uid_t uid) {
  if (budget_.take(uid, std::chrono::steady_clock::now())) return true;
  if (is_waiting_ || is_stopping_) return false;
  is_waiting_ = true;
  tell_.expires_after(kTellAfter);
  tell_.async_wait([this](const boost::system::error_code& error) {
    if (error) return;
    is_waiting_ = false;
    tell();
  });
  return false;
}

void PeerLog::tell() {
  for (const auto& [uid, lines] : budget_.take_left_out()) {
    spdlog::warn("{} line(s) about what user {} does were left out: of one user {} a second are written",
                 lines, uid, budget_.limits().per_second);
  }
}

void PeerLog::stop() noexcept {
  is_stopping_ = true;
  tell_.cancel();
}

}  // namespace cowmgr
