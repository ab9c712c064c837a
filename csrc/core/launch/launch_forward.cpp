#include "argument_list.h"
#include "driver.h"
#include "launch_decode.h"
#include "launch_maps.h"
#include "scratch.h"

namespace fa4 {
namespace {

void forward(const Problem& p, const Plan& plan, const ForwardArguments& a, const Part& part,
             const Target& target) {
  const Kernel& kernel = *plan.kernel;
  ArgumentList list(p, kernel, part);
  list.add(a.q);
  list.add_keys(a.k);
  list.add_keys(a.v);
  list.add(a.o);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add(a.softmax_scale);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.add_key_lengths(a.cu_seqlens_k, a.seqused_k);
  list.add(plan.window_size_left);
  list.add(plan.window_size_right);
  if (kernel.arch == 100) {  // persistent grids are sized on the host
    list.add(static_cast<int32_t>(p.seqlen_q));
    list.add(p.sm_count);
  }
  if (kernel.persistent) {
    list.add(plan.schedule.num_ctas);
    list.add(plan.schedule.paired_heads);
    list.add_counter(a.workspace);
    add_bias_and_lists(list, p, kernel, a.bias, kernel.map_queries,
                       Scratch(a.workspace).at<int32_t>(plan.workspace.lists_q));
  }
  list.add_pages(a);
  list.launch(target);
}

}  // namespace

void launch_forward(const Problem& p, const Plan& plan, const ForwardArguments& a,
                    const Target& target) {
  const DeviceScope scope(target.device);
  const bool is_decode = plan.kernel->op == Op::kDecode;
  clear(plan.workspace, Scratch(a.workspace), target);
  launch_maps(p, plan, a.bias, a.workspace, target);
  for_each_part(p, *plan.kernel, [&](const Part& part) {
    (is_decode ? decode : forward)(p, plan, a, part, target);
  });
}

}  // namespace fa4
