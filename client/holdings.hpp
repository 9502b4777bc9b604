// What the daemon counts as this process's, for the case that another daemon takes its place: that one is
// told all of it (README.md of proto/, "Sessions"), and takes back what this process never heard of.
//
// 1. A view is counted as often as it was kept, less as often as it was forgotten; one that is not held is
//    forgotten without effect.
// 2. keep() keeps all that was granted, or nothing.
//
// Not synchronised: pool_mutex() guards it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "client/channel.hpp"
#include "client/grants.hpp"
#include "cowmgr/client.hpp"

namespace cowmgr::detail {

// Name, dtype and shape of a request.
struct WireSpec {
  Offset<flatbuffers::String> name;
  Offset<flatbuffers::String> dtype;
  Offset<flatbuffers::Vector<std::uint64_t>> shape;
};
[[nodiscard]] WireSpec pack_spec(Builder& builder, std::string_view name, const ArraySpec& spec);

// What an array that is being written was asked for with.
struct WritingRequest {
  std::string name;
  ArraySpec spec;
  CreateOptions options;
};
[[nodiscard]] Offset<wire::MakeArray> pack(Builder& builder, const WritingRequest& request);

class Holdings {
 public:
  // What was granted is held from now on, and no longer granted; an array to be written was asked for with
  // `writing`. Throws bad_alloc.
  void keep(Grants& granted, const WritingRequest* writing);
  void forget_view(std::uint64_t id) noexcept;
  void forget_writing(std::uint64_t id) noexcept;
  void forget_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept;
  // How many arrays in writing, and slots, were forgotten so far: a daemon that was told of them is told
  // again.
  [[nodiscard]] std::uint64_t ends() const noexcept { return ends_; }

  // Calls `send` with the tables of the requests that say all this, each small enough for a frame. Each is
  // made with a builder from `builder`. Stops at the first error, which it returns.
  [[nodiscard]] Result<void> tell(const std::function<Builder&()>& builder,
                                  const std::function<Result<void>(Offset<wire::Hold>)>& send) const;

 private:
  void drop_slot(std::uint64_t set, std::uint64_t slot, std::uint32_t attempt) noexcept;

  std::unordered_map<std::uint64_t, std::uint32_t> views_;  // how many, by array
  std::map<std::uint64_t, WritingRequest> writing_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> slots_;  // attempt; by set and slot
  std::uint64_t ends_ = 0;
};

}  // namespace cowmgr::detail
