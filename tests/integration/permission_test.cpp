// What one user may do with another's arrays. Needs root, who alone can become somebody else.
#include <grp.h>
#include <iostream>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

constexpr uid_t kNobody = 65534;

class Permissions : public DaemonTest {
 protected:
  // Runs `script` as the user nobody, with a client of its own. True when it fulfilled all its expectations.
  [[nodiscard]] bool as_nobody(const std::function<void(const Client&)>& script) const {
    Child other([&](const Link&) {
      ASSERT_EQ(::setgroups(0, nullptr), 0);
      ASSERT_EQ(::setgid(kNobody), 0);
      ASSERT_EQ(::setuid(kNobody), 0);
      script(connect());
    });
    return other.wait() == 0;
  }
  [[nodiscard]] static bool can_become_others() {
    if (::geteuid() == 0) return true;
    std::cout << "only root can become another user: nothing is tested here\n";
    return false;
  }
  [[nodiscard]] static Result<Array> put(const Client& client, const std::string& name, std::uint32_t mode,
                                         bool replace = false) {
    return client.put(name, {Dtype::of<std::uint8_t>(), {10}}, pattern_bytes(10),
                      {.replace = replace, .mode = mode});
  }
};

TEST_F(Permissions, OfAnArrayAreThoseOfAFile) {
  if (!can_become_others()) return;
  const Client client = connect();
  const auto secret = put(client, "secret", 0600);
  const auto shown = put(client, "shown", 0644);
  const auto open = put(client, "open", 0666);
  EXPECT_TRUE(as_nobody([](const Client& other) {
    EXPECT_THAT(other.attach("secret"), FailsWith(Errc::permission_denied));
    EXPECT_THAT(other.stat("secret"), FailsWith(Errc::permission_denied));
    EXPECT_THAT(put(other, "secret", 0600, true), FailsWith(Errc::permission_denied));
    const std::vector<std::string> both = {"shown", "secret"};
    EXPECT_THAT(other.attach(both), FailsWith(Errc::permission_denied)) << "all or none";
    EXPECT_EQ(other.list()->size(), 2U) << "what may not be read is not shown";

    EXPECT_THAT(other.attach("shown"), Succeeds());
    const std::vector<std::string> shown_name = {"shown"};
    EXPECT_THAT(other.evict(shown_name), FailsWith(Errc::permission_denied));
    EXPECT_THAT(other.pin(shown_name), FailsWith(Errc::permission_denied));
    EXPECT_THAT(put(other, "shown", 0600, true), FailsWith(Errc::permission_denied));

    EXPECT_THAT(*other.pin_matching("*"), testing::ElementsAre("open")) << "a pattern takes what it may";
    EXPECT_THAT(other.pin_matching("*", false), Succeeds());
    EXPECT_THAT(put(other, "open", 0600, true), Succeeds());
    EXPECT_THAT(other.evict_matching("*")->names, testing::ElementsAre("open"));
    EXPECT_THAT(other.evict_lru(1ULL << 40U)->names, testing::IsEmpty());
    EXPECT_THAT(other.shutdown(), FailsWith(Errc::permission_denied));
  }));
  EXPECT_THAT(client.attach("secret"), Succeeds());
}

TEST_F(Permissions, OfAResultSetAreThoseOfAFile) {
  if (!can_become_others()) return;
  const Client client = connect();
  const ArraySpec spec{Dtype::of<std::uint8_t>(), {10}};
  auto secret = client.create_results("secret", spec, 2);
  auto shown = client.create_results("shown", spec, 2, {.mode = 0644});
  auto open = client.create_results("open", spec, 1, {.mode = 0666});
  EXPECT_TRUE(as_nobody([](const Client& other) {
    EXPECT_THAT(other.open_results("secret"), FailsWith(Errc::permission_denied));
    auto set = other.open_results("shown");
    ASSERT_THAT(set, Succeeds());
    EXPECT_THAT(set->lease(), FailsWith(Errc::permission_denied));
    EXPECT_THAT(set->lease_slot(0), FailsWith(Errc::permission_denied));
    auto slot = other.open_results("open")->lease();
    ASSERT_THAT(slot, Succeeds());
    EXPECT_THAT((*slot)->commit(), Succeeds());
  }));
  EXPECT_THAT(open->wait(), Succeeds());
}

TEST_F(Permissions, OfASegmentLetNoOtherUserOpenIt) {
  if (!can_become_others()) return;
  const Client client = connect();
  const auto array = put(client, "a", 0666);
  const std::string path = "/dev/shm" + client.stat("a")->array.segment;
  EXPECT_TRUE(as_nobody([&](const Client& other) {
    EXPECT_THAT(other.attach("a"), Succeeds());
    EXPECT_NE(::access(path.c_str(), R_OK), 0);
    EXPECT_NE(::access(path.c_str(), W_OK), 0);
    EXPECT_EQ(other.stat("a")->array.protection, Protection::verified)
        << "the owner is the daemon's own user";
    const auto own = put(other, "own", 0600);
    EXPECT_EQ(other.stat("own")->array.protection, Protection::enforced);
  }));
}

}  // namespace
}  // namespace cowmgr::test
