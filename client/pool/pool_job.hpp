// How a pool's owner tells its workers what to do: the job of a result set (ResultSet::job()).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cowmgr/pool_task.hpp"

namespace cowmgr::detail {

// Names the pool's queue to a worker that is another program.
inline constexpr const char* kQueueVariable = "COWMGR_POOL";
// Longer ones lie in an array; with the rest of the job they must fit into kMaxJobBytes.
inline constexpr std::size_t kMaxInlineArguments = std::size_t{48} << 10;

// The job, as text for cereal.
struct JobText {
  std::string task{};  // its name; or empty, and the addresses of it in a fork of the owner
  std::uint64_t thunk = 0;
  std::uint64_t function = 0;
  std::uint64_t input_id = 0;      // of the array whose rows are split; 0: none
  std::uint64_t arguments_id = 0;  // of the array that holds the arguments; 0: they are here
  std::string arguments{};         // as join_packs() joins them

  template <class Archive>
  void serialize(Archive& archive) {
    archive(task, thunk, function, input_id, arguments_id, arguments);
  }
};

[[nodiscard]] JobText text_of(const TaskCode& task);

// Several packs of arguments as one: u64 how many, u64 the end of each, and the packs.
[[nodiscard]] std::string join_packs(const std::vector<std::string>& packs);
// One of them; the only one, whatever the index, if there is but one. Errors: corrupted.
[[nodiscard]] Result<std::span<const std::byte>> pack_at(std::span<const std::byte> joined,
                                                         std::uint64_t index);

// The life of a worker: takes sets from the queue, does their slots, until the daemon is gone. `tasks`: those
// that it knows by name. `daemon_user`: as ConnectOptions has it. `say_robbed`: called before the process
// exits with kRobbed, since a task closed its descriptors.
void work_for_pool(const std::string& socket, const std::string& daemon_user, const std::string& queue,
                   const std::vector<TaskCode>& tasks, const std::function<void()>& say_robbed);

}  // namespace cowmgr::detail
