#include "backward_splits.h"

#include "../integers.h"

namespace fa4 {
namespace {

constexpr int64_t kMostSplits = 8;  // Every GPU holds clusters of 8 CTAs.
// A CTA has at least this many query tiles. Its sums pass through shared memory once more, which
// takes about as long as one of them (computed).
constexpr int64_t kFewestTiles = 4;

}  // namespace

int32_t backward_splits(const Problem& p, const Kernel& kernel) {
  if (kernel.op != Op::kBackwardKeys || kernel.mask == Mask::kBias) return 1;
  const int64_t blocks = p.layout == Layout::kVarlen
                             ? bounded_sum(p.total_k / kernel.block_n, p.batch)
                             : bounded_product(p.batch, ceil_div(p.seqlen_k, kernel.block_n));
  const int64_t ctas = bounded_product(p.num_heads_kv, blocks);
  const int64_t tiles =
      bounded_product(p.num_heads / p.num_heads_kv, ceil_div(p.seqlen_q, kernel.block_m));
  // Clusters of powers of two leave fewer SMs of a GPC idle.
  int64_t splits = 1;
  while (splits < kMostSplits && bounded_product(2 * splits, ctas) <= sm_count(p) &&
         tiles >= 2 * splits * kFewestTiles)
    splits *= 2;
  return static_cast<int32_t>(splits);
}

}  // namespace fa4
