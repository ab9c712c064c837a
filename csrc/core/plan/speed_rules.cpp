#include "speed_rules.h"

#include <limits>

#include "../integers.h"

namespace fa4 {
namespace {

// Returns the bucket whose measurements against flash stand for a kernel's. Buckets above 128 were
// not measured over the whole grid. Ours loses where tiles are too few or too short, and those
// buckets have as many tiles as 128.
int16_t measured_head_dim(const Kernel& kernel) { return kernel.head_dim <= 64 ? 64 : 128; }

const char* reason(const Rule& rule) {
  if (rule.peer == Peer::kCudnn)
    return "cuDNN is faster for this head dim and mask with this many queries, keys and sequences";
  return rule.layout == Layout::kVarlen
             ? "the stock kernel is faster for sequences this short, or this many"
             : "the stock kernel is faster for this few queries, or this few keys";
}

// Where cuDNN is faster than the kernels with a bias, as measured on an H200. These are fast
// because they leave out tiles that the bias hides.
const char* faster_with_bias(const Problem& p, const Kernel& kernel) {
  if (!p.bias) return nullptr;
  // Such a bias, as of T5, hides none: up to head dim 128 0.50 to 1.02 of our time at 2,048 and
  // 4,096 queries, forward and backward together, at 256 1.40.
  // One row for all queries is little to read, and often padding, which nn.MultiheadAttention
  // copies for each head.
  if (p.bias_heads > 1 && p.bias_by_query && kernel.head_dim < 256)
    return "cuDNN is faster where each head has a bias of its own";
  // A tile has 128 queries: 0.50 to 0.79 of our time with one query, 1.6 with 8.
  if (p.seqlen_q < 8) return "cuDNN is faster with a bias for this few queries";
  // One key block cannot be left out: 0.74 to 0.95 with 128 keys.
  if (p.seqlen_k <= 128) return "cuDNN is faster with a bias for this few keys";
  return nullptr;
}

// With one query a sequence, PyTorch's packed forward takes the heads of a group for its queries,
// and row i of q for sequence i: where a sequence has no query, it raises or reads another's.
bool stock_needs_a_query_each(const Problem& p) {
  return p.op == Op::kForward && p.layout == Layout::kVarlen && p.seqlen_q == 1 &&
         p.num_heads > p.num_heads_kv;
}

// PyTorch's flash attention counts the elements of its backward's accumulator in int. Beyond that
// it writes elsewhere.
bool stock_accumulator_overflows(const Problem& p) {
  if (p.op != Op::kBackward) return false;
  constexpr int64_t kTile = 128;
  const int64_t rows = p.layout == Layout::kVarlen
                           ? bounded_sum(p.total_q, bounded_product(p.batch, kTile))
                           : bounded_product(p.batch, round_up(p.seqlen_q, kTile));
  const int64_t columns = round_up(p.head_dim, p.head_dim <= 128 ? 32 : 64);
  return bounded_product(rows, p.num_heads, columns) > std::numeric_limits<int32_t>::max();
}

// PyTorch narrows window bounds to int.
bool fits_int(int64_t bound) { return bound == static_cast<int>(bound); }

}  // namespace

bool stock_agrees(const Problem& p, int32_t left, int32_t right) {
  // The stock kernel's grids have the batch in y and the heads in z.
  if (p.batch > kMaxGrid || p.num_heads > kMaxGrid) return false;
  // Its backward cannot be launched for no key block.
  if (p.longest_is_zero) return false;
  if (!stock_reads_bias(p)) return false;
  if (!fits_int(p.window_size_left) || !fits_int(p.window_size_right)) return false;
  // With a left bound alone, the stock kernel takes the longest sequence's number of keys for a
  // right bound. Where a sequence has at least two more queries than that, its first query does not
  // see the last key.
  return left == kUnbounded || right != kUnbounded || p.seqlen_q <= p.seqlen_k + 1;
}

bool stock_reads_bias(const Problem& p) { return !p.bias || p.bias_suits_cudnn; }

const char* stock_is_faster(const Problem& p, const Kernel& kernel, Features f,
                            const std::vector<Rule>& rules) {
  // PyTorch takes to it what neither flash attention nor cuDNN runs.
  if (p.peer == Peer::kEfficient) return nullptr;
  if (p.peer == Peer::kFlash) {
    if (kernel.op == Op::kDecode || stock_needs_a_query_each(p)) return nullptr;
    if (stock_accumulator_overflows(p)) return nullptr;
    // PyTorch's flash attention cannot run unequal head dims.
    if (p.head_dim != p.head_dim_v) return nullptr;
    f.head_dim = measured_head_dim(kernel);
  } else if (p.deterministic) {
    return nullptr;  // cuDNN's backward is not.
  }
  if (const char* why = faster_with_bias(p, kernel)) return why;
  for (const Rule& rule : rules) {
    if (rule.holds(f)) return reason(rule);
  }
  return nullptr;
}

}  // namespace fa4
