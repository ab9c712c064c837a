#include "backward_groups.h"

#include <algorithm>

#include "../integers.h"

namespace fa4 {
namespace {

// Measured on an H200: dense problems of 16k queries, packed ones of 2.5k to 262k, up to eight
// query heads to each key/value head (docs/kernels-sm90-experiments.md). A ratio is the other
// kernel's time over this one's.
// The shortest sequences that were measured: dense 1.49 and 1.58, packed, on average, 2.24 to 9.96.
constexpr int64_t kFewestRows = 128, kFewestPackedRows = 16;
// The longest sequences that were faster, of head dim 64 (where the other kernel works on 128
// queries at a time) and 128. Where nothing is masked 1.14 to 1.19 and 1.05 to 1.28; the next
// length that was measured 0.97 to 1.05 and 0.90 to 0.99. Under a causal mask, with up to four
// heads to a group, 1.03 to 1.12 and 1.03 to 1.07; the next 0.94 to 1.04 and 0.96 to 1.01.
constexpr int64_t kMostQueries64 = 512, kMostQueries128 = 1024;
constexpr int64_t kMostCausalQueries64 = 1536, kMostCausalQueries128 = 4096;
// Packed causal sequences are worked on from the first on, however long they are, so that long ones
// may come last: 0.92 and 0.99 with one of 5,900 tokens among shorter ones, 1.06 to 1.10 up to
// this.
constexpr int64_t kMostPackedQueries = 2048;
// Key blocks that cost the same may be rounded up to whole waves, by 10% of their number at most.
// This bound was chosen, not measured.
constexpr int64_t kMostPercentOfBlocks = 110;
// Under a causal mask the first key block of a head costs as much as two on average. There are
// enough others to fill the SMs beside it; measured with 3.9 waves. Packed blocks may be as
// unequal: 0.80 to 0.90 with 2.1 waves. This lies between the two.
constexpr int64_t kFewestWaves = 3;
// Causal key blocks of one wave must find the queries of their groups in L2. With eight heads of
// 128 they do not: 0.94 to 1.00. This is the ratio of heads times the head dim.
constexpr int64_t kWidestCausalGroup = 512;
// Nor do they in packed sequences with eight heads of either head dim: 0.75 to 0.99 from 1k on.
constexpr int64_t kMostPackedHeads = 4;
// Sequences of up to so many tokens are short enough for any group: 1.20 and more. Where they are
// packed, 80 key blocks were enough: 1.53.
constexpr int64_t kShort = 256;
// The other kernel looks for a CTA's sequence from the first on. With this many packed sequences of
// up to so many tokens that is most of its time: 1.49 to 3.25, and with MHA 1.07 to 2.15.
constexpr int64_t kMany = 300, kMostQueriesOfMany = 512;
// MHA, which has no sums of groups to leave out, fewer packed sequences of up to so many tokens:
// 1.02 to 1.70, and 0.94 to 1.08 in 40 sequences. At 197 tokens it was 0.95.
constexpr int64_t kShortOfMha = 128;
// Heads of more key blocks than this have such different blocks that two waves of them are better
// balanced than one: 1.03 times as fast with 16 and 32 blocks, 0.98 with 4 and 8.
constexpr int64_t kBlocksOfOneWave = 8;

bool is_packed(const Problem& p) { return p.layout == Layout::kVarlen; }

bool are_many(const Problem& p) {
  return is_packed(p) && p.batch >= kMany && p.seqlen_q <= kMostQueriesOfMany;
}

// The key blocks of all heads. The last one of a packed sequence is half empty on average.
int64_t key_blocks(const Problem& p, const Kernel& groups) {
  const int64_t of_head = is_packed(p)
                              ? bounded_sum(p.total_k / groups.block_n, ceil_div(p.batch, 2))
                              : bounded_product(p.batch, ceil_div(p.seqlen_k, groups.block_n));
  return bounded_product(p.num_heads_kv, of_head);
}

bool fills_waves(const Problem& p, const Kernel& groups) {
  if (is_packed(p) && p.seqlen_q <= kShort) return true;
  const int64_t blocks = key_blocks(p, groups);
  if (groups.mask == Mask::kFull && !is_packed(p))
    return bounded_product(100, round_up(blocks, sm_count(p))) <=
           bounded_product(kMostPercentOfBlocks, blocks);
  return blocks >= kFewestWaves * sm_count(p);
}

bool is_grouped_or_short(const Problem& p) {
  if (p.num_heads > p.num_heads_kv) return true;
  return is_packed(p) &&
         std::max(p.seqlen_q, p.seqlen_k) <= (p.batch >= kMany ? kMostQueriesOfMany : kShortOfMha);
}

bool is_long_enough(const Problem& p) {
  if (!is_packed(p)) return std::min(p.seqlen_q, p.seqlen_k) >= kFewestRows;
  return std::min(p.total_q, p.total_k) >= bounded_product(kFewestPackedRows, p.batch);
}

int64_t most_queries(const Problem& p, const Kernel& groups) {
  const bool narrow = groups.head_dim == 64;
  if (groups.mask == Mask::kFull) return narrow ? kMostQueries64 : kMostQueries128;
  if (narrow) return kMostCausalQueries64;
  return is_packed(p) ? kMostPackedQueries : kMostCausalQueries128;
}

// Whether the queries of causal key blocks are few enough to be in L2.
bool is_narrow(const Problem& p, const Kernel& groups) {
  if (groups.mask == Mask::kFull || p.seqlen_q <= kShort || are_many(p)) return true;
  const int64_t ratio = p.num_heads / p.num_heads_kv;
  if (is_packed(p)) return ratio <= kMostPackedHeads;
  return bounded_product(ratio, groups.head_dim) <= kWidestCausalGroup;
}

}  // namespace

bool groups_are_faster(const Problem& p, const Kernel& groups) {
  return is_grouped_or_short(p) && is_long_enough(p) && p.seqlen_q <= most_queries(p, groups) &&
         is_narrow(p, groups) && fills_waves(p, groups);
}

int32_t heads_together(const Problem& p, const Kernel& kernel) {
  const bool uneven = kernel.op == Op::kBackwardGroups && kernel.mask != Mask::kFull;
  if (!uneven || is_packed(p)) return 1;
  const int64_t blocks = ceil_div(p.seqlen_k, kernel.block_n);
  const int64_t waves = blocks > kBlocksOfOneWave ? 2 : 1;
  return static_cast<int32_t>(std::max<int64_t>(waves * sm_count(p) / blocks, 1));
}

}  // namespace fa4
