#include "daemon/peer.hpp"

#include <string>

#include <gtest/gtest.h>

namespace cowmgr {
namespace {

constexpr uid_t kAdmin = 900;
constexpr gid_t kGroup = 50;

// "rw", "r-", "-w" or "--".
std::string rights(const Peer& peer, std::uint32_t mode) {
  const Ownership owned{.uid = 1000, .gid = kGroup, .mode = mode};
  std::string text = is_allowed(peer, owned, Right::read, kAdmin) ? "r" : "-";
  return text + (is_allowed(peer, owned, Right::write, kAdmin) ? "w" : "-");
}

const Peer kOwner{.pid = 1, .uid = 1000, .gid = 77};
const Peer kMember{.pid = 2, .uid = 1001, .gid = kGroup};
const Peer kSideMember{.pid = 3, .uid = 1001, .gid = 1001, .groups = {4, kGroup}};
const Peer kStranger{.pid = 4, .uid = 1002, .gid = 1002, .groups = {1000}};

TEST(Peer, EachClassHasItsOwnBits) {
  EXPECT_EQ(rights(kOwner, 0600), "rw");
  EXPECT_EQ(rights(kMember, 0600), "--");
  EXPECT_EQ(rights(kStranger, 0600), "--");
  EXPECT_EQ(rights(kOwner, 0462), "r-");
  EXPECT_EQ(rights(kMember, 0462), "rw");
  EXPECT_EQ(rights(kSideMember, 0462), "rw");
  EXPECT_EQ(rights(kStranger, 0462), "-w");
}

TEST(Peer, TheFirstClassThatFitsDecides) {
  EXPECT_EQ(rights(kOwner, 0066), "--");
  EXPECT_EQ(rights(kMember, 0606), "--");
  EXPECT_EQ(rights(kSideMember, 0606), "--");
  EXPECT_EQ(rights(kStranger, 0660), "--");
  const Peer owner_in_group{.uid = 1000, .gid = kGroup};
  EXPECT_EQ(rights(owner_in_group, 0060), "--");
}

TEST(Peer, ExecuteBitsMeanNothing) {
  EXPECT_EQ(rights(kOwner, 0111), "--");
  EXPECT_EQ(rights(kStranger, 0111), "--");
}

TEST(Peer, RootAndTheDaemonsUserMayDoEverything) {
  EXPECT_EQ(rights({.uid = 0}, 0000), "rw");
  EXPECT_EQ(rights({.uid = kAdmin, .gid = 5}, 0000), "rw");
  EXPECT_EQ(rights({.uid = 5, .gid = 0, .groups = {0, kAdmin}}, 0000), "--");  // a group is no user
}

}  // namespace
}  // namespace cowmgr
