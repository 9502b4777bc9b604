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
  // Somebody who waits under `key`, and counts how often it was woken.
  struct Waiter {
    Waiter(WaitListTest& test, const std::string& key)
        : timer(test.io_, asio::steady_timer::time_point::max()),
          entry(std::in_place, test.list_, key, timer) {
      timer.async_wait([this](const boost::system::error_code& error) {
        wakes += error == asio::error::operation_aborted;
      });
    }
    asio::steady_timer timer;
    std::optional<WaitList::Entry> entry;
    int wakes = 0;
  };

  void wake(const std::string& key) {
    list_.wake(key);
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

TEST(CoreKeys, DifferForWhatDiffers) {
  EXPECT_NE(Core::array_key("set 1"), Core::set_key(1));
  EXPECT_NE(Core::array_key("x"), Core::array_key("x "));
  EXPECT_NE(Core::array_key("reclaimed"), Core::reclaim_key());
}

}  // namespace
}  // namespace cowmgr
