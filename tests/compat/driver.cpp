// driver: a client that does what it reads, a line each, and answers each with "ok" or with what went wrong.
// It uses only what the last release has too, so that ./dev compat can build it against either. Usage:
// driver, with COWMGR_SOCKET.
#include <algorithm>
#include <cowmgr/cowmgr.hpp>
#include <cowmgr/pool.hpp>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using cowmgr::Errc;
using cowmgr::Result;

constexpr std::int64_t kFactor = 3;             // item i of every array is i * kFactor
constexpr std::uint64_t kLargeResult = 20'000;  // items: too long for a value, so that it takes an array
const auto kItems = cowmgr::Dtype::of<std::int64_t>();

std::vector<std::int64_t> items(std::uint64_t count) {
  std::vector<std::int64_t> values(count);
  for (std::uint64_t i = 0; i < count; ++i) values[i] = static_cast<std::int64_t>(i) * kFactor;
  return values;
}

Result<void> same(const cowmgr::Array& array, std::uint64_t count) {
  const auto found = array.as<std::int64_t>();
  if (!found) return cowmgr::error_of(found);
  const auto wanted = items(count);
  if (std::equal(found->begin(), found->end(), wanted.begin(), wanted.end())) return {};
  return cowmgr::fail(Errc::corrupted, "\"" + array.name() + "\" holds something else");
}

// What a call gave, without what it was.
template <class T>
Result<void> nothing_of(const Result<T>& result) {
  if (!result) return cowmgr::error_of(result);
  return {};
}

class Driver {
 public:
  explicit Driver(cowmgr::Client client) : client_(std::move(client)) {}

  Result<void> act(const std::string& line) {
    std::istringstream words(line);
    std::string verb;
    std::string name;
    std::uint64_t count = 0;
    std::uint64_t slots = 0;
    words >> verb >> name >> count >> slots;
    if (verb == "put")
      return nothing_of(client_.put<std::int64_t>(name, items(count), {count}, {.replace = true}));
    if (verb == "view") return view(name, count);
    if (verb == "look") return same(views_.at(name), count);
    if (verb == "create") return create(name, count);
    if (verb == "seal") return nothing_of(writer_->seal());
    if (verb == "dense") return keep(client_.create_results(name, {kItems, {count}}, slots));
    if (verb == "ragged") return keep(client_.create_ragged(name, count));
    if (verb == "open") return keep(client_.open_results(name, std::chrono::seconds(30)));
    if (verb == "lease") return lease();
    if (verb == "commit") return commit();
    if (verb == "work") return nothing_of(set_->work([this](cowmgr::Slot& slot) { return fill(slot); }));
    if (verb == "collect") return set_->is_ragged() ? collect_ragged() : collect_dense(count);
    if (verb == "ask") return ask(name);
    if (verb == "evict") return nothing_of(client_.evict(std::vector<std::string>{name}));
    if (verb == "start-pool") return start_pool();
    if (verb == "pool") return use_pool(name);
    return cowmgr::fail(Errc::invalid_argument, "what is " + verb + "?");
  }

 private:
  Result<void> view(const std::string& name, std::uint64_t count) {
    auto array = client_.attach(name, {.wait = std::chrono::seconds(30)});
    if (!array) return cowmgr::error_of(array);
    const auto& kept = views_.insert_or_assign(name, *std::move(array)).first->second;
    return same(kept, count);
  }

  Result<void> create(const std::string& name, std::uint64_t count) {
    auto writer = client_.create(name, {kItems, {count}});
    if (!writer) return cowmgr::error_of(writer);
    writer_ = *std::move(writer);
    std::ranges::copy(items(count), writer_->as<std::int64_t>()->begin());
    return {};
  }

  Result<void> keep(Result<cowmgr::ResultSet> set) {
    if (!set) return cowmgr::error_of(set);
    set_ = *std::move(set);
    return {};
  }

  Result<void> lease() {
    auto slot = set_->lease();
    if (!slot) return cowmgr::error_of(slot);
    if (!*slot) return cowmgr::fail(Errc::not_found, "no slot is left");
    slot_ = **std::move(slot);
    return fill(*slot_);
  }

  Result<void> commit() {
    auto done = slot_->commit();
    slot_.reset();
    return done;
  }

  // Rows of a dense set as items() has them; in a ragged one each third slot gets an array, the others a
  // value.
  Result<void> fill(cowmgr::Slot& slot) const {
    if (!set_->is_ragged()) {
      const auto rows = slot.as<std::int64_t>();
      if (!rows) return cowmgr::error_of(rows);
      auto next = static_cast<std::int64_t>(slot.rows().begin) * kFactor;
      for (auto& item : *rows) item = std::exchange(next, next + kFactor);
      return {};
    }
    if (slot.index() % 3 == 0) {
      if (auto ok = slot.allocate({kItems, {kLargeResult}}); !ok) return ok;
      std::ranges::copy(items(kLargeResult), slot.as<std::int64_t>()->begin());
      return {};
    }
    const std::uint64_t value = slot.index() * 7;
    return slot.set_value(std::as_bytes(std::span(&value, 1)));
  }

  Result<void> collect_dense(std::uint64_t count) {
    const auto array = set_->wait(std::chrono::minutes(2));
    if (!array) return cowmgr::error_of(array);
    return same(*array, count);
  }

  Result<void> collect_ragged() {
    if (auto ok = set_->wait_settled(std::chrono::minutes(2)); !ok) return ok;
    for (std::uint64_t i = 0; i < set_->slots(); ++i) {
      if (i % 3 == 0) {
        const auto array = set_->array(i);
        if (!array) return cowmgr::error_of(array);
        if (auto ok = same(*array, kLargeResult); !ok) return ok;
        continue;
      }
      const auto value = set_->value(i);
      if (!value) return cowmgr::error_of(value);
      std::uint64_t number = 0;
      if (value->size() != sizeof number) return cowmgr::fail(Errc::corrupted, "a value of another size");
      std::memcpy(&number, value->data(), sizeof number);
      if (number != i * 7) return cowmgr::fail(Errc::corrupted, "another value");
    }
    return set_->forget();
  }

  // The requests that only ask, and those that leave no trace.
  Result<void> ask(const std::string& name) const {
    const std::vector<std::string> names = {name};
    const std::vector<Result<void>> answers = {nothing_of(client_.stat(name)),
                                               nothing_of(client_.list()),
                                               nothing_of(client_.clients()),
                                               nothing_of(client_.list_results()),
                                               nothing_of(client_.ping()),
                                               nothing_of(client_.pin(names)),
                                               nothing_of(client_.pin(names, false)),
                                               nothing_of(client_.attach(names))};
    for (const auto& answer : answers) {
      if (!answer) return answer;
    }
    return {};
  }

  Result<void> start_pool() {
    auto pool = cowmgr::Pool::start(client_, {.workers = 2});
    if (!pool) return cowmgr::error_of(pool);
    pool_.emplace(*std::move(pool));
    return {};
  }

  Result<void> use_pool(const std::string& name) const {
    const auto array = client_.attach(name);
    if (!array) return cowmgr::error_of(array);
    const auto wanted = array->as<std::int64_t>();
    const auto sums = pool_->map(*array, [](std::span<const std::int64_t> chunk) {
      return std::accumulate(chunk.begin(), chunk.end(), std::int64_t{0});
    });
    if (!sums) return cowmgr::error_of(sums);
    const auto copy =
        pool_->map(*array, [](std::span<const std::int64_t> chunk, std::span<std::int64_t> out) {
          std::ranges::copy(chunk, out.begin());
        });
    if (!copy) return cowmgr::error_of(copy);
    if (std::accumulate(sums->begin(), sums->end(), std::int64_t{0}) !=
        std::accumulate(wanted->begin(), wanted->end(), std::int64_t{0}))
      return cowmgr::fail(Errc::corrupted, "the sums are wrong");
    return same(*copy, wanted->size());
  }

  cowmgr::Client client_;
  std::map<std::string, cowmgr::Array> views_;
  std::optional<cowmgr::ArrayWriter> writer_;
  std::optional<cowmgr::ResultSet> set_;
  std::optional<cowmgr::Slot> slot_;
  std::optional<cowmgr::Pool> pool_;
};

}  // namespace

int main() {
  auto client = cowmgr::Client::connect({.command = "driver", .wait = std::chrono::seconds(30)});
  if (!client) {
    std::cout << cowmgr::to_string(client.error().code) << ": " << client.error().message << std::endl;
    return 1;
  }
  Driver driver(*std::move(client));
  for (std::string line; std::getline(std::cin, line);) {
    const auto done = driver.act(line);
    if (done)
      std::cout << "ok" << std::endl;
    else
      std::cout << cowmgr::to_string(done.error().code) << ": " << done.error().message << std::endl;
  }
  return 0;
}
