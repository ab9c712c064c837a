#include "backward_groups.h"

#include "../integers.h"

namespace fa4 {
namespace {

// Measured on an H200: 16k queries in sequences of 512 to 8,192, four and eight query heads to each
// key/value head (docs/kernels-sm90-experiments.md). Speeds are over the other kernel's.
constexpr int64_t kFewestRows = 512;
// Up to so many queries of head dim 64 (where the other kernel works on 128 of them at a time) and
// 128: 1.02 to 1.19 and 1.07 to 1.28 where nothing is masked, 1.03 to 1.26 and 1.05 to 1.21 under a
// causal mask. The next measured were 0.86 to 0.98, and 0.92 and 0.96.
constexpr int64_t kMostQueries64 = 1024, kMostQueries128 = 2048;
constexpr int64_t kMostCausalQueries64 = 2048, kMostCausalQueries128 = 8192;
// The last wave of key blocks that cost the same leaves at most so much of the SMs idle, in per
// cent of the time without.
constexpr int64_t kMostOfWhole = 110;
// Under a causal mask the first key block of a head costs as much as two on average. There are
// enough others to fill the SMs beside it; measured with 3.9 waves.
constexpr int64_t kFewestCausalWaves = 3;
// Causal key blocks of one wave must find the queries of their groups in L2. At head dim 128 with
// eight heads they do not: 0.72 to 1.00. This is the ratio of heads times the head dim.
constexpr int64_t kWidestCausalGroup = 512;

bool fills_waves(const Problem& p, const Kernel& groups) {
  const int64_t tiles =
      bounded_product(p.batch, p.num_heads_kv, ceil_div(p.seqlen_k, groups.block_n));
  if (groups.mask == Mask::kFull)
    return bounded_product(100, round_up(tiles, sm_count(p))) <=
           bounded_product(kMostOfWhole, tiles);
  return tiles >= kFewestCausalWaves * sm_count(p) &&
         bounded_product(p.num_heads / p.num_heads_kv, groups.head_dim) <= kWidestCausalGroup;
}

}  // namespace

bool groups_are_faster(const Problem& p, const Kernel& groups) {
  const bool causal = groups.mask == Mask::kCausalBottomRight;
  const int64_t most_64 = causal ? kMostCausalQueries64 : kMostQueries64,
                most_128 = causal ? kMostCausalQueries128 : kMostQueries128,
                most = groups.head_dim == 64 ? most_64 : most_128;
  return p.seqlen_q >= kFewestRows && p.seqlen_q <= most && p.seqlen_k >= kFewestRows &&
         fills_waves(p, groups);
}

}  // namespace fa4
