#include "plan.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../error.h"
#include "../integers.h"
#include "decode_choice.h"
#include "speed_rules.h"
#include "tile_rules.h"
#include "tile_schedule.h"

namespace fa4 {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kAlign = 256;  // bytes: what an allocation of its own would have

// Compute capability 10.0 and 10.3 run the same objects.
int kernel_arch(int capability) {
  return capability == 90 ? 90 : capability == 100 || capability == 103 ? 100 : 0;
}

struct ResolvedMask {
  Mask mask;
  int32_t left, right;
};

// The stock kernel's rules: a bound of the whole length is none, and causal is a right bound of
// zero.
ResolvedMask resolve_mask(const Problem& p) {
  const auto bound = [&](int64_t size) {
    return size < 0 || size >= p.seqlen_k ? kUnbounded : static_cast<int32_t>(size);
  };
  const int32_t left = bound(p.window_size_left);
  const int32_t right = p.is_causal ? 0 : bound(p.window_size_right);
  if (left != kUnbounded) return {Mask::kWindow, left, right};
  if (right == kUnbounded) return {Mask::kFull, left, right};
  return {right == 0 ? Mask::kCausalBottomRight : Mask::kWindow, left, right};
}

std::string why_not(const Problem& p) {
  if (!kernel_arch(p.capability)) {
    return concat("FA4 requires compute capability 9.0, 10.0 or 10.3, the device has ",
                  p.capability / 10, ".", p.capability % 10);
  }
  for (const auto& [name, size] : {std::pair("batch", p.batch),
                                   {"the number of heads", p.num_heads},
                                   {"the number of key/value heads", p.num_heads_kv},
                                   {"the number of queries", p.total_q},
                                   {"the number of keys", p.total_k},
                                   {"max_q", p.seqlen_q},
                                   {"max_k", p.seqlen_k}}) {
    if (size < 0) return concat(name, " must not be negative, is ", size);
  }
  if (p.head_dim <= 0) return concat("head_dim must be positive, is ", p.head_dim);
  if (p.head_dim_v <= 0) return concat("value's head_dim must be positive, is ", p.head_dim_v);
  if (p.num_heads_kv ? p.num_heads % p.num_heads_kv : p.num_heads) {
    return concat("the number of query heads, ", p.num_heads,
                  ", is not a multiple of the number of key/value heads, ", p.num_heads_kv);
  }
  if (p.head_dim % 8) return concat("head_dim must be a multiple of 8, is ", p.head_dim);
  if (p.head_dim_v % 8)
    return concat("value's head_dim must be a multiple of 8, is ", p.head_dim_v);
  if (p.num_heads_kv && p.num_heads / p.num_heads_kv > kMaxGrid) {
    return concat("at most ", kMaxGrid, " query heads can share a key/value head, here ",
                  p.num_heads / p.num_heads_kv);
  }
  if (p.num_heads >= kUnbounded)
    return concat("the number of heads must be less than 2^30, is ", p.num_heads);
  if (const int64_t rows = std::max({p.total_q, p.total_k, p.seqlen_q, p.seqlen_k});
      rows >= kUnbounded) {
    return concat("queries and keys of all sequences must each be less than 2^30, are ", rows);
  }
  return {};
}

bool is_empty(const Problem& p) {
  return !p.batch || !p.num_heads || !p.total_q || !p.total_k || !p.seqlen_q || !p.seqlen_k;
}

// What selects a kernel but for the bucket and the tile.
struct Key {
  Op op;
  int arch;
  Dtype dtype;
  Layout layout;
  Mask mask;
  bool grouped, deterministic;

  size_t slot() const {
    const bool flags[] = {op == Op::kBackward,       arch == 100, dtype == Dtype::kFp16,
                          layout == Layout::kVarlen, grouped,     deterministic};
    size_t slot = static_cast<size_t>(mask);
    for (bool flag : flags) slot = 2 * slot + flag;
    return slot;
  }
  static constexpr size_t kSlots = 3 << 6;
};

// Forward and backward kernels by slot, smallest bucket and tile first; a pair of thread blocks has
// the larger tile.
const std::vector<std::vector<const Kernel*>>& kernels_by_slot() {
  static const auto* index = [] {
    auto* slots = new std::vector<std::vector<const Kernel*>>(Key::kSlots);
    for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
      if (k->op != Op::kForward && k->op != Op::kBackward) continue;
      (*slots)[Key{k->op, k->arch, k->dtype, k->layout, k->mask, k->grouped, k->deterministic}
                   .slot()]
          .push_back(k);
    }
    for (auto& slot : *slots) {
      std::sort(slot.begin(), slot.end(), [](const Kernel* a, const Kernel* b) {
        return std::tie(a->head_dim, a->head_dim_v, a->block_m, a->two_cta) <
               std::tie(b->head_dim, b->head_dim_v, b->block_m, b->two_cta);
      });
    }
    return slots;
  }();
  return *index;
}

// Where the kernel's tile is wider than the problem's rows.
bool below_bucket(const Kernel& kernel, const Problem& p) {
  return kernel.head_dim != p.head_dim || kernel.head_dim_v != p.head_dim_v;
}

// The smallest bucket that holds both head dims; of its defaults the smallest tile that holds all
// queries, or else the largest. With one split always the largest: the caller asks for a result
// that does not depend on the rest of the batch.
const Kernel* find_kernel(const Problem& p, Mask mask, bool grouped) {
  const Key key{p.op,
                kernel_arch(p.capability),
                p.dtype,
                p.layout,
                mask,
                grouped,
                p.op == Op::kBackward && p.deterministic};
  const Kernel* found = nullptr;
  for (const Kernel* kernel : kernels_by_slot()[key.slot()]) {
    if (kernel->tuned || kernel->head_dim < p.head_dim || kernel->head_dim_v < p.head_dim_v)
      continue;
    const bool same_bucket =
        found && kernel->head_dim == found->head_dim && kernel->head_dim_v == found->head_dim_v;
    if (found && (!same_bucket || (found->block_m >= p.seqlen_q && p.num_splits != 1))) break;
    found = kernel;
  }
  return found;
}

const Kernel* find_kernel(const Problem& p, const ResolvedMask& resolved) {
  const Mask mask = resolved.mask;
  if (p.op == Op::kForward) {
    const Kernel* forward = find_kernel(p, mask, false);
    const Kernel* decode =
        forward && !p.tile ? find_decode(p, resolved.left, resolved.right, *forward) : nullptr;
    return decode ? decode : forward;
  }
  const Kernel* kernel = find_kernel(p, mask, p.num_heads != p.num_heads_kv);
  // On SM100 the kernel for equal heads stores dK and dV without TMA, and so whole rows of its
  // bucket, where a layout is varlen or where no query of a window sees a tile of keys. The one for
  // grouped heads leaves the store to the postprocess, which knows the head dim.
  const bool stores_whole_rows = kernel && kernel->arch == 100 && !kernel->grouped &&
                                 below_bucket(*kernel, p) &&
                                 (p.layout == Layout::kVarlen || mask == Mask::kWindow);
  return stores_whole_rows ? find_kernel(p, mask, true) : kernel;
}

// The kernel of the same kind with this tile, of as many thread blocks where there is one; null
// where the build has none.
const Kernel* with_tile(const Kernel& kernel, Tile tile) {
  const Kernel* found = nullptr;
  const Key key{kernel.op,   kernel.arch,    kernel.dtype,        kernel.layout,
                kernel.mask, kernel.grouped, kernel.deterministic};
  for (const Kernel* other : kernels_by_slot()[key.slot()]) {
    if (other->head_dim == kernel.head_dim && other->head_dim_v == kernel.head_dim_v &&
        other->block_m == tile.queries && other->block_n == tile.keys &&
        (!found || other->two_cta == kernel.two_cta)) {
      found = other;
    }
  }
  return found;
}

std::string no_kernel(const Problem& p) {
  int largest = 0, largest_v = 0;
  for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
    if (k->arch != kernel_arch(p.capability) || k->op != p.op) continue;
    largest = std::max<int>(largest, k->head_dim);
    largest_v = std::max<int>(largest_v, k->head_dim_v);
  }
  const auto at_most = [&p](const char* name, int bound, int64_t head_dim) {
    return concat(name, " must be at most ", bound, " on compute capability ", p.capability / 10,
                  ".", p.capability % 10, " in this build, is ", head_dim);
  };
  if (p.head_dim > largest) return at_most("head_dim", largest, p.head_dim);
  if (p.head_dim_v > largest_v) return at_most("value's head_dim", largest_v, p.head_dim_v);
  return "this build's kernel subset leaves this combination out";
}

// What the decode kernel alone can do: why not, where another one was found.
std::string decode_only(const Problem& p, const Kernel& kernel) {
  const bool decode = kernel.op == Op::kDecode;
  if (p.page_size && !decode) {
    if (kernel.arch != 90)
      return "paged KV (block_table) not supported but on compute capability 9.0";
    return concat("paged KV (block_table) not supported for more than ", kMaxDecodeQueries,
                  " queries, or ", kMaxDecodeRows,
                  " queries times query heads of a key/value head, here ", p.seqlen_q, " and ",
                  decode_rows(p));
  }
  if (p.page_size % kernel.block_n) {
    return concat("a page of block_table must hold a multiple of ", kernel.block_n, " keys, holds ",
                  p.page_size);
  }
  if (p.num_splits > 1 && !decode)
    return concat("SplitKV not supported, num_splits is ", p.num_splits);
  return {};
}

// A sequence's rows start at a multiple of the tile: every sequence can need one tile more than its
// share.
int64_t padded_rows(const Problem& p, int64_t total, int64_t seqlen, int64_t tile) {
  const int64_t rows =
      p.layout == Layout::kVarlen ? bounded_sum(total, bounded_product(p.batch, tile)) : seqlen;
  return round_up(rows, tile);
}

Workspace backward_workspace(const Problem& p, const Kernel& kernel) {
  Workspace w;
  int64_t end = 0;
  const auto take = [&end](auto... sizes) {  // of four bytes an element
    const int64_t begin = end;
    end = round_up(bounded_sum(end, bounded_product(4, sizes...)), kAlign);
    return begin;
  };
  const bool grouped = kernel.grouped;
  const int64_t batch = p.layout == Layout::kDense ? p.batch : 1;
  w.cluster = kernel.two_cta ? 2 : 1;
  w.rows_q = padded_rows(p, p.total_q, p.seqlen_q, kernel.block_m);
  w.rows_k = padded_rows(p, p.total_k, p.seqlen_k, kernel.block_n * w.cluster);
  // Of packed sequences the kernel goes by cu_seqlens: a semaphore short, because the caller's
  // longest is too short, would be another head's.
  const bool varlen = p.layout == Layout::kVarlen;
  w.tiles_q = ceil_div(varlen ? p.total_q : p.seqlen_q, kernel.block_m);
  w.tiles_k = round_up(ceil_div(varlen ? p.total_k : p.seqlen_k, kernel.block_n), w.cluster);
  w.lse_log2 = take(batch, p.num_heads, w.rows_q);
  w.delta = take(batch, p.num_heads, w.rows_q);
  const int64_t numbers_end =
      bounded_sum(w.delta, bounded_product(4, batch, p.num_heads, w.rows_q));
  w.numbers_in_dq = numbers_end <= bounded_product(2, p.total_q, p.num_heads, p.head_dim);
  if (w.numbers_in_dq) end = 0;
  w.dq_accum = take(batch, p.num_heads, w.rows_q, kernel.head_dim);
  w.zeroed = end;
  if (grouped) w.dk_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim);
  if (grouped) w.dv_accum = take(batch, p.num_heads_kv, w.rows_k, kernel.head_dim_v);
  if (kernel.deterministic) w.dq_semaphore = take(p.batch, p.num_heads, w.tiles_q, w.cluster);
  if (kernel.deterministic && grouped) w.dk_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  if (kernel.deterministic && grouped) w.dv_semaphore = take(p.batch, p.num_heads_kv, w.tiles_k, 2);
  w.bytes = end;
  return w;
}

// Which thread blocks get a persistent forward's tiles; why not, where its tiles are too many or
// the forced dealing is none of it.
std::string hand_out(const Problem& p, const Kernel& kernel, Mask mask, Plan& plan) {
  if (!fits_cursors(p, kernel)) {
    return concat("there can be more than 2^30 tiles of queries: ", p.num_heads, " heads of ",
                  p.total_q, " queries in ", p.batch, " sequences");
  }
  plan.workers = std::max(p.sm_count, 1);
  if (p.layout == Layout::kVarlen) plan.workspace.bytes = sizeof(int32_t);
  const bool causal = mask == Mask::kCausalBottomRight;
  if (p.layout == Layout::kVarlen || (!causal && mask != Mask::kFull)) return {};
  const int64_t heads = p.batch * p.num_heads;
  const Dealing& forced = p.dealing;
  if (forced && (forced.workers < 0 || forced.workers > plan.workers || forced.paired < 0 ||
                 forced.paired > heads)) {
    return concat("a dealing must have 1 to ", plan.workers, " thread blocks and 0 to ", heads,
                  " paired heads, has ", forced.workers, " and ", forced.paired);
  }
  if (causal) {
    const Dealing dealing = forced ? forced : deal(p, kernel, plan.workers);
    plan.workers = dealing.workers;
    plan.paired = dealing.paired;
  } else {
    plan.workers = forced ? forced.workers : in_turns(p, kernel, plan.workers);
  }
  return {};
}

// Whether the derivative of what our forward computes can be had: from our own backward, or from
// PyTorch's.
bool has_backward_that_agrees(const Problem& forward, const ResolvedMask& mask) {
  if (forward.page_size || stock_agrees(forward, mask.left, mask.right))
    return true;  // there is none for pages
  Problem backward = forward;
  backward.op = Op::kBackward;
  backward.tile = {};
  return plan(backward, false).supported();
}

}  // namespace

Plan plan(const Problem& problem, bool speed_rules, const std::vector<TileRule>& tile_rules) {
  Plan plan;
  plan.reason = why_not(problem);
  if (!plan.reason.empty()) return plan;
  if (is_empty(problem)) {
    plan.nothing_to_compute = true;
    return plan;
  }
  const ResolvedMask mask = resolve_mask(problem);
  const Kernel* kernel = find_kernel(problem, mask);
  if (!kernel) {
    plan.reason = no_kernel(problem);
    return plan;
  }
  plan.reason = decode_only(problem, *kernel);
  if (!plan.reason.empty()) return plan;
  if (problem.tile) {
    kernel = with_tile(*kernel, problem.tile);
    if (!kernel) {
      plan.reason = concat("this build has no kernel with a tile of ", problem.tile.queries, " x ",
                           problem.tile.keys, " for this");
      return plan;
    }
  } else {
    const TileRule* rule = find_tile_rule(problem, *kernel, tile_rules);
    const Kernel* tuned = rule ? with_tile(*kernel, rule->tile) : nullptr;
    const bool beats_stock =
        tuned && rule->beats_stock;  // the speed rules were measured with the defaults
    const bool may_choose_stock =
        speed_rules && !beats_stock && stock_agrees(problem, mask.left, mask.right);
    if (const char* faster = may_choose_stock ? stock_is_faster(problem, *kernel) : nullptr) {
      plan.stock_is_faster = true;
      plan.reason = faster;
      return plan;
    }
    if (tuned) kernel = tuned;
  }
  if (problem.op == Op::kBackward) {
    plan.workspace = backward_workspace(problem, *kernel);
    // The kernels index an accumulator's row in int32.
    const int64_t most_rows = std::max(plan.workspace.rows_q, plan.workspace.rows_k);
    if (bounded_product(most_rows, std::max(kernel->head_dim, kernel->head_dim_v)) > kMaxInt32) {
      plan.reason = concat("an accumulator has 2^31 elements or more a head: ",
                           std::max(problem.total_q, problem.total_k), " rows");
      return plan;
    }
    if (plan.workspace.bytes >= kBound) {
      plan.reason = concat("the backward's workspace must have less than 2^62 bytes, has more for ",
                           problem.batch, " sequences of ", problem.num_heads, " heads");
      return plan;
    }
  }
  if (kernel->persistent) {
    plan.reason = hand_out(problem, *kernel, mask.mask, plan);
    if (!plan.reason.empty()) return plan;
  }
  if (problem.op == Op::kForward && !has_backward_that_agrees(problem, mask)) {
    plan.reason =
        "this build has no backward for it, and PyTorch's does not compute the derivative of this "
        "function";
    return plan;
  }
  if (kernel->op == Op::kDecode)
    plan.splits = decode_splits(problem, mask.left, mask.right, *kernel);
  plan.kernel = kernel;
  plan.window_size_left = mask.left;
  plan.window_size_right = mask.right;
  return plan;
}

}  // namespace fa4
