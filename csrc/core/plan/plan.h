// Which kernel a call gets, or why none: a function of the problem alone. No CUDA call, so that it
// runs without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "tile_rules.h"

namespace fa4 {

// Byte offsets into a call's one scratch buffer; all but the last two are the backward's.
// Everything from `zeroed` on must be zero before the launch. dQ, which is written last, holds
// lse_log2 and delta until then, where it has room for them.
struct Workspace {
  int64_t rows_q =
      0;  // rows a head (and a sequence, when dense) of lse_log2, delta and dq_accum: whole tiles
  int64_t rows_k = 0;          // the same of dk_accum and dv_accum
  bool numbers_in_dq = false;  // lse_log2 and delta are offsets into dQ
  int64_t lse_log2 = 0;        // fp32 [batch,] heads, rows_q
  int64_t delta = 0;           // fp32 [batch,] heads, rows_q
  int64_t dq_accum = 0;        // fp32 [batch,] heads, rows_q * bucket
  int64_t dk_accum =
      0;  // fp32 [batch,] heads_kv, rows_k * bucket; grouped heads only, like dv_accum
  int64_t dv_accum = 0;      // fp32 [batch,] heads_kv, rows_k * value's bucket
  int64_t dq_semaphore = 0;  // int32 batch, heads, tiles of q, CTAs of a cluster; deterministic
                             // only, like the next two
  int64_t dk_semaphore = 0;  // int32 batch, heads_kv, tiles of k, 2; grouped heads only
  int64_t dv_semaphore = 0;
  int64_t tiles_q = 0, tiles_k = 0, cluster = 1;  // shapes of the semaphores
  int64_t zeroed = 0;
  int64_t bytes = 0;  // a persistent varlen forward has the counter of its tiles, one int32
};

struct Plan {
  const Kernel* kernel = nullptr;
  bool nothing_to_compute = false;  // and no kernel: there are no queries, or no keys. Results are
                                    // zero, logsumexp minus infinity
  int32_t window_size_left = kUnbounded;
  int32_t window_size_right = kUnbounded;
  int32_t splits = 1;   // decode: thread blocks that share the keys of a head
  int32_t workers = 0;  // persistent: thread blocks
  int32_t paired =
      0;  // persistent and causal: heads, of all batch elements, whose tiles are dealt out in pairs
  Workspace workspace;
  bool stock_is_faster = false;  // not supported for this reason alone
  std::string reason;            // not supported: why, in words for the user

  bool supported() const { return kernel || nothing_to_compute; }
  const char* name() const { return kernel ? kernel->name : ""; }
  // Rows of queries and of keys in the kernel's tile; 0 when not supported.
  int64_t tile_q() const { return kernel ? kernel->block_m : 0; }
  int64_t tile_k() const { return kernel ? kernel->block_n : 0; }
};

// `speed_rules`: turn down what our kernels can run but the stock kernel runs faster
// (speed_rules.h). `tile_rules`: which of the build's tiles are faster than the default
// (tile_rules.h).
Plan plan(const Problem& problem, bool speed_rules = true,
          const std::vector<TileRule>& tile_rules = kTileRules);

}  // namespace fa4
