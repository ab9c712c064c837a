// What a call asks of the kernels, as plain data. No torch, no Python, no CUDA.
#pragma once

#include <cstdint>

#include "../integers.h"

namespace fa4 {

enum class Op : int8_t {
  kForward,
  kDecode,
  kBackward,
  kBackwardGroups,   // the same where a CTA works on all query heads of its keys
  kBackwardQueries,  // the first pass of a backward in two
  kBackwardKeys,     // the second
  kMapQueries,       // before a kernel with a bias: which tiles the bias leaves to each query tile
  kMapKeys,          // the same for each key block
  kPreprocess,
  kPostprocess,
  kClear
};
enum class Dtype : int8_t { kBf16, kFp16 };
// A problem's is dense or varlen. A kernel's is also kPaged, for varlen queries with keys and
// values in pages, or kAny, for all three.
enum class Layout : int8_t { kDense, kVarlen, kPaged, kAny };
enum class Mask : int8_t { kFull, kCausalBottomRight, kWindow, kBias };
enum class Peer : int8_t { kFlash, kCudnn, kEfficient };

constexpr int64_t kElementBytes = 2;  // of either dtype

// A window bound that masks nothing. Kernels add it to row indices below 2^30 in int32.
constexpr int32_t kUnbounded = 1 << 30;

// The rows of queries and of keys that a kernel works on at a time.
struct Tile {
  int32_t queries = 0, keys = 0;
  explicit operator bool() const { return queries != 0 || keys != 0; }
};

struct Problem {
  Op op = Op::kForward;    // kForward or kBackward
  int32_t capability = 0;  // compute capability of the device: 90 for 9.0, 103 for 10.3
  int32_t sm_count = 0;    // SMs of the device
  Dtype dtype = Dtype::kBf16;
  Layout layout = Layout::kDense;
  int64_t batch = 0;
  int64_t seqlen_q = 0;  // varlen: the longest
  int64_t seqlen_k = 0;  // varlen: the longest
  // varlen: the caller gave 0 for the longest, though there are rows. We take any number of them
  // for possible, the stock kernel none.
  bool longest_is_zero = false;
  int64_t total_q = 0;  // rows of q: batch * seqlen_q when dense
  int64_t total_k = 0;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  bool is_causal = false;          // bottom-right aligned, unless causal_top_left
  bool causal_top_left = false;    // dense, with no fewer queries than keys
  int64_t window_size_left = -1;   // -1: unbounded
  int64_t window_size_right = -1;  // -1: unbounded
  bool deterministic = false;      // backward: the same bits in every run
  Peer peer = Peer::kFlash;        // whose op was called, and runs the call if our kernels do not
  // varlen: keys of a page, [pages, page_size, heads, head_dim]; 0: not paged
  int64_t page_size = 0;
  // Whether pages lie whole rows apart, and the rows from the first page to the end of the last are
  // less than 2^30.
  bool pages_in_rows = true;
  bool keys_in_use = false;  // dense: each sequence has a number of its own, up to seqlen_k
  int64_t num_splits = 0;    // how many parts to split the keys into; 0: the planner's choice
  // A tensor is added to the scores. It has this many batch entries and heads of its own, one where
  // it is broadcast.
  bool bias = false;
  int64_t bias_batch = 1, bias_heads = 1;
  // Whether queries have rows of their own in it, or one row is all queries', as of padding.
  bool bias_by_query = true;
  // Whether cuDNN can read the bias: a row has an element for each key, side by side in memory, and
  // the first of all lies at a multiple of 16 bytes. In others it reads misaligned addresses, which
  // ends the CUDA context.
  bool bias_suits_cudnn = true;
};

// The memory-efficient op rounds the rows of its logsumexp up to a multiple.
constexpr int64_t kEfficientLseAlign = 32;

// Pages hold whole boxes of this many keys (kernels/sm90/pages.py has it, as SMALL).
constexpr int64_t kPageMultiple = 16;

// The device's SMs; an H200's where no device was asked, as in explain() on another machine.
inline int64_t sm_count(const Problem& p) { return p.sm_count > 0 ? p.sm_count : 132; }

// The number of logsumexp rows per head.
inline int64_t lse_rows(const Problem& p) {
  if (p.layout == Layout::kVarlen) return p.total_q;
  return p.peer == Peer::kEfficient ? round_up(p.seqlen_q, kEfficientLseAlign) : p.seqlen_q;
}

// The mask in force, after what masks nothing has been dropped. A bound is kUnbounded for none.
struct ResolvedMask {
  Mask kind = Mask::kFull;
  int32_t left = kUnbounded, right = kUnbounded;
};

}  // namespace fa4
