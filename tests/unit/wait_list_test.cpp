#include <optional>
#include <string>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <gtest/gtest.h>

#include "daemon/core.hpp"

namespace cowmgr {
namespace {

class WaitListTest : public testing::Test {
 protected:
  static WaitKey key_of(const std::string& name) { return {WaitKey::Topic::array_name, 0, name}; }

  // Somebody who waits for the array `name`, and counts how often it was woken.
  struct Waiter {
    Waiter(WaitListTest& test, const std::string& name)
        : timer(test.io_, asio::steady_timer::time_point::max()),
          entry(std::in_place, test.list_, key_of(name), timer) {
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
    io_.restart();
    io_.poll();
  }

  asio::io_context io_;
  WaitList list_;
};

TEST_F(WaitListTest, WakesAllOfOneKeyAndNobodyElse) {
  Waiter first(*this, "a");
  Waiter second(*this, "a");
  Waiter other(*this, "ab");
  wake("a");
  EXPECT_EQ(first.wakes, 1);
  EXPECT_EQ(second.wakes, 1);
  EXPECT_EQ(other.wakes, 0);
  wake("ab");
  EXPECT_EQ(other.wakes, 1);
}

TEST_F(WaitListTest, WakingNobodyIsFine) {
  Waiter waiter(*this, "a");
  wake("b");
  EXPECT_EQ(waiter.wakes, 0);
}

TEST_F(WaitListTest, WhoIsGoneIsNotWoken) {
  Waiter stays(*this, "a");
  Waiter goes(*this, "a");
  goes.entry.reset();
  wake("a");
  EXPECT_EQ(stays.wakes, 1);
  EXPECT_EQ(goes.wakes, 0);
}

TEST_F(WaitListTest, TellsTheTopicsOfOneSetApart) {
  asio::steady_timer timer(io_, asio::steady_timer::time_point::max());
  int wakes = 0;
  timer.async_wait([&](const boost::system::error_code&) { ++wakes; });
  const WaitList::Entry entry(list_, {WaitKey::Topic::slot_free, 7}, timer);
  for (const WaitKey& key : {WaitKey{WaitKey::Topic::slot_settled, 7}, WaitKey{WaitKey::Topic::slot_free, 8},
                             WaitKey{WaitKey::Topic::array_name, 0, "7"}}) {
    list_.wake(key);
    io_.restart();
    io_.poll();
    EXPECT_EQ(wakes, 0);
  }
  list_.wake({WaitKey::Topic::slot_free, 7});
  io_.restart();
  io_.poll();
  EXPECT_EQ(wakes, 1);
}

}  // namespace
}  // namespace cowmgr
