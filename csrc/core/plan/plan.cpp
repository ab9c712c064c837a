#include "plan.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "../error.h"
#include "../integers.h"
#include "backward_groups.h"
#include "backward_splits.h"
#include "choose_kernel.h"
#include "decode_choice.h"
#include "speed_rules.h"

namespace fa4 {
namespace {

std::optional<std::string> why_not(const Problem& p) {
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
  if (p.causal_top_left && p.seqlen_q < p.seqlen_k) {
    return concat("no query sees key ", p.seqlen_q,
                  " and later ones under a top-left causal mask: ",
                  "they must be left out, seqlen_k is ", p.seqlen_k);
  }
  if (const int64_t rows = std::max({p.total_q, p.total_k, p.seqlen_q, p.seqlen_k});
      rows >= kUnbounded) {
    return concat(p.page_size ? "queries of all sequences and keys of all pages"
                              : "queries and keys of all sequences",
                  " must each be less than 2^30, are ", rows);
  }
  return std::nullopt;
}

// The kernels with a bias have no other mask, and read neither pages nor lengths.
std::optional<std::string> why_not_with_bias(const Problem& p) {
  if (!p.bias) return std::nullopt;
  for (const auto& [name, given] :
       {std::pair("is_causal", p.is_causal || p.causal_top_left),
        {"a window", p.window_size_left >= 0 || p.window_size_right >= 0},
        {"packed sequences (cum_seq_q)", p.layout != Layout::kDense},
        {"paged KV (block_table)", p.page_size != 0},
        {"seqused_k", p.keys_in_use},
        {"SplitKV (num_splits)", p.num_splits > 1}}) {
    if (given) return concat("attn_bias with ", name, " not supported");
  }
  for (const auto& [name, size, whole] :
       {std::tuple("batch entries", p.bias_batch, p.batch), {"heads", p.bias_heads, p.num_heads}}) {
    if (size != 1 && size != whole)
      return concat("attn_bias must have 1 or ", whole, " ", name, ", has ", size);
  }
  return std::nullopt;
}

bool is_empty(const Problem& p) {
  return !p.batch || !p.num_heads || !p.total_q || !p.total_k || !p.seqlen_q || !p.seqlen_k;
}

// These are the stock kernel's rules: a bound of the whole length is none, and causal is a right
// bound of zero.
ResolvedMask resolve_mask(const Problem& p) {
  if (p.bias) return {Mask::kBias, kUnbounded, kUnbounded};
  const auto bound = [&](int64_t size) {
    return size < 0 || size >= p.seqlen_k ? kUnbounded : static_cast<int32_t>(size);
  };
  // Where queries and keys are as many, both alignments hide the same.
  if (p.is_causal && p.causal_top_left && p.seqlen_q > p.seqlen_k)
    return {Mask::kWindow, kUnbounded, static_cast<int32_t>(p.seqlen_q - p.seqlen_k)};
  const int32_t left = bound(p.window_size_left);
  const int32_t right = p.is_causal ? 0 : bound(p.window_size_right);
  if (left != kUnbounded) return {Mask::kWindow, left, right};
  if (right == kUnbounded) return {Mask::kFull, left, right};
  return {right == 0 ? Mask::kCausalBottomRight : Mask::kWindow, left, right};
}

// Whether forward and backward of a call may run on whichever kernels: PyTorch computes what ours
// compute, as cuDNN does with a bias, or there is no backward, as with caches.
bool halves_are_free(const Problem& p, const ResolvedMask& mask) {
  if (p.bias) return stock_reads_bias(p);
  return p.page_size || p.keys_in_use || stock_agrees(p, mask.left, mask.right);
}

// Returns why no backward, neither ours nor PyTorch's, computes the derivative of what our forward
// computes.
std::optional<std::string> why_no_backward_agrees(const Problem& forward, const ResolvedMask& mask,
                                                  const KernelSet& disabled) {
  if (halves_are_free(forward, mask)) return std::nullopt;
  Problem backward = forward;
  backward.op = Op::kBackward;
  backward.num_splits = 0;  // an argument of the forward alone
  const KernelChoice choice = choose_kernel(backward, mask, {}, false, kTileRules, disabled);
  std::optional<std::string> why =
      choice.kernel
          ? exceeds_limits(workspace_of(backward, *choice.kernel), backward, *choice.kernel)
          : choice.reason;
  if (!why) return std::nullopt;
  return concat("no kernel could run its backward (", *why,
                "), and PyTorch's does not compute its derivative");
}

// Where PyTorch computes another function than our kernels, both halves of a call run on ours or
// neither does. Returns the disabled kernel that leaves the other half of this one to PyTorch, or
// null. Whether a backward must be deterministic is not known in its forward: all may be asked for.
const Kernel* disabled_for_other_half(const Problem& p, const ResolvedMask& mask,
                                      const KernelSet& disabled) {
  if (disabled.empty() || halves_are_free(p, mask)) return nullptr;
  Problem other = p;
  other.op = p.op == Op::kForward ? Op::kBackward : Op::kForward;
  other.num_splits = 0;
  for (const bool deterministic : {false, true}) {
    other.deterministic = other.op == Op::kBackward && deterministic;
    const KernelChoice choice = choose_kernel(other, mask, {}, false, kTileRules, disabled);
    if (choice.disabled) return choice.disabled;
  }
  return nullptr;
}

}  // namespace

Plan plan(const Problem& problem, bool speed_rules, const Overrides& overrides,
          const std::vector<TileRule>& tile_rules, const KernelSet& disabled) {
  Plan plan;
  if ((plan.reason = why_not(problem))) return plan;
  if ((plan.reason = why_not_with_bias(problem))) return plan;
  if (is_empty(problem)) {
    plan.nothing_to_compute = true;
    return plan;
  }
  const ResolvedMask mask = resolve_mask(problem);
  KernelChoice choice = choose_kernel(problem, mask, overrides, speed_rules, tile_rules, disabled);
  if (!choice.kernel) {
    plan.reason = std::move(choice.reason);
    plan.stock_is_faster = choice.stock_is_faster;
    return plan;
  }
  const Kernel& kernel = *choice.kernel;
  plan.workspace = workspace_of(problem, kernel);
  if ((plan.reason = exceeds_limits(plan.workspace, problem, kernel))) return plan;
  if (kernel.persistent) {
    plan.reason = schedule_tiles(problem, kernel, overrides.schedule, plan.schedule);
    if (plan.reason) return plan;
  }
  if (const Kernel* lacking = disabled_for_other_half(problem, mask, disabled)) {
    plan.reason = concat(why_disabled(*lacking),
                         ", and forward and backward of this call must both run on these kernels");
    return plan;
  }
  if (problem.op == Op::kForward && (plan.reason = why_no_backward_agrees(problem, mask, disabled)))
    return plan;
  plan.heads_together = heads_together(problem, kernel);
  plan.splits = kernel.op == Op::kDecode ? decode_splits(problem, mask, kernel)
                                         : backward_splits(problem, kernel);
  plan.kernel = &kernel;
  plan.window_size_left = mask.left;
  plan.window_size_right = mask.right;
  return plan;
}

}  // namespace fa4
