#include "decode_choice.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../integers.h"

namespace fa4 {
namespace {

const std::vector<const Kernel*>& decode_kernels() {  // smallest bucket first
  static const auto* found = [] {
    auto* kernels = new std::vector<const Kernel*>;
    for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
      if (k->op == Op::kDecode) kernels->push_back(k);
    }
    std::sort(kernels->begin(), kernels->end(), [](const Kernel* a, const Kernel* b) {
      return std::tie(a->arch, a->head_dim, a->head_dim_v) <
             std::tie(b->arch, b->head_dim, b->head_dim_v);
    });
    return kernels;
  }();
  return *found;
}

// An H200's where no device was asked, as in explain() on another machine.
int64_t multiprocessors(const Problem& p) { return p.sm_count > 0 ? p.sm_count : 132; }

// A sequence's, of all heads.
int64_t decode_tiles(const Problem& p, const Kernel& kernel) {
  return bounded_product(p.num_heads_kv, ceil_div(decode_rows(p), kernel.block_m));
}

// That a query sees, at most.
int64_t keys_in_sight(const Problem& p, int32_t left, int32_t right) {
  return std::min(p.seqlen_k, bounded_sum(int64_t{left} + right, p.seqlen_q));
}

// Of `rows` a query, over all sequences: packed ones may be shorter than the longest, and fill
// their last tile in part.
int64_t tiles_in_all(const Problem& p, int64_t rows, int64_t tile) {
  return std::min(bounded_product(p.batch, ceil_div(bounded_product(p.seqlen_q, rows), tile)),
                  bounded_sum(bounded_product(p.total_q, rows) / tile, p.batch));
}

// What each kernel takes, in the time of 64 keys for a tile: the decode kernel's thread blocks
// start and combine in that of 10, the forward's tiles follow each other, after a memset where
// sequences are packed. Fitted to 2,512 problems of 1 to 128 queries on an H200, of which either
// kernel alone is 1.3 times as slow as the better of both in geometric mean, and this choice 1.02
// times.
constexpr int64_t kKeys = 64;
constexpr double kDecodeStart = 10, kTileStart = 0.5, kMemset = 2;

double decode_cost(const Problem& p, int32_t left, int32_t right, const Kernel& kernel) {
  const int64_t splits = decode_splits(p, left, right, kernel),
                at_a_time = multiprocessors(p) * kernel.blocks_per_sm;
  const int64_t tiles = tiles_in_all(p, p.num_heads / p.num_heads_kv, kernel.block_m);
  const int64_t blocks = bounded_product(splits, p.num_heads_kv, tiles);
  const double rounds = std::max(static_cast<double>(blocks) / static_cast<double>(at_a_time), 1.0);
  return rounds * (kDecodeStart +
                   static_cast<double>(ceil_div(keys_in_sight(p, left, right), kKeys * splits)));
}

double forward_cost(const Problem& p, int32_t left, int32_t right, const Kernel& kernel) {
  const int64_t rounds = ceil_div(bounded_product(p.num_heads, tiles_in_all(p, 1, kernel.block_m)),
                                  multiprocessors(p));
  const double a_tile =
      kTileStart + static_cast<double>(ceil_div(keys_in_sight(p, left, right), kKeys));
  return static_cast<double>(rounds) * a_tile + (p.layout == Layout::kVarlen ? kMemset : 0);
}

}  // namespace

int64_t decode_rows(const Problem& p) {
  return bounded_product(p.seqlen_q, p.num_heads / p.num_heads_kv);
}

const Kernel* find_decode(const Problem& p, int32_t left, int32_t right, const Kernel& forward) {
  for (const Kernel* kernel : decode_kernels()) {
    if (kernel->arch != forward.arch || kernel->dtype != p.dtype || kernel->head_dim < p.head_dim ||
        kernel->head_dim_v < p.head_dim_v) {
      continue;
    }
    if (p.seqlen_q > kMaxDecodeQueries || decode_rows(p) > kMaxDecodeRows ||
        decode_tiles(p, *kernel) > kMaxGrid)
      return nullptr;
    if (p.page_size || p.num_splits > 1 || p.decode == Decode::kWherePossible)
      return kernel;  // the forward can't, or shall not
    // With one split the caller asks for a result that does not depend on the rest of the batch,
    // which decides what pays.
    if (p.num_splits == 1 || p.decode == Decode::kWhereNeeded) return nullptr;
    return decode_cost(p, left, right, *kernel) < forward_cost(p, left, right, forward) ? kernel
                                                                                        : nullptr;
  }
  return nullptr;
}

// As many as give each multiprocessor a thread block. Where that leaves some without, two if they
// fit together (larger clusters were measured not to pack two to a multiprocessor). None without a
// block of keys.
int32_t decode_splits(const Problem& p, int32_t left, int32_t right, const Kernel& kernel) {
  // Thread blocks of a cluster. 16 need as many multiprocessors in one part of the GPU, which
  // smaller ones may lack.
  const int64_t sm_count = multiprocessors(p), most = sm_count >= 132 ? 16 : 8;
  if (p.num_splits > 0) return static_cast<int32_t>(std::min(p.num_splits, most));
  const int64_t tiles = bounded_product(p.batch, decode_tiles(p, kernel));
  const int64_t fill =
      tiles < sm_count ? std::max<int64_t>(kernel.blocks_per_sm, sm_count / tiles) : 1;
  return static_cast<int32_t>(
      std::min({most, fill, ceil_div(keys_in_sight(p, left, right), kernel.block_n)}));
}

}  // namespace fa4
