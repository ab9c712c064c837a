#include "speed_rules.h"

namespace fa4 {
namespace {

// The bucket whose measurements stand for a kernel's. Larger ones than 128 were not measured over
// the whole grid; what makes ours lose is too few or too short tiles, of which they have as many.
int16_t measured_head_dim(const Kernel& kernel) { return kernel.head_dim <= 64 ? 64 : 128; }

const char* reason(const Rule& rule) {
  return rule.layout == Layout::kVarlen
             ? "the stock kernel is faster for sequences this short, or this many"
             : "the stock kernel is faster for this few queries, or this few keys";
}

// PyTorch narrows window bounds to this type.
bool fits_int(int64_t bound) { return bound == static_cast<int>(bound); }

}  // namespace

bool stock_agrees(const Problem& p, int32_t left, int32_t right) {
  // Its grids have the batch in y and the heads in z.
  if (p.batch > kMaxGrid || p.num_heads > kMaxGrid) return false;
  if (!fits_int(p.window_size_left) || !fits_int(p.window_size_right)) return false;
  // With a left bound alone it takes the longest sequence's number of keys for a right bound. Where
  // a sequence has more queries than that, and one more, its first query does not see the last key.
  return left == kUnbounded || right != kUnbounded || p.seqlen_q <= p.seqlen_k + 1;
}

const char* stock_is_faster(const Problem& p, const Kernel& kernel) {
  if (kernel.arch != 90 || kernel.op == Op::kDecode) return nullptr;  // measured on Hopper only
  if (p.head_dim != p.head_dim_v) return nullptr;  // the stock kernel has none for these
  Features f = features(p, kernel);
  f.head_dim = measured_head_dim(kernel);
  for (const Rule& rule : kSpeedRules) {
    if (rule.holds(f)) return reason(rule);
  }
  return nullptr;
}

}  // namespace fa4
