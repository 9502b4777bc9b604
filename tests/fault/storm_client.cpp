#include <algorithm>
#include <functional>
#include <unistd.h>

#include <fmt/format.h>

#include "tests/fault/storm.hpp"
#include "tests/support/insist.hpp"

namespace cowmgr::test {
namespace {

constexpr Milliseconds kPatience = std::chrono::seconds(60);

// One client. Every step asks for one thing; what it may not answer ends the client.
class StormClient {
 public:
  StormClient(const StormClientPlan& plan, Client client)
      : plan_(plan),
        client_(std::move(client)),
        random_(plan.seed),
        own_(plan.own),
        last_put_(plan.last_put),
        last_set_(plan.last_set) {}

  std::string run() {
    if (plan_.left) reopen(*plan_.left);
    while (problem_.empty() && !*plan_.is_over) step();
    check_views();
    return problem_;
  }

 private:
  struct Held {
    std::uint32_t array = 0;
    std::uint64_t put = 0;
    Array view;
  };

  template <class Ask>
  auto ask(const Ask& ask_once) -> decltype(ask_once()) {
    may_be_done_ = false;
    return insist(ask_once, &may_be_done_);
  }
  [[nodiscard]] bool is_done(const Error& error, Errc sign) const {
    return may_be_done_ && error.code == sign;
  }

  std::uint64_t pick(std::uint64_t end) {
    return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_);
  }

  void step() {
    const std::uint32_t mine = plan_.number * kArraysEach + static_cast<std::uint32_t>(pick(kArraysEach));
    const auto any = static_cast<std::uint32_t>(pick(std::uint64_t{kStormClients} * kArraysEach));
    const auto what = pick(100);
    if (what < 20)
      put(mine);
    else if (what < 26)
      evict(mine);
    else if (what < 30)
      pin_for_a_while(mine);
    else if (what < 50)
      attach(any);
    else if (what < 55)
      release();
    else if (what < 58)
      wait_for(mine);
    else if (what < 70)
      tend_set();
    else
      work();
  }

  // ---- What the harness is told ----

  void tell(Record record, bool is_answer) {
    record.client = plan_.number;
    record.is_answer = is_answer ? 1 : 0;
    if (::write(plan_.records, &record, sizeof record) != static_cast<ssize_t>(sizeof record)) ::_exit(3);
  }
  void fail(std::string_view doing, const Error& error) {
    if (problem_.empty())
      problem_ = fmt::format("client {}: {}: {} (code {})", plan_.number, doing, error.message,
                             static_cast<int>(error.code));
  }
  void fail(std::string_view what) {
    if (problem_.empty()) problem_ = fmt::format("client {}: {}", plan_.number, what);
  }

  // ---- Arrays ----

  void put(std::uint32_t array) {
    const std::uint64_t number = ++last_put_[array];
    const auto bytes = array_bytes(array, number);
    const Record record{.what = Record::What::put, .array = array, .put = number};
    tell(record, false);
    const auto put = ask([&] {
      return client_.put<std::uint64_t>(array_name(array),
                                        std::span(reinterpret_cast<const std::uint64_t*>(bytes.data()),
                                                  bytes.size() / sizeof(std::uint64_t)),
                                        {bytes.size() / sizeof(std::uint64_t)}, {.replace = true});
    });
    if (!put) return fail(fmt::format("put {} of {}", number, array_name(array)), put.error());
    own_[array] = number;
    tell(record, true);
    if (put_of(array, put->bytes()) != number) fail("a view of what was just put differs");
  }

  void evict(std::uint32_t array) {
    const std::vector<std::string> names = {array_name(array)};
    const Record record{.what = Record::What::evict, .array = array};
    tell(record, false);
    auto evicted = ask([&] { return client_.evict(names); });
    if (!evicted && evicted.error().code == Errc::pinned) {
      // By an earlier client of this number, which died before it could undo that.
      if (const auto ok = ask([&] { return client_.pin(names, false); }); !ok)
        return fail("unpin", ok.error());
      evicted = ask([&] { return client_.evict(names); });
    }
    const bool was_there = own_[array].has_value() && !may_be_done_;
    if (!evicted && (was_there || evicted.error().code != Errc::not_found))
      return fail("evict " + array_name(array), evicted.error());
    own_[array].reset();
    tell(record, true);
  }

  void pin_for_a_while(std::uint32_t array) {
    if (!own_[array]) return;
    const std::vector<std::string> names = {array_name(array)};
    for (const bool pinned : {true, false}) {
      if (const auto ok = ask([&] { return client_.pin(names, pinned); }); !ok)
        return fail("pin", ok.error());
      const auto details = ask([&] { return client_.stat(names.front()); });
      if (!details) return fail("stat", details.error());
      if (details->array.pinned != pinned) return fail("a pin does not show");
    }
  }

  void attach(std::uint32_t array) {
    auto view = ask([&] { return client_.attach(array_name(array)); });
    const bool is_own = array / kArraysEach == plan_.number;
    if (!view && view.error().code == Errc::not_found && (!is_own || !own_[array])) return;
    if (!view) return fail("attach " + array_name(array), view.error());
    const auto put = put_of(array, view->bytes());
    if (!put) return fail(fmt::format("{} holds wrong bytes", array_name(array)));
    if (is_own && own_[array] != put)
      return fail(fmt::format("{} shows put {}, not {}", array_name(array), *put, own_[array].value_or(0)));
    if (held_.size() < 6) held_.push_back({array, *put, *std::move(view)});
  }

  void release() {
    if (held_.empty()) return;
    const auto at = held_.begin() + static_cast<std::ptrdiff_t>(pick(held_.size()));
    if (put_of(at->array, at->view.bytes()) != at->put)
      fail(fmt::format("a view of {} changed", array_name(at->array)));
    held_.erase(at);
  }

  void check_views() {
    while (!held_.empty()) release();
  }

  void wait_for(std::uint32_t array) {
    const auto view = ask([&] { return client_.attach(array_name(array), {.wait = Milliseconds(2)}); });
    if (!view && view.error().code != Errc::timed_out) fail("wait", view.error());
    if (!view && own_[array]) fail("a wait for what is there ends without it");
  }

  // ---- Sets ----

  void reopen(const StormSet& left) {
    auto open = ask([&] { return client_.open_results(left.name()); });
    if (!open && open.error().code == Errc::not_found) return;  // it was never made, or is forgotten
    if (!open) return fail("open " + left.name(), open.error());
    set_ = left;
    open_.emplace(*std::move(open));
  }

  void make_set() {
    const StormSet set{plan_.number, ++last_set_};
    const ResultsOptions options{.is_detached = set.is_detached(), .queue = kStormQueue};
    const Record record{.what = Record::What::make_set, .set = set};
    tell(record, false);
    auto made = ask([&] {
      return set.is_ragged() ? client_.create_ragged(set.name(), set.slots(), options)
                             : client_.create_results(set.name(), {Dtype::of<std::uint64_t>(), {set.rows()}},
                                                      set.slots(), options);
    });
    if (!made && is_done(made.error(), Errc::already_exists))
      made = ask([&] { return client_.open_results(set.name()); });
    if (!made) return fail("make " + set.name(), made.error());
    set_ = set;
    open_.emplace(*std::move(made));
    tell(record, true);
  }

  // Makes one, or looks after the one that there is: once all is done, it is checked and forgotten.
  void tend_set() {
    if (!open_) return make_set();
    const auto info = ask([&] { return open_->info(); });
    if (!info) return fail("look at " + set_.name(), info.error());
    if (info->committed + info->failed < info->slots) return work_on(set_, *open_);
    if (auto ok = ask([&] { return open_->wait_settled(kPatience); }); !ok)
      return fail("wait for " + set_.name(), ok.error());
    for (std::uint64_t slot = 0; slot < set_.slots(); ++slot) {
      if (auto wrong = check_slot(set_, *open_, slot); !wrong.empty()) return fail(wrong);
    }
    if (!set_.is_ragged()) check_output();
    const Record record{.what = Record::What::forget_set, .set = set_};
    tell(record, false);
    if (auto ok = ask([&] { return open_->forget(); }); !ok && !is_done(ok.error(), Errc::not_found))
      return fail("forget " + set_.name(), ok.error());
    if (!set_.is_ragged()) {
      const auto ok = ask([&] { return client_.evict(set_.name()); });
      if (!ok && !is_done(ok.error(), Errc::not_found))
        return fail("evict the output of " + set_.name(), ok.error());
    }
    tell(record, true);
    open_.reset();
  }

  void check_output() {
    const auto out = ask([&] { return open_->wait(kPatience); });
    if (!out) return fail("the output of " + set_.name(), out.error());
    const auto items = *out->as<std::uint64_t>();
    if (items.size() != set_.rows()) return fail("the output has another size");
    for (std::uint64_t row = 0; row < items.size(); ++row) {
      if (items[row] != set_.item(row)) return fail(fmt::format("row {} of {} is wrong", row, set_.name()));
    }
  }

  void work() {
    auto open = ask([&] { return client_.open_queued(kStormQueue, Milliseconds(pick(3))); });
    if (!open && open.error().code == Errc::timed_out) return;
    if (!open) return fail("open the queue", open.error());
    const auto set = StormSet::parse(open->name());
    if (!set) return fail("the queue has a set of another name");
    work_on(*set, *open);
  }

  // What a set's maker that is gone takes with it is no fault.
  static bool is_gone(const Error& error) {
    return error.code == Errc::not_found || error.code == Errc::cancelled;
  }

  void work_on(const StormSet& set, ResultSet& open) {
    auto slots =
        ask([&] { return open.lease_batch(1 + static_cast<std::uint32_t>(pick(3)), Milliseconds(1)); });
    if (!slots && (is_gone(slots.error()) || slots.error().code == Errc::timed_out)) return;
    if (!slots) return fail("lease", slots.error());
    for (Slot& slot : *slots) {
      if (pick(10) == 0) continue;  // given back with its handle
      auto ok = ask([&] { return fill(set, slot); });
      if (ok) ok = ask([&] { return slot.commit(); });
      if (!ok && is_gone(ok.error())) return;
      if (!ok && !is_done(ok.error(), Errc::already_committed))
        return fail(fmt::format("fill and commit slot {} of {}", slot.index(), set.name()), ok.error());
      tell({.what = Record::What::commit, .set = set, .slot = slot.index()}, true);
    }
  }

  const StormClientPlan& plan_;
  Client client_;
  std::mt19937 random_;
  std::map<std::uint32_t, StormModel::Shown> own_;
  std::map<std::uint32_t, std::uint64_t> last_put_;
  std::uint32_t last_set_;
  std::vector<Held> held_;
  StormSet set_;
  std::optional<ResultSet> open_;
  std::string problem_;
  bool may_be_done_ = false;  // what ask() asked for last, before its answer
};

}  // namespace

std::string run_storm_client(const StormClientPlan& plan) {
  auto client = Client::connect({.socket = plan.socket,
                                 .command = fmt::format("storm {}", plan.number),
                                 .reconnect = kPatience,
                                 .wait = kPatience});
  if (!client) return client.error().message;
  return StormClient(plan, *std::move(client)).run();
}

}  // namespace cowmgr::test
