// Which arrays a request means: names and patterns, pages, and what the search may cost.
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/store_fixture.hpp"
#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class StoreSelection : public StoreTest {
 protected:
  StoreSelection() : StoreTest(5000) {}
  Result<Store::Evicted> evict_named(const Names& names) { return evict(kAlice, Selection{.names = names}); }
  static Selection matching(const Names& patterns) {
    Selection selection;
    for (const auto& pattern : patterns) selection.patterns.push_back(*Glob::parse(pattern));
    return selection;
  }
  Result<Store::Evicted> evict_matching(const Names& patterns) {
    auto selection = matching(patterns);
    EXPECT_EQ(store_->search(kAlice, selection), true);
    return evict(kAlice, selection);
  }
  static Names names_of(const Listing<ArrayRecord>& page) {
    Names names;
    for (const ArrayRecord* record : page.entries) names.push_back(record->name);
    return names;
  }
  // What takes longest: long names, and patterns that nearly fit them everywhere.
  void put_long_names(int count) {
    for (int i = 0; i < count; ++i) put(kAlice, std::string(250, 'a') + fmt::format("{:05}", i));
  }
  static Names slow_patterns() { return Names(64, "*" + std::string(125, 'a') + "b*"); }
};

TEST_F(StoreSelection, ANameIsAName) {
  for (const auto* name : {"w0", "w[0]", "*", "a\\b", "a?"}) put(kAlice, name);
  for (const std::string name : {"w[0]", "*", "a\\b", "a?"}) {
    EXPECT_THAT(evict_named({name})->names, ElementsAre(name));
    EXPECT_THAT(evict_named({name}), FailsWith(Errc::not_found)) << "and takes nothing else the second time";
  }
  EXPECT_THAT(listed(kAlice), ElementsAre("w0"));
}

TEST_F(StoreSelection, APatternIsAPattern) {
  for (const auto* name : {"*", "x1", "x2", "y1"}) put(kAlice, name);
  EXPECT_THAT(evict_matching({"x*", "?"})->names, ElementsAre("*", "x1", "x2"));
  EXPECT_THAT(evict_matching({"[a-z]1"}), FailsWith(Errc::not_found)) << "a bracket is a character";
  EXPECT_THAT(evict_matching({"y*", "z*"}), FailsWith(Errc::not_found)) << "all or none";
  EXPECT_THAT(listed(kAlice), ElementsAre("y1"));
}

TEST_F(StoreSelection, WhereNothingIsSaidANameComesFirst) {
  for (const auto* name : {"x1", "x[1]", "*", "a\\b"}) put(kAlice, name);
  EXPECT_THAT(evict(kAlice, {"*"})->names, ElementsAre("*"));
  EXPECT_THAT(evict(kAlice, {"x[1]"})->names, ElementsAre("x[1]"));
  EXPECT_THAT(evict(kAlice, {"a\\b"})->names, ElementsAre("a\\b"));
  EXPECT_THAT(evict(kAlice, {"*"})->names, ElementsAre("x1")) << "no array has that name any more: a pattern";
}

TEST_F(StoreSelection, TellsWhatAPatternPassedOver) {
  for (const auto* name : {"a1", "a2", "b"}) put(kAlice, name);
  ASSERT_THAT(pin(kAlice, {"a1"}), Succeeds());
  const auto evicted = evict_matching({"a*"});
  EXPECT_THAT(evicted->names, ElementsAre("a2"));
  EXPECT_THAT(evicted->passed_over, ElementsAre("a1"));
  EXPECT_THAT(evict_named({"b"})->passed_over, IsEmpty());
}

TEST_F(StoreSelection, WhatWasFoundMayBeGoneWhenItsTurnComes) {
  for (const auto* name : {"a1", "a2", "a3"}) put(kAlice, name);
  auto selection = matching({"a*"});
  ASSERT_EQ(store_->search(kAlice, selection), true);
  ASSERT_THAT(evict_named({"a1"}), Succeeds());
  const ArrayId replaced = put(kAlice, "a2", {.replace = true});
  EXPECT_THAT(evict(kAlice, selection)->names, ElementsAre("a3"));
  EXPECT_TRUE(exists(replaced));
}

TEST_F(StoreSelection, NoSliceOfASearchTakesLong) {
  put_long_names(64);
  auto selection = matching(slow_patterns());
  const std::uint64_t most =
      kSliceSteps + 64 * std::uint64_t{20'000};  // glob_test.cpp: what one pattern takes at most
  int slices = 0;
  for (bool is_over = false; !is_over; ++slices) {
    const std::uint64_t before = selection.steps;
    is_over = *store_->search(kAlice, selection);
    EXPECT_LE(selection.steps - before, most);
  }
  EXPECT_GT(slices, 10);
  EXPECT_THAT(evict(kAlice, selection), FailsWith(Errc::not_found));
}

TEST_F(StoreSelection, ASearchThatTakesTooLongIsRefused) {
  put_long_names(400);
  auto selection = matching(slow_patterns());
  Result<bool> is_over = false;
  while (is_over && !*is_over) is_over = store_->search(kAlice, selection);
  EXPECT_THAT(is_over, FailsWith(Errc::invalid_argument));
  EXPECT_LE(selection.steps, kRequestSteps + kSliceSteps + 64 * std::uint64_t{20'000});
}

TEST_F(StoreSelection, ListsPageByPageInTheOrderOfIds) {
  for (const auto* name : {"a1", "b", "a2", "a3"}) put(kAlice, name);
  put(kMate, "a4");
  const NameFilter filter{.pattern = *Glob::parse("a*")};
  const auto page = store_->list(kAlice, filter, 0, 2);
  EXPECT_THAT(names_of(page), ElementsAre("a1", "a2"));
  EXPECT_EQ(page.next, page.entries.back()->id);
  const auto rest = store_->list(kAlice, filter, page.next, 2);
  EXPECT_THAT(names_of(rest), ElementsAre("a3"));
  EXPECT_EQ(rest.next, 0U);
}

TEST_F(StoreSelection, ListsTheVersionsOfOneName) {
  put(kAlice, "w0");
  const ArrayId first = put(kAlice, "w[0]");
  attach(kAlice2, "w[0]");
  const ArrayId second = put(kAlice, "w[0]", {.replace = true});
  const NameFilter filter{.name = "w[0]"};
  const auto page = store_->list(kAlice, filter, 0, 1);
  ASSERT_EQ(page.entries.size(), 1U);
  EXPECT_EQ(page.entries.front()->id, first);
  EXPECT_EQ(store_->list(kAlice, filter, page.next, 1).entries.front()->id, second);
  EXPECT_THAT(store_->list(kStranger, filter, 0, 10).entries, IsEmpty());
  EXPECT_THAT(store_->list(kAlice, {.name = "*"}, 0, 10).entries, IsEmpty());
}

TEST_F(StoreSelection, APageThatFindsNothingInItsTimeIsNotTheLast) {
  put_long_names(64);
  put(kAlice, "last");
  const NameFilter slow{.pattern = *Glob::parse("*" + std::string(125, 'a') + "b*")};
  const auto page = store_->list(kAlice, slow, 0, 10);
  EXPECT_THAT(page.entries, IsEmpty());
  EXPECT_NE(page.next, 0U);
  int pages = 1;
  for (ArrayId next = page.next; next != 0; ++pages) next = store_->list(kAlice, slow, next, 10).next;
  EXPECT_GT(pages, 2);
}

}  // namespace
}  // namespace cowmgr
