#include "launch_two_passes.h"

#include "argument_list.h"
#include "scratch.h"

namespace fa4 {
namespace {

// The last arguments of both passes.
void finish(ArgumentList& list, const Plan& plan, const BackwardArguments& a) {
  list.add(a.softmax_scale);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.add_cu_seqlens(a.cu_seqlens_k);
  list.add(plan.window_size_left);
  list.add(plan.window_size_right);
}

void by_queries(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
                const Target& target) {
  ArgumentList list(p, kKernels[plan.kernel->preprocess], part);
  list.add(a.q);
  list.add(a.k);
  list.add(a.v);
  list.add(a.o);
  list.add(a.grad_o);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add_rows(Scratch(a.workspace).at(plan.workspace.delta), p.num_heads, lse_rows(p));
  list.add(a.dq);
  finish(list, plan, a);
  list.launch(target);
}

void by_keys(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
             const Target& target) {
  ArgumentList list(p, *plan.kernel, part);
  list.add(a.q);
  list.add(a.k);
  list.add(a.v);
  list.add(a.grad_o);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add_rows(Scratch(a.workspace).at(plan.workspace.delta), p.num_heads, lse_rows(p));
  list.add(a.dk);
  list.add(a.dv);
  finish(list, plan, a);
  list.launch(target);
}

}  // namespace

void launch_two_passes(const Problem& p, const Plan& plan, const BackwardArguments& a,
                       const Target& target) {
  for_each_part(p, *plan.kernel, [&](const Part& part) {
    by_queries(p, plan, a, part, target);
    by_keys(p, plan, a, part, target);
  });
}

}  // namespace fa4
