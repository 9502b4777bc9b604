#include <optional>
#include <string>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "daemon/core/waits.hpp"

namespace cowmgr {
namespace {

class WaitListTest : public testing::Test {
 protected:
  static WaitKey key_of(const std::string& name) { return {WaitKey::Topic::array_name, 0, name}; }

  // Somebody who waits for the array `name`, and counts how often it was woken.
  struct Waiter {
    Waiter(WaitListTest& test, const std::string& name, WaitList::Rank rank)
        : timer(test.io_, asio::steady_timer::time_point::max()),
          entry(std::in_place, test.list_, key_of(name), rank, timer) {
      timer.async_wait([this](const boost::system::error_code& error) {
        wakes += error == asio::error::operation_aborted;
      });
    }
    asio::steady_timer timer;
    std::optional<WaitList::Entry> entry;
    int wakes = 0;
  };

  void wake(const std::string& name) {
    list_.wake(key_of(name));
    run();
  }
  void run() {
    io_.restart();
    io_.poll();
  }

  asio::io_context io_;
  WaitList list_;
};

TEST_F(WaitListTest, WakesAllOfOneKeyAndNobodyElse) {
  Waiter first(*this, "a", list_.draw());
  Waiter second(*this, "a", list_.draw());
  Waiter other(*this, "ab", list_.draw());
  wake("a");
  EXPECT_EQ(first.wakes, 1);
  EXPECT_EQ(second.wakes, 1);
  EXPECT_EQ(other.wakes, 0);
  wake("ab");
  EXPECT_EQ(other.wakes, 1);
}

TEST_F(WaitListTest, WakingNobodyIsFine) {
  Waiter waiter(*this, "a", list_.draw());
  wake("b");
  EXPECT_EQ(waiter.wakes, 0);
}

TEST_F(WaitListTest, WhoIsGoneIsNotWoken) {
  Waiter stays(*this, "a", list_.draw());
  Waiter goes(*this, "a", list_.draw());
  goes.entry.reset();
  wake("a");
  EXPECT_EQ(stays.wakes, 1);
  EXPECT_EQ(goes.wakes, 0);
}

TEST_F(WaitListTest, WakesThoseFirstThatWaitLongest) {
  const WaitList::Rank place = list_.draw();
  Waiter second(*this, "a", list_.draw());
  Waiter third(*this, "a", list_.draw());
  Waiter first(*this, "a", place);  // it was there before, and waits once more
  list_.wake_first(key_of("a"), 2);
  run();
  EXPECT_EQ(first.wakes, 1);
  EXPECT_EQ(second.wakes, 1);
  EXPECT_EQ(third.wakes, 0);
  EXPECT_FALSE(list_.has_left());
  first.entry.reset();
  EXPECT_THAT(list_.take_left(), testing::ElementsAre(key_of("a"))) << "it may not have taken its part";
  EXPECT_FALSE(list_.has_left());
  third.entry.reset();
  EXPECT_FALSE(list_.has_left()) << "nobody had woken it";
}

TEST_F(WaitListTest, WakesThoseThatCountedToLess) {
  Waiter to_three(*this, "a", 3);
  Waiter to_four(*this, "a", 4);
  list_.wake_below(key_of("a"), 4);
  run();
  EXPECT_EQ(to_three.wakes, 1);
  EXPECT_EQ(to_four.wakes, 0);
}

TEST_F(WaitListTest, TellsTheTopicsOfOneSetApart) {
  asio::steady_timer timer(io_, asio::steady_timer::time_point::max());
  int wakes = 0;
  timer.async_wait([&](const boost::system::error_code&) { ++wakes; });
  const WaitList::Entry entry(list_, {WaitKey::Topic::slot_free, 7}, list_.draw(), timer);
  for (const WaitKey& key : {WaitKey{WaitKey::Topic::slot_settled, 7}, WaitKey{WaitKey::Topic::slot_free, 8},
                             WaitKey{WaitKey::Topic::array_name, 0, "7"}}) {
    list_.wake(key);
    run();
    EXPECT_EQ(wakes, 0);
  }
  list_.wake({WaitKey::Topic::slot_free, 7});
  run();
  EXPECT_EQ(wakes, 1);
}

}  // namespace
}  // namespace cowmgr
