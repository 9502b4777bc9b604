#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

#include <fmt/format.h>

#include "tests/fault/storm.hpp"

namespace cowmgr::test {
namespace {

std::uint64_t mix(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t x = a * 0x9E37'79B9'7F4A'7C15U + b + 0x7F4A'7C15U;
  x = (x ^ x >> 30U) * 0xBF58'476D'1CE4'E5B9U;
  return x ^ x >> 29U;
}

std::size_t words_of(std::uint32_t array, std::uint64_t put) noexcept {
  const std::uint64_t kind = mix(array, put);
  return kind % 16 == 0 ? 280'000 : 2 + kind / 16 % 1100;  // the large ones lie in huge pages
}

std::string text_of(const StormSet& set, std::uint64_t slot) {
  return fmt::format("{} of {}", set.item(slot), set.name());
}

}  // namespace

std::string array_name(std::uint32_t array) {
  return fmt::format("array {}", array);
}

std::vector<std::byte> array_bytes(std::uint32_t array, std::uint64_t put) {
  std::vector<std::uint64_t> words(words_of(array, put));
  words[0] = array;
  words[1] = put;
  for (std::size_t i = 2; i < words.size(); ++i) words[i] = mix(put << 8U | array, i);
  const auto bytes = std::as_bytes(std::span(words));
  return {bytes.begin(), bytes.end()};
}

std::optional<std::uint64_t> put_of(std::uint32_t array, std::span<const std::byte> bytes) {
  std::array<std::uint64_t, 2> head{};
  if (bytes.size() < sizeof head) return std::nullopt;
  std::memcpy(head.data(), bytes.data(), sizeof head);
  const auto expected = array_bytes(array, head[1]);
  if (head[0] != array || !std::ranges::equal(bytes, expected)) return std::nullopt;
  return head[1];
}

std::string StormSet::name() const {
  return fmt::format("set {} {}", maker, number);
}

std::optional<StormSet> StormSet::parse(const std::string& name) {
  StormSet set;
  const auto space = name.rfind(' ');
  if (!name.starts_with("set ") || space == 3 || space == std::string::npos) return std::nullopt;
  std::from_chars(name.data() + 4, name.data() + space, set.maker);
  std::from_chars(name.data() + space + 1, name.data() + name.size(), set.number);
  return set;
}

std::uint64_t StormSet::item(std::uint64_t at) const noexcept {
  return mix(std::uint64_t{maker} << 32U | number, at);
}

Result<void> fill(const StormSet& set, Slot& slot) {
  if (!set.is_ragged()) {
    const auto items = *slot.as<std::uint64_t>();
    for (std::size_t i = 0; i < items.size(); ++i) items[i] = set.item(slot.rows().begin + i);
    return {};
  }
  if (!set.holds_array(slot.index())) {
    const std::string text = text_of(set, slot.index());
    return slot.set_value(std::as_bytes(std::span(text)));
  }
  if (auto ok = slot.allocate({Dtype::of<std::uint64_t>(), {3}}); !ok) return ok;
  (*slot.as<std::uint64_t>())[2] = set.item(slot.index());
  return {};
}

std::string check_slot(const StormSet& set, const ResultSet& open, std::uint64_t slot) {
  const SlotInfo info = open.slot(slot).value();
  const auto wrong = [&](std::string_view what) {
    return fmt::format("slot {} of {}, attempt {}: {}", slot, set.name(), info.attempt, what);
  };
  if (info.state != SlotState::committed)
    return wrong(fmt::format("its state is {}", static_cast<int>(info.state)));
  if (!set.is_ragged()) return {};
  if (!set.holds_array(slot)) {
    const auto value = open.value(slot);
    if (!value) return wrong(value.error().message);
    const std::string expected = text_of(set, slot);
    return std::ranges::equal(*value, std::as_bytes(std::span(expected))) ? ""
                                                                          : wrong("it holds another value");
  }
  auto array = open.array(slot);
  while (!array && array.error().code == Errc::disconnected) array = open.array(slot);
  if (!array) return wrong(array.error().message);
  const auto items = *array->as<std::uint64_t>();
  return items.size() == 3 && items[2] == set.item(slot) ? "" : wrong("it holds another array");
}

// ---- The model ----

void StormModel::note(const Record& record) {
  ++records_;
  using What = Record::What;
  const bool is_answer = record.is_answer != 0;
  switch (record.what) {
    case What::put:
    case What::evict: {
      Array& array = arrays_[record.array];
      Shown shown;
      if (record.what == What::put) shown = record.put;
      array.last_put = std::max(array.last_put, record.put);
      if (is_answer) {
        array.shown = shown;
        array.asked.clear();
      } else {
        array.asked.insert(shown);
      }
      return;
    }
    case What::make_set:
      last_set_[record.client] = std::max(last_set_[record.client], record.set.number);
      sets_[record.set].is_made = is_answer;
      return;
    case What::commit:
      if (!is_answer) return;
      // Who committed may tell it after the set's maker has told that the set is forgotten.
      if (const auto at = sets_.find(record.set); at != sets_.end()) at->second.committed.insert(record.slot);
      return;
    default:
      if (is_answer)
        sets_.erase(record.set);
      else
        sets_[record.set].may_be_gone = true;
  }
}

std::set<StormModel::Shown> StormModel::possible(std::uint32_t array) const {
  const auto at = arrays_.find(array);
  if (at == arrays_.end()) return {std::nullopt};
  std::set<Shown> all = at->second.asked;
  all.insert(at->second.shown);
  return all;
}

void StormModel::settle(std::uint32_t array, Shown shown) {
  arrays_[array].shown = shown;
  arrays_[array].asked.clear();
}

std::uint64_t StormModel::last_put(std::uint32_t array) const {
  const auto at = arrays_.find(array);
  return at == arrays_.end() ? 0 : at->second.last_put;
}

std::uint32_t StormModel::last_set(std::uint32_t client) const {
  const auto at = last_set_.find(client);
  return at == last_set_.end() ? 0 : at->second;
}

void StormModel::client_died(std::uint32_t client) {
  for (auto& [set, known] : sets_) {
    if (set.maker == client && !set.is_detached()) known.may_be_gone = true;
  }
}

}  // namespace cowmgr::test
