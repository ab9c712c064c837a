#include "launch_maps.h"

#include "part.h"
#include "scratch.h"

namespace fa4 {
namespace {

// A bias and its maps are broadcast in the launches of the kernels that read them, not in these.
void map_queries(const Problem& p, const Plan& plan, const BiasView& bias, const Scratch& scratch,
                 const Target& target) {
  const Kernel& map = kKernels[plan.kernel->map_queries];
  const MapShape cells = cells_shape(p), lists = lists_shape(p, map);
  ArgumentList list(p, map, whole(p));
  list.add_bias(bias, bias.size[0], bias.size[1]);
  list.add_map(scratch.at<int32_t>(plan.workspace.cells), cells, cells.batch, cells.heads);
  list.add_map(scratch.at<int32_t>(plan.workspace.lists_q), lists, lists.batch, lists.heads);
  list.launch(target);
}

void map_keys(const Problem& p, const Plan& plan, const Scratch& scratch, const Target& target) {
  const Kernel& map = kKernels[plan.kernel->map_keys];
  const MapShape cells = cells_shape(p), lists = lists_shape(p, map);
  ArgumentList list(p, map, whole(p));
  list.add_map(scratch.at<int32_t>(plan.workspace.cells), cells, cells.batch, cells.heads);
  list.add_map(scratch.at<int32_t>(plan.workspace.lists_k), lists, lists.batch, lists.heads);
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
  list.add_bias(bias, p.batch, p.num_heads);
  list.add_map(lists, lists_shape(p, kKernels[map]), p.batch, p.num_heads);
}

}  // namespace fa4
