#include "choose_kernel.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../error.h"
#include "backward_groups.h"
#include "decode_choice.h"
#include "speed_rules.h"

namespace fa4 {
namespace {

// The op of the problems that a kernel is planned for. A backward in two passes is planned on the
// second. The kernel of groups is looked for by its own op, beside the other.
Op problem_op(const Kernel& k) { return k.op == Op::kBackwardKeys ? Op::kBackward : k.op; }

// Everything that selects a kernel except the bucket and the tile. The op is problem_op's.
struct Key {
  Op op;
  int arch;
  Dtype dtype;
  Layout layout;
  Mask mask;
  bool grouped, deterministic;

  size_t slot() const {
    const bool flags[] = {
        op == Op::kBackward, op == Op::kBackwardGroups, arch == 100, dtype == Dtype::kFp16, grouped,
        deterministic};
    size_t slot = 4 * static_cast<size_t>(mask) + static_cast<size_t>(layout);
    for (bool flag : flags) slot = 2 * slot + flag;
    return slot;
  }
  static constexpr size_t kSlots = 4 << 8;
};

Key key_of(const Kernel& k) {
  return {problem_op(k), k.arch, k.dtype, k.layout, k.mask, k.grouped, k.deterministic};
}

// The keys of all problems that a kernel is for. A backward in two passes takes any ratio of heads,
// and adds up in the same order always.
std::vector<Key> keys_of(const Kernel& k) {
  Key key = key_of(k);
  if (k.op != Op::kBackwardKeys) return {key};
  std::vector<Key> keys;
  for (bool grouped : {false, true}) {
    for (bool deterministic : {false, true}) {
      key.grouped = grouped;
      key.deterministic = deterministic;
      keys.push_back(key);
    }
  }
  return keys;
}

// Forward and backward kernels by slot, smallest bucket and tile first. Of two kernels that differ
// in two_cta only, the pair of CTAs has the larger tile.
const std::vector<const Kernel*>& kernels_for(const Key& key) {
  static const auto* index = [] {
    auto* slots = new std::vector<std::vector<const Kernel*>>(Key::kSlots);
    for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
      const Op op = problem_op(*k);
      if (op != Op::kForward && op != Op::kBackward && op != Op::kBackwardGroups) continue;
      for (const Key& each : keys_of(*k)) (*slots)[each.slot()].push_back(k);
    }
    for (auto& slot : *slots) {
      std::sort(slot.begin(), slot.end(), [](const Kernel* a, const Kernel* b) {
        return std::tie(a->head_dim, a->head_dim_v, a->block_m, a->two_cta) <
               std::tie(b->head_dim, b->head_dim_v, b->block_m, b->two_cta);
      });
    }
    return slots;
  }();
  return (*index)[key.slot()];
}

// Keys in pages have kernels of their own.
Layout kernel_layout(const Problem& p) { return p.page_size ? Layout::kPaged : p.layout; }

bool same_bucket(const Kernel& a, const Kernel& b) {
  return a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v;
}

// With one split no tile is small enough, so that the largest runs always: the caller asks for a
// result that does not depend on the rest of the batch.
bool holds_all_queries(const Kernel& kernel, const Problem& p) {
  return kernel.block_m >= p.seqlen_q && p.num_splits != 1;
}

// Takes the smallest bucket that holds both head dims, and of its default tiles the smallest that
// holds all queries, or else the largest. Where all default tiles are disabled, it takes one of the
// tuned tiles likewise.
const Kernel* default_kernel(const Problem& p, Op op, Mask mask, bool grouped,
                             const KernelSet& disabled) {
  const Key key{op,
                kernel_arch(p.capability),
                p.dtype,
                kernel_layout(p),
                mask,
                grouped,
                p.op == Op::kBackward && p.deterministic};
  const Kernel* found = nullptr;
  for (const Kernel* kernel : kernels_for(key)) {
    if (kernel->head_dim < p.head_dim || kernel->head_dim_v < p.head_dim_v ||
        first_needed_in(disabled, *kernel)) {
      continue;
    }
    if (found && !same_bucket(*kernel, *found)) break;
    const bool better =
        !found || (found->tuned == kernel->tuned ? !holds_all_queries(*found, p) : found->tuned);
    if (better) found = kernel;
  }
  return found;
}

const Kernel* default_forward(const Problem& p, const ResolvedMask& mask,
                              const Overrides& overrides, const KernelSet& disabled) {
  const Kernel* forward = default_kernel(p, p.op, mask.kind, false, disabled);
  // The decode kernel takes no bias.
  if (overrides.tile || mask.kind == Mask::kBias) return forward;
  const Kernel* decode = choose_decode(p, mask, forward, overrides.decode, disabled);
  return decode ? decode : forward;
}

// On SM100 the MHA kernel stores dK and dV without TMA in varlen layouts, and in a key block that
// no query's window reaches. These stores write whole rows of the bucket, beyond head_dim. The GQA
// kernel leaves the store to the postprocess kernel, which knows the head dim.
bool stores_beyond_head_dim(const Kernel& kernel, const Problem& p) {
  return kernel.arch == 100 && !kernel.grouped &&
         (kernel.head_dim != p.head_dim || kernel.head_dim_v != p.head_dim_v) &&
         (p.layout == Layout::kVarlen || kernel.mask == Mask::kWindow);
}

const Kernel* default_backward(const Problem& p, Mask mask, const KernelSet& disabled) {
  const Kernel* kernel = default_kernel(p, p.op, mask, p.num_heads != p.num_heads_kv, disabled);
  const bool needs_accumulators =
      kernel ? stores_beyond_head_dim(*kernel, p) : kernel_arch(p.capability) == 100;
  return needs_accumulators ? default_kernel(p, p.op, mask, true, disabled) : kernel;
}

// The kernel that works on groups of heads together, where it is faster than `other`, or where that
// is none of the bucket, because these are disabled; else `other`.
const Kernel* with_groups(const Kernel* other, const Problem& p, Mask mask,
                          const KernelSet& disabled) {
  if (p.op != Op::kBackward) return other;
  const Kernel* groups = default_kernel(p, Op::kBackwardGroups, mask, false, disabled);
  if (!groups) return other;
  const bool alone = !other || other->head_dim > groups->head_dim;
  return alone || (same_bucket(*groups, *other) && groups_are_faster(p, *groups)) ? groups : other;
}

// The kernel of the same kind with this tile, preferably with the same two_cta; null if the build
// has none.
const Kernel* with_tile(const Kernel& kernel, Tile tile, const KernelSet& disabled) {
  const Kernel* found = nullptr;
  for (const Kernel* other : kernels_for(key_of(kernel))) {
    if (same_bucket(*other, kernel) && other->block_m == tile.queries &&
        other->block_n == tile.keys && !first_needed_in(disabled, *other) &&
        (!found || other->two_cta == kernel.two_cta)) {
      found = other;
    }
  }
  return found;
}

std::string why_no_kernel(const Problem& p, Mask mask) {
  int largest = 0, largest_v = 0;
  for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
    if (k->arch != kernel_arch(p.capability) || problem_op(*k) != p.op) continue;
    if ((k->mask == Mask::kBias) != (mask == Mask::kBias)) continue;
    largest = std::max<int>(largest, k->head_dim);
    largest_v = std::max<int>(largest_v, k->head_dim_v);
  }
  const std::string here = concat(" on compute capability ", p.capability / 10, ".",
                                  p.capability % 10, " in this build");
  if (mask == Mask::kBias && !largest) return concat("attn_bias is not supported", here);
  const auto at_most = [&here](const char* name, int bound, int64_t head_dim) {
    return concat(name, " must be at most ", bound, here, ", is ", head_dim);
  };
  if (p.head_dim > largest) return at_most("head_dim", largest, p.head_dim);
  if (p.head_dim_v > largest_v) return at_most("value's head_dim", largest_v, p.head_dim_v);
  return "this build's kernel subset leaves this combination out";
}

// Returns the reason why no kernel reads the problem's pages.
std::optional<std::string> why_no_pages(const Problem& p) {
  if (!p.page_size) return std::nullopt;
  if (p.op == Op::kBackward) return "paged KV (block_table) is supported only in a forward";
  if (p.layout != Layout::kVarlen) return "paged KV (block_table) is supported only with cum_seq_q";
  if (p.page_size < 0 || p.page_size % kPageMultiple) {
    return concat("a page of block_table must hold a multiple of ", kPageMultiple, " keys, holds ",
                  p.page_size);
  }
  if (kernel_arch(p.capability) == 100 && !p.pages_in_rows) {
    return "on compute capability 10.0 and 10.3 the pages of block_table must lie whole rows "
           "apart, with less than 2^30 rows in all";
  }
  return std::nullopt;
}

// Some arguments are for the decode kernel alone. Returns the reason why `kernel`, the one that was
// found, does not have what the problem asks of it. num_splits is a hint about speed, which a
// forward of many queries does not need where keys lie in pages. Nor is it a reason to leave the
// forward to PyTorch where that computes another function than our backward, which is not told of
// it.
std::optional<std::string> lacks_decoding(const Problem& p, const ResolvedMask& mask,
                                          const Kernel& kernel, const Overrides& overrides,
                                          const KernelSet& disabled) {
  if (kernel.op == Op::kDecode || p.page_size) return std::nullopt;
  const auto limited = [&](const auto&... what) {
    return concat(what..., " is supported ", decode_limit(p, kernel, overrides, disabled));
  };
  if (p.keys_in_use) return limited("seqused_k of dense tensors");
  if (p.num_splits > 1 && stock_agrees(p, mask.left, mask.right))
    return limited("SplitKV (num_splits is ", p.num_splits, ")");
  return std::nullopt;
}

// Without the kernel that clears what PyTorch's backward leaves unwritten, no speed rule may choose
// that.
bool stock_results_are_whole(const Problem& p, const KernelSet& disabled) {
  if (disabled.empty() || p.op != Op::kBackward || p.layout != Layout::kVarlen) return true;
  const Kernel* clear = clear_kernel(p);
  return !clear || !disabled.contains(*clear);
}

KernelChoice refuse(std::string reason) { return {nullptr, std::move(reason)}; }

// Chooses among the kernels that are not disabled.
KernelChoice choose_enabled(const Problem& p, const ResolvedMask& mask, const Overrides& overrides,
                            bool speed_rules, const std::vector<TileRule>& tile_rules,
                            const KernelSet& disabled) {
  if (auto reason = why_no_pages(p)) return refuse(*std::move(reason));
  const Kernel* kernel = p.op == Op::kForward ? default_forward(p, mask, overrides, disabled)
                                              : default_backward(p, mask.kind, disabled);
  if (!overrides.tile) kernel = with_groups(kernel, p, mask.kind, disabled);
  if (!kernel) return refuse(why_no_kernel(p, mask.kind));
  if (auto reason = lacks_decoding(p, mask, *kernel, overrides, disabled))
    return refuse(*std::move(reason));
  if (const Tile tile = overrides.tile) {
    const Kernel* forced = with_tile(*kernel, tile, disabled);
    if (forced) return {forced, {}};
    return refuse(concat("this build has no kernel with a tile of ", tile.queries, " x ", tile.keys,
                         " for this"));
  }
  // Both tables of rules were measured on Hopper only, and without pages. They say nothing of the
  // kernel of groups.
  if (kernel->arch != 90 || p.page_size || kernel->op == Op::kBackwardGroups) return {kernel, {}};
  const Features f = features(p, *kernel);
  const TileRule* rule = find_tile_rule(p, *kernel, f, tile_rules);
  const Kernel* tuned = rule ? with_tile(*kernel, rule->tile, disabled) : nullptr;
  // The rules about flash were measured with the default tiles, those about cuDNN with the tiles
  // that run.
  const bool beats_stock = tuned && rule->beats_stock && p.peer == Peer::kFlash;
  if (speed_rules && !beats_stock && stock_agrees(p, mask.left, mask.right) &&
      stock_results_are_whole(p, disabled)) {
    if (const char* reason = stock_is_faster(p, *kernel, f)) return {nullptr, reason, true};
  }
  return {tuned ? tuned : kernel, {}};
}

}  // namespace

// Compute capability 10.0 and 10.3 run the same objects.
int kernel_arch(int capability) {
  return capability == 90 ? 90 : capability == 100 || capability == 103 ? 100 : 0;
}

KernelChoice choose_kernel(const Problem& p, const ResolvedMask& mask, const Overrides& overrides,
                           bool speed_rules, const std::vector<TileRule>& tile_rules,
                           const KernelSet& disabled) {
  KernelChoice choice = choose_enabled(p, mask, overrides, speed_rules, tile_rules, disabled);
  if (choice.kernel || choice.stock_is_faster || disabled.empty()) return choice;
  // No rule is asked, so that this is the kernel for want of which none was found.
  const Kernel* wanted = choose_enabled(p, mask, overrides, false, {}, {}).kernel;
  choice.disabled = wanted ? first_needed_in(disabled, *wanted) : nullptr;
  if (choice.disabled) choice.reason = why_disabled(*choice.disabled);
  return choice;
}

const Kernel* clear_kernel(const Problem& p) {
  const Kernel* found = std::find_if(kKernels, kKernels + kNumKernels, [&](const Kernel& kernel) {
    return kernel.op == Op::kClear && kernel.arch == kernel_arch(p.capability) &&
           kernel.dtype == p.dtype;
  });
  return found == kKernels + kNumKernels ? nullptr : found;
}

std::string why_disabled(const Kernel& kernel) {
  return concat("kernel ", kernel.name, " is disabled (FA4_EXT_DISABLE or register(disable=...))");
}

}  // namespace fa4
