#include "speed_rules.h"

#include "problem_features.h"

namespace fa4 {
namespace {

enum class Heads { kEqual, kGrouped };

// The stock kernel was measured to be faster on some problem where all of these hold, and ours on
// next to none.
struct StockIsFaster {
  Op op;
  Layout layout;
  int16_t head_dim;
  Heads heads;
  Range queries;  // rows a sequence; varlen: on average
  Range keys;     // varlen: of the longest sequence
  Range batch;
};

constexpr StockIsFaster kSm90Rules[] = {
#include "speed_rules.inc"
};

// The bucket whose measurements stand for a kernel's. Larger ones than 128 were not measured over
// the whole grid; what makes ours lose is too few or too short tiles, of which they have as many.
int measured_head_dim(const Kernel& kernel) { return kernel.head_dim <= 64 ? 64 : 128; }

const char* reason(const StockIsFaster& rule) {
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
  const int64_t queries = queries_a_sequence(p);
  const Heads heads = p.num_heads == p.num_heads_kv ? Heads::kEqual : Heads::kGrouped;
  for (const StockIsFaster& rule : kSm90Rules) {
    if (rule.op == p.op && rule.layout == p.layout && rule.head_dim == measured_head_dim(kernel) &&
        rule.heads == heads && rule.queries.holds(queries) && rule.keys.holds(p.seqlen_k) &&
        rule.batch.holds(p.batch)) {
      return reason(rule);
    }
  }
  return nullptr;
}

}  // namespace fa4
