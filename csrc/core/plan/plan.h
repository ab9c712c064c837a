// Which kernel a call gets, or why it gets none. The answer is a function of the problem alone and
// takes no CUDA call, so that it can be had without a GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernel_set.h"
#include "kernel_table.h"
#include "overrides.h"
#include "problem.h"
#include "tile_rules.h"
#include "tile_schedule.h"
#include "workspace.h"

namespace fa4 {

struct Plan {
  const Kernel* kernel = nullptr;
  // There is no kernel because there are no queries, or no keys. Results are zero, logsumexp is
  // minus infinity.
  bool nothing_to_compute = false;
  int32_t window_size_left = kUnbounded;
  int32_t window_size_right = kUnbounded;
  // Decode: CTAs that share the keys of a head. Backward in two passes: those that share the query
  // tiles of a key block in the second.
  int32_t splits = 1;
  int32_t heads_together = 1;  // backward of groups: key/value heads in work at a time
  TileSchedule schedule;       // of a persistent kernel
  Workspace workspace;
  bool stock_is_faster = false;       // the call is left to the stock kernel for this reason alone
  std::optional<std::string> reason;  // why the call is not supported, in words for the user

  bool supported() const { return kernel || nothing_to_compute; }
  const char* name() const { return kernel ? kernel->name : ""; }
  // The rows of queries and of keys in the kernel's tile; 0 when the call is not supported.
  int64_t tile_q() const { return kernel ? kernel->block_m : 0; }
  int64_t tile_k() const { return kernel ? kernel->block_n : 0; }
};

// With `speed_rules` the planner turns down what our kernels can run but the stock kernel runs
// faster (speed_rules.h). `tile_rules` say which of the build's tiles are faster than the default
// (tile_rules.h). The `disabled` kernels run nothing.
Plan plan(const Problem& problem, bool speed_rules = true, const Overrides& overrides = {},
          const std::vector<TileRule>& tile_rules = kTileRules, const KernelSet& disabled = {});

}  // namespace fa4
