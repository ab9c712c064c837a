#include "decode.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "integers.h"

namespace fa4 {
namespace {

const std::vector<const Kernel*>& decode_kernels() {  // smallest bucket first
  static const auto* found = [] {
    auto* kernels = new std::vector<const Kernel*>;
    for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
      if (k->op == Op::kDecode) kernels->push_back(k);
    }
    std::sort(kernels->begin(), kernels->end(), [](const Kernel* a, const Kernel* b) {
      return std::tie(a->arch, a->head_dim, a->head_dim_v) < std::tie(b->arch, b->head_dim, b->head_dim_v);
    });
    return kernels;
  }();
  return *found;
}

// A sequence's, of all heads.
int64_t decode_tiles(const Problem& p, const Kernel& kernel) { return p.num_heads_kv * ceil_div(decode_rows(p), kernel.block_m); }

// The decode kernel works on half as many rows at a time, at half the speed a row: it pays where the forward's tiles are at least
// half empty, or leave half of the multiprocessors idle. Measured on an H200, 212 problems: 1% slower than the better of both in
// geometric mean.
bool pays(const Problem& p, const Kernel& decode, const Kernel& forward) {
  const int64_t packed = decode_tiles(p, decode), tiles = p.num_heads * ceil_div(p.seqlen_q, forward.block_m);
  return 2 * packed * decode.block_m <= tiles * forward.block_m || 2 * p.batch * tiles <= p.sm_count;
}

}  // namespace

int64_t decode_rows(const Problem& p) { return p.seqlen_q * (p.num_heads / p.num_heads_kv); }

const Kernel* find_decode(const Problem& p, const Kernel& forward) {
  for (const Kernel* kernel : decode_kernels()) {
    if (kernel->arch != forward.arch || kernel->dtype != p.dtype || kernel->head_dim < p.head_dim ||
        kernel->head_dim_v < p.head_dim_v) {
      continue;
    }
    if (decode_rows(p) > kMaxDecodeRows || decode_tiles(p, *kernel) > kMaxGrid) return nullptr;
    if (p.page_size || p.num_splits > 1) return kernel;  // the forward kernel can't
    // With one split the caller asks for a result that does not depend on the rest of the batch, which decides what pays.
    return p.num_splits != 1 && pays(p, *kernel, forward) ? kernel : nullptr;
  }
  return nullptr;
}

// As many as give each multiprocessor a thread block. Where that leaves some without, two if they fit together (larger clusters
// were measured not to pack two to a multiprocessor). None without a block of keys.
int32_t decode_splits(const Problem& p, int32_t left, int32_t right, const Kernel& kernel) {
  // Thread blocks of a cluster. 16 need as many multiprocessors in one part of the GPU, which smaller ones may lack.
  const int64_t most = p.sm_count >= 132 ? 16 : 8;
  if (p.num_splits > 0) return static_cast<int32_t>(std::min(p.num_splits, most));
  const int64_t tiles = p.batch * decode_tiles(p, kernel);
  const int64_t fill = tiles < p.sm_count ? std::max<int64_t>(kernel.blocks_per_sm, p.sm_count / tiles) : 1;
  const int64_t keys = std::min(p.seqlen_k, int64_t{left} + right + p.seqlen_q);
  return static_cast<int32_t>(std::min({most, fill, ceil_div(keys, kernel.block_n)}));
}

}  // namespace fa4
