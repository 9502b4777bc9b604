// Jobs over many processes: pools and result sets against the same work by hand, and against multiprocessing.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cowmgr/cowmgr.hpp"
#include "cowmgr/pool.hpp"
#include "tests/bench/bench.hpp"
#include "tests/bench/gang.hpp"
#include "tests/bench/report.hpp"

namespace cowmgr::bench {

class HandedOutNumbers;

// All that is set up before the first benchmark, while this process is small.
class Jobs {
 public:
  Jobs(const EmbeddedDaemon& daemon, const Client& client);
  ~Jobs();
  Jobs(const Jobs&) = delete;
  Jobs& operator=(const Jobs&) = delete;

  void add_benchmarks(const Plan& plan);
  static void add_ratios(Reporter& reporter);

 private:
  // Many tiny tasks, by as many workers, in three ways.
  struct Tasks {
    std::unique_ptr<HandedOutNumbers> server;
    std::unique_ptr<Gang> by_hand;
    std::unique_ptr<Gang> one_by_one;
    std::unique_ptr<Gang> in_batches;
  };
  [[nodiscard]] static Tasks make_tasks(const EmbeddedDaemon& daemon, std::size_t workers);
  void add_tasks(const Plan& plan, const Tasks& tasks);
  void add_large_jobs(const Plan& plan);

  Client client_;
  std::vector<Tasks> tasks_;
  Pool pool_;
  Array input_;
};

}  // namespace cowmgr::bench
