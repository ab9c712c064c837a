#include "launch_maps.h"

#include "../integers.h"
#include "part.h"
#include "scratch.h"

namespace fa4 {
namespace {

// A bias and its maps are broadcast over the batch and heads in the launches of the kernels that
// read them, not in these.
void map_queries(const Problem& p, const Plan& plan, const BiasView& bias, const Scratch& scratch,
                 const Target& target) {
  const Kernel& map = kKernels[plan.kernel->map_queries];
  const MapShape cells = cells_shape(p), lists = lists_shape(p, map);
  BiasView rows = bias;
  if (!p.bias_by_query) rows.size[2] = 1;
  ArgumentList list(p, map, whole(p));
  list.add_bias(rows, rows.size[0], rows.size[1]);
  list.add_map(scratch.at<int32_t>(plan.workspace.cells), cells, cells.batch, cells.heads,
               cells.rows);
  list.add_map(scratch.at<int32_t>(plan.workspace.lists_q), lists, lists.batch, lists.heads,
               lists.rows);
  list.launch(target);
}

void map_keys(const Problem& p, const Plan& plan, const Scratch& scratch, const Target& target) {
  const Kernel& map = kKernels[plan.kernel->map_keys];
  const MapShape cells = cells_shape(p), lists = lists_shape(p, map);
  ArgumentList list(p, map, whole(p));
  list.add_map(scratch.at<int32_t>(plan.workspace.cells), cells, cells.batch, cells.heads,
               ceil_div(p.seqlen_q, map.block_m));
  list.add_map(scratch.at<int32_t>(plan.workspace.lists_k), lists, lists.batch, lists.heads,
               lists.rows);
  list.launch(target);
}

}  // namespace

void launch_maps(const Problem& p, const Plan& plan, const BiasView& bias, void* workspace,
                 const Target& target) {
  if (plan.kernel->mask != Mask::kBias) return;
  const Scratch scratch(workspace);
  map_queries(p, plan, bias, scratch, target);
  if (plan.kernel->map_keys >= 0) map_keys(p, plan, scratch, target);
}

void add_bias_and_lists(ArgumentList& list, const Problem& p, const Kernel& kernel,
                        const BiasView& bias, int16_t map, int32_t* lists) {
  if (kernel.mask != Mask::kBias) return;
  const Kernel& of = kKernels[map];
  const int64_t rows = of.op == Op::kMapQueries ? ceil_div(p.seqlen_q, of.block_m)
                                                : ceil_div(p.seqlen_k, of.block_n);
  list.add_bias(bias, p.batch, p.num_heads);
  list.add_map(lists, lists_shape(p, of), p.batch, p.num_heads, rows);
}

}  // namespace fa4
