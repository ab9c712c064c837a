#include "workspace.h"

#include <algorithm>
#include <limits>

#include "../error.h"
#include "../integers.h"

namespace fa4 {
namespace {

constexpr int64_t kAlign = 256;  // bytes, as an allocation of its own would have

// A sequence's rows start at a multiple of the tile, so every sequence can need one tile more than
// its share.
int64_t padded_rows(const Problem& p, int64_t total, int64_t seqlen, int64_t tile) {
  const int64_t rows =
      p.layout == Layout::kVarlen ? bounded_sum(total, bounded_product(p.batch, tile)) : seqlen;
  return round_up(rows, tile);
}

Workspace two_pass_workspace(const Problem& p) {
  Workspace w;
  const int64_t batch = p.layout == Layout::kDense ? p.batch : 1;
  w.bytes = w.zeroed = round_up(bounded_product(4, batch, p.num_heads, lse_rows(p)), kAlign);
  return w;
}

Workspace one_pass_workspace(const Problem& p, const Kernel& kernel) {
  Workspace w;
  int64_t end = 0;
  const auto take = [&end](auto... sizes) {  // elements of four bytes
    const int64_t begin = end;
    end = round_up(bounded_sum(end, bounded_product(4, sizes...)), kAlign);
    return begin;
  };
  const bool varlen = p.layout == Layout::kVarlen, grouped = kernel.grouped;
  const int64_t batch = p.layout == Layout::kDense ? p.batch : 1;
  w.cluster = kernel.two_cta ? 2 : 1;
  w.rows_q = padded_rows(p, p.total_q, p.seqlen_q, kernel.block_m);
  w.rows_k = padded_rows(p, p.total_k, p.seqlen_k, kernel.block_n * w.cluster);
  // The kernel goes by cu_seqlens. If the caller's max_q or max_k is too small, semaphores sized by
  // it would have too few entries, and tiles would use those of another head.
  w.tiles_q = ceil_div(varlen ? p.total_q : p.seqlen_q, kernel.block_m);
  w.tiles_k = round_up(ceil_div(varlen ? p.total_k : p.seqlen_k, kernel.block_n), w.cluster);
  w.lse_log2 = take(batch, p.num_heads, w.rows_q);
  w.delta = take(batch, p.num_heads, w.rows_q);
  const int64_t numbers_end =
      bounded_sum(w.delta, bounded_product(4, batch, p.num_heads, w.rows_q));
  w.numbers_in_dq =
      numbers_end <= bounded_product(kElementBytes, p.total_q, p.num_heads, p.head_dim);
  if (w.numbers_in_dq) end = 0;
  w.dq_accum = take(batch, p.num_heads, w.rows_q, kernel.head_dim);
  w.zeroed = end;
  if (grouped) w.dk_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim);
  if (grouped) w.dv_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim_v);
  if (kernel.deterministic) w.dq_semaphore = take(p.batch, p.num_heads, w.tiles_q, w.cluster);
  if (kernel.deterministic && grouped) w.dk_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  if (kernel.deterministic && grouped) w.dv_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  w.bytes = end;
  return w;
}

}  // namespace

Workspace backward_workspace(const Problem& p, const Kernel& kernel) {
  return kernel.op == Op::kBackwardKeys ? two_pass_workspace(p) : one_pass_workspace(p, kernel);
}

std::optional<std::string> exceeds_limits(const Workspace& w, const Problem& p,
                                          const Kernel& kernel) {
  // The kernels index an accumulator's row in int32.
  const int64_t most_elements =
      bounded_product(std::max(w.rows_q, w.rows_k), std::max(kernel.head_dim, kernel.head_dim_v));
  if (most_elements > std::numeric_limits<int32_t>::max()) {
    return concat("an accumulator has 2^31 elements or more a head: ",
                  std::max(p.total_q, p.total_k), " rows");
  }
  if (w.bytes >= kBound) {
    return concat("the backward's workspace must have less than 2^62 bytes, has more for ", p.batch,
                  " sequences of ", p.num_heads, " heads");
  }
  return std::nullopt;
}

}  // namespace fa4
