// Arrays that are made and sealed for whoever asks: as arrays of their own, or for the slots of a set.
#pragma once

#include "daemon/requests/call.hpp"

namespace cowmgr {

[[nodiscard]] Offset<wire::ArrayInfo> pack_array(Call& call, const ArrayRecord& record);

// Why memory that the capacity had room for could not be backed: `error`, or that something else fills the
// file system that the segments lie in.
[[nodiscard]] tl::unexpected<Error> not_backed(const Core& core, std::uint64_t size_bytes,
                                               const Error& error);

// An array being written, backed by memory.
[[nodiscard]] asio::awaitable<Result<const ArrayRecord*>> make_array(Call& call,
                                                                     const CreateRequest& request);
// The reply to who shall write it; whoever calls this notes the grant.
[[nodiscard]] Reply created_reply(Call& call, const ArrayRecord& record);
// Seals what the session `writer` writes, waiting a moment for the kernel to forget a mapping that was just
// given up. Errors: as Store::seal, and still_writable, which names who can write.
[[nodiscard]] asio::awaitable<Result<void>> seal(Call& call, SessionId writer, ArrayId id, bool keep_view,
                                                 std::uint64_t checksum = 0);

}  // namespace cowmgr
