#include "workspace.h"

#include <algorithm>
#include <limits>

#include "../error.h"
#include "../integers.h"

namespace fa4 {
namespace {

constexpr int64_t kAlign = 256;  // bytes, as an allocation of its own would have

// kernels/sm90/bias.py has these, as CELL and HEADER.
constexpr int64_t kCell = 64;       // rows and columns of a bias that a cell tells of
constexpr int64_t kListHeader = 4;  // numbers before a list's entries

// A sequence's rows start at a multiple of the tile, so every sequence can need one tile more than
// its share.
int64_t padded_rows(const Problem& p, int64_t total, int64_t seqlen, int64_t tile) {
  const int64_t rows =
      p.layout == Layout::kVarlen ? bounded_sum(total, bounded_product(p.batch, tile)) : seqlen;
  return round_up(rows, tile);
}

// Puts one part of a workspace behind the other.
class Parts {
 public:
  template <class... Sizes>
  int64_t take(Sizes... sizes) {  // elements of four bytes
    const int64_t begin = end_;
    end_ = round_up(bounded_sum(end_, bounded_product(4, sizes...)), kAlign);
    return begin;
  }
  int64_t take(const MapShape& shape) {
    return take(shape.batch, shape.heads, shape.rows, shape.columns);
  }
  void start_again() { end_ = 0; }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

void take_maps(const Problem& p, const Kernel& kernel, Parts& parts, Workspace& w) {
  if (kernel.mask != Mask::kBias) return;
  w.cells = parts.take(cells_shape(p));
  w.lists_q = parts.take(lists_shape(p, kKernels[kernel.map_queries]));
  if (kernel.map_keys >= 0) w.lists_k = parts.take(lists_shape(p, kKernels[kernel.map_keys]));
}

Workspace forward_workspace(const Problem& p, const Kernel& kernel) {
  Workspace w;
  Parts parts;
  take_maps(p, kernel, parts, w);
  w.bytes = w.zeroed = parts.end();
  if (kernel.persistent && kernel.packed()) w.bytes = sizeof(int32_t);
  return w;
}

Workspace two_pass_workspace(const Problem& p, const Kernel& kernel) {
  Workspace w;
  Parts parts;
  const int64_t batch = p.layout == Layout::kDense ? p.batch : 1;
  w.delta = parts.take(batch, p.num_heads, lse_rows(p));
  take_maps(p, kernel, parts, w);
  w.bytes = w.zeroed = parts.end();
  return w;
}

Workspace one_pass_workspace(const Problem& p, const Kernel& kernel) {
  Workspace w;
  Parts parts;
  const auto take = [&parts](auto... sizes) { return parts.take(sizes...); };
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
  if (w.numbers_in_dq) parts.start_again();
  w.dq_accum = take(batch, p.num_heads, w.rows_q, kernel.head_dim);
  w.zeroed = parts.end();
  if (grouped) w.dk_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim);
  if (grouped) w.dv_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim_v);
  if (kernel.deterministic) w.dq_semaphore = take(p.batch, p.num_heads, w.tiles_q, w.cluster);
  if (kernel.deterministic && grouped) w.dk_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  if (kernel.deterministic && grouped) w.dv_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  w.bytes = parts.end();
  return w;
}

}  // namespace

MapShape cells_shape(const Problem& p) {
  const int64_t queries = p.bias_by_query ? p.seqlen_q : 1;
  return {p.bias_batch, p.bias_heads, ceil_div(queries, kCell), ceil_div(p.seqlen_k, kCell)};
}

MapShape lists_shape(const Problem& p, const Kernel& map) {
  const int64_t queries = ceil_div(p.seqlen_q, map.block_m),
                keys = ceil_div(p.seqlen_k, map.block_n);
  const bool by_queries = map.op == Op::kMapQueries;
  if (!by_queries) return {p.bias_batch, p.bias_heads, keys, kListHeader + queries};
  return {p.bias_batch, p.bias_heads, p.bias_by_query ? queries : 1, kListHeader + keys};
}

Workspace workspace_of(const Problem& p, const Kernel& kernel) {
  if (p.op == Op::kForward) return forward_workspace(p, kernel);
  return kernel.op == Op::kBackwardKeys ? two_pass_workspace(p, kernel)
                                        : one_pass_workspace(p, kernel);
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
  if (kernel.mask == Mask::kBias && p.bias_batch > std::numeric_limits<int32_t>::max())
    return concat("attn_bias must have less than 2^31 batch entries, has ", p.bias_batch);
  if (w.bytes >= kBound) {
    return concat("the ", p.op == Op::kForward ? "forward" : "backward",
                  "'s workspace must have less than 2^62 bytes, has more for ", p.batch,
                  " sequences of ", p.num_heads, " heads");
  }
  return std::nullopt;
}

}  // namespace fa4
