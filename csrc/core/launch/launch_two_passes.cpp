#include "launch_two_passes.h"

#include <initializer_list>

#include "argument_list.h"
#include "scratch.h"

namespace fa4 {
namespace {

using Tensors = std::initializer_list<const TensorView*>;

// Launches one pass. Between the tensors that it reads and those that it writes, both have
// logsumexp, and delta, which the first writes for the second.
void launch_pass(const Problem& p, const Plan& plan, const BackwardArguments& a,
                 const Kernel& kernel, Tensors read, Tensors written, const Part& part,
                 const Target& target) {
  ArgumentList list(p, kernel, part);
  for (const TensorView* tensor : read) list.add(*tensor);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add_rows(Scratch(a.workspace).at(plan.workspace.delta), p.num_heads, lse_rows(p));
  for (const TensorView* tensor : written) list.add(*tensor);
  list.add(a.softmax_scale);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.add_cu_seqlens(a.cu_seqlens_k);
  list.add(plan.window_size_left);
  list.add(plan.window_size_right);
  list.launch(target);
}

}  // namespace

void launch_two_passes(const Problem& p, const Plan& plan, const BackwardArguments& a,
                       const Target& target) {
  const Kernel &by_keys = *plan.kernel, &by_queries = kKernels[by_keys.preprocess];
  for_each_part(p, by_keys, [&](const Part& part) {
    launch_pass(p, plan, a, by_queries, {&a.q, &a.k, &a.v, &a.o, &a.grad_o}, {&a.dq}, part, target);
    launch_pass(p, plan, a, by_keys, {&a.q, &a.k, &a.v, &a.grad_o}, {&a.dk, &a.dv}, part, target);
  });
}

}  // namespace fa4
