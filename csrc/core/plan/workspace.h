// The one scratch buffer of a call, and where its parts lie in it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// The shape of what a map of a bias writes, contiguous int32: cells (rows of tiles of 64 queries,
// tiles of 64 keys), or a list for each query tile or key block (kernels/sm90/bias.py). Where all
// queries have the same row of the bias, there is one row of cells, and one list for query tiles.
struct MapShape {
  int64_t batch = 0, heads = 0, rows = 0, columns = 0;
};

MapShape cells_shape(const Problem& problem);
// `map` is a row of Kernel::map_queries or Kernel::map_keys.
MapShape lists_shape(const Problem& problem, const Kernel& map);

// Offsets are in bytes. Fields are the backward's, but for those that a bias brings and the last
// two. Everything from `zeroed` on must be zero before the launch. dQ is written last: until then
// it holds lse_log2 and delta where it has room for them. A backward in two passes has delta, in
// the shape of logsumexp, and what a bias brings.
struct Workspace {
  // Rows a head (and a sequence, when dense) of lse_log2, delta and dq_accum: whole tiles.
  int64_t rows_q = 0;
  int64_t rows_k = 0;          // the same of dk_accum and dv_accum
  bool numbers_in_dq = false;  // lse_log2 and delta are offsets into dQ
  int64_t lse_log2 = 0;        // fp32 [batch,] heads, rows_q
  int64_t delta = 0;           // fp32 [batch,] heads, rows_q
  int64_t dq_accum = 0;        // fp32 [batch,] heads, rows_q * bucket
  int64_t dk_accum = 0;        // fp32 [batch,] heads_kv, rows_k * bucket; GQA only, like dv_accum
  int64_t dv_accum = 0;        // fp32 [batch,] heads_kv, rows_k * value's bucket
  // int32 batch, heads, query tiles, CTAs of a cluster; deterministic only, like the next two
  int64_t dq_semaphore = 0;
  int64_t dk_semaphore = 0;  // int32 batch, heads_kv, key blocks, 2; GQA only
  int64_t dv_semaphore = 0;
  int64_t tiles_q = 0, tiles_k = 0, cluster = 1;  // shapes of the semaphores
  int64_t cells = 0;    // of the kernels with a bias alone, like the next two
  int64_t lists_q = 0;  // a list for each query tile
  int64_t lists_k = 0;  // a list for each key block; backward only
  int64_t zeroed = 0;
  int64_t bytes = 0;  // a persistent varlen forward has the counter of its tiles, one int32
};

Workspace workspace_of(const Problem& problem, const Kernel& kernel);

// The reason why a kernel cannot run with this workspace; none where it can.
std::optional<std::string> exceeds_limits(const Workspace& workspace, const Problem& problem,
                                          const Kernel& kernel);

}  // namespace fa4
