#include "launch_two_passes.h"

#include <initializer_list>

#include "argument_list.h"
#include "launch_maps.h"
#include "scratch.h"

namespace fa4 {
namespace {

using Tensors = std::initializer_list<const TensorView*>;

// What tells two passes apart: the kernel, its tensors, and with a bias the lists of its tiles.
struct Pass {
  const Kernel& kernel;
  Tensors read, written;
  int16_t map;
  int64_t lists;
};

// Launches one pass. Between the tensors that it reads and those that it writes, both have
// logsumexp, and delta, which the first writes for the second.
void launch_pass(const Problem& p, const Plan& plan, const BackwardArguments& a, const Pass& pass,
                 const Part& part, const Target& target) {
  const auto& [kernel, read, written, map, lists] = pass;
  const Scratch scratch(a.workspace);
  ArgumentList list(p, kernel, part);
  for (const TensorView* tensor : read) list.add(*tensor);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add_rows(scratch.at(plan.workspace.delta), p.num_heads, lse_rows(p));
  for (const TensorView* tensor : written) list.add(*tensor);
  list.add(a.softmax_scale);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.add_cu_seqlens(a.cu_seqlens_k);
  list.add(plan.window_size_left);
  list.add(plan.window_size_right);
  add_bias_and_lists(list, p, kernel, a.bias, map, scratch.at<int32_t>(lists));
  if (kernel.op == Op::kBackwardKeys)
    list.launch_split(plan.splits, target);
  else
    list.launch(target);
}

}  // namespace

void launch_two_passes(const Problem& p, const Plan& plan, const BackwardArguments& a,
                       const Target& target) {
  const Kernel &by_keys = *plan.kernel, &by_queries = kKernels[by_keys.preprocess];
  const Workspace& w = plan.workspace;
  launch_maps(p, plan, a.bias, a.workspace, target);
  for_each_part(p, by_keys, [&](const Part& part) {
    const auto launch = [&](const Pass& pass) { launch_pass(p, plan, a, pass, part, target); };
    launch(
        {by_queries, {&a.q, &a.k, &a.v, &a.o, &a.grad_o}, {&a.dq}, by_keys.map_queries, w.lists_q});
    launch({by_keys, {&a.q, &a.k, &a.v, &a.grad_o}, {&a.dk, &a.dv}, by_keys.map_keys, w.lists_k});
  });
}

}  // namespace fa4
