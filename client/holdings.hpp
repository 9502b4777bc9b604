// What the daemon counts as this process's, for the case that another daemon takes its place: that one is
// told all of it (README.md of proto/, "Sessions"), and takes back what this process never heard of.
//
// Not synchronised: the connection's mutex guards it.
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

struct Holdings {
  std::unordered_map<std::uint64_t, std::uint32_t> views;  // how many, by array
  std::map<std::uint64_t, WritingRequest> writing;
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> slots;  // attempt; by set and slot

  // Calls `send` with the tables of the requests that say all this, each small enough for a frame. Each is
  // made with a builder from `builder`. Stops at the first error, which it returns.
  [[nodiscard]] Result<void> tell(const std::function<Builder&()>& builder,
                                  const std::function<Result<void>(Offset<wire::Hold>)>& send) const;
};

}  // namespace cowmgr::detail
