// How much a reply may say: one budget for all whose length depends on what the peer asked. A reply that
// would be longer pages, cuts, or says how much more there is; no handler counts bytes by itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "daemon/requests/wire.hpp"
#include "proto/fd_socket.hpp"

namespace cowmgr {

inline constexpr std::size_t kReplyBytes = kMaxFrameBytes - 1024;  // the rest is for what holds the items
// One item of a list at most: a dtype may take 8 KiB, a reason 4 KiB, names and paths the rest (wire.cpp).
inline constexpr std::size_t kMaxItemBytes = std::size_t{24} << 10;

inline constexpr std::size_t kPageItems = 512;  // of one listing at most
[[nodiscard]] constexpr std::size_t page_limit(std::uint32_t asked) noexcept {
  return asked == 0 || asked > kPageItems ? kPageItems : asked;
}

// Bytes that the reply can still take.
[[nodiscard]] inline std::size_t room_of(const Builder& reply) noexcept {
  return reply.GetSize() < kReplyBytes ? kReplyBytes - reply.GetSize() : 0;
}

// A list of a reply, as much of it as fits.
template <class Item>
class Page {
 public:
  // `kept_bytes`: for what else the reply is to hold.
  explicit Page(const Builder& reply, std::size_t kept_bytes = 0) : reply_(&reply), kept_bytes_(kept_bytes) {}

  // Whether one more might not fit.
  [[nodiscard]] bool is_full() const noexcept {
    return room_of(*reply_) < items_.size() * sizeof(Offset<Item>) + kMaxItemBytes + kept_bytes_;
  }
  // An item that was just packed.
  void add(Offset<Item> item) { items_.push_back(item); }
  [[nodiscard]] const std::vector<Offset<Item>>& items() const noexcept { return items_; }
  [[nodiscard]] std::size_t size() const noexcept { return items_.size(); }
  [[nodiscard]] bool is_whole() const noexcept {
    return room_of(*reply_) >= items_.size() * sizeof(Offset<Item>);
  }

 private:
  const Builder* reply_;
  std::size_t kept_bytes_;
  std::vector<Offset<Item>> items_;
};

// Packs the entries of a listing, as many as fit. Returns after which id to ask for more; 0: there is no
// more.
template <class Item, class Record, class Pack>
[[nodiscard]] std::uint64_t add_all(Page<Item>& page, const Listing<Record>& listing, const Pack& pack) {
  for (const Record* record : listing.entries) {
    if (page.is_full()) break;
    page.add(pack(*record));
  }
  const bool is_whole = page.size() == listing.entries.size();
  return is_whole ? listing.next : listing.entries[page.size() - 1]->id;
}

}  // namespace cowmgr
