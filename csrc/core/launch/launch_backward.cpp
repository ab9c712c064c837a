#include "argument_list.h"
#include "driver.h"
#include "launch_two_passes.h"
#include "scratch.h"

namespace fa4 {
namespace {

// The memory that holds lse_log2 and delta.
Scratch row_numbers(const Workspace& w, const BackwardArguments& a) {
  return Scratch(w.numbers_in_dq ? a.dq.data : a.workspace);
}

void preprocess(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
                const Target& target) {
  const Workspace& w = plan.workspace;
  const Scratch scratch(a.workspace), numbers = row_numbers(w, a);
  ArgumentList list(p, kKernels[plan.kernel->preprocess], part);
  list.add(a.o);
  list.add(a.grad_o);
  list.add_rows(numbers.at(w.delta), p.num_heads, w.rows_q);
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add_rows(numbers.at(w.lse_log2), p.num_heads, w.rows_q);
  list.add_rows(scratch.at(w.dq_accum), p.num_heads, w.rows_q * plan.kernel->head_dim);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.launch(target);
}

void gradients(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
               const Target& target) {
  const Kernel& kernel = *plan.kernel;
  const Workspace& w = plan.workspace;
  const Scratch scratch(a.workspace), numbers = row_numbers(w, a);
  ArgumentList list(p, kernel, part);
  list.add(a.q);
  list.add(a.k);
  list.add(a.v);
  list.add(a.grad_o);
  list.add_rows(numbers.at(w.lse_log2), p.num_heads, w.rows_q);
  list.add_rows(numbers.at(w.delta), p.num_heads, w.rows_q);
  list.add_rows(scratch.at(w.dq_accum), p.num_heads, w.rows_q * kernel.head_dim);
  if (kernel.grouped) {
    list.add_rows(scratch.at(w.dk_accum), p.num_heads_kv, w.rows_k * kernel.head_dim);
    list.add_rows(scratch.at(w.dv_accum), p.num_heads_kv, w.rows_k * kernel.head_dim_v);
  } else {
    list.add(a.dk);
    list.add(a.dv);
  }
  list.add(a.softmax_scale);
  list.add_cu_seqlens(a.cu_seqlens_q);
  list.add_cu_seqlens(a.cu_seqlens_k);
  if (kernel.op == Op::kBackwardGroups) {
    list.add(plan.heads_together);
  } else {
    list.add(plan.window_size_left);
    list.add(plan.window_size_right);
  }
  if (kernel.deterministic) {
    const auto semaphore = [&](int64_t offset, int64_t heads, int64_t tiles, int64_t slots) {
      list.add_semaphore(scratch.at<int32_t>(offset), heads, tiles, slots);
    };
    semaphore(w.dq_semaphore, p.num_heads, w.tiles_q, w.cluster);
    if (kernel.grouped) {
      semaphore(w.dk_semaphore, p.num_heads_kv, w.tiles_k, 2);
      semaphore(w.dv_semaphore, p.num_heads_kv, w.tiles_k, 2);
    }
  }
  list.launch(target);
}

// Gradients that another kernel writes where there are sequences, and that the postprocess kernel
// of dQ clears where there are none.
struct Others {
  TensorView dk, dv;
  const int32_t* cu_seqlens = nullptr;
};

// Turns an fp32 accumulator into a gradient: dQ (rows of q), or dK or dV (rows of k).
void postprocess(const Problem& p, int kernel_row, const void* accumulator,
                 const TensorView& gradient, int64_t heads, int64_t rows, float scale,
                 const int32_t* cu_seqlens, const Others& others, const Part& part,
                 const Target& target) {
  const Kernel& kernel = kKernels[kernel_row];
  ArgumentList list(p, kernel, part);
  list.add_rows(accumulator, heads, rows * kernel.head_dim);
  list.add(gradient);
  list.add(scale);
  list.add_cu_seqlens(cu_seqlens);
  if (kernel.layout == Layout::kVarlen) {
    list.add(others.dk);
    list.add(others.dv);
    list.add_cu_seqlens(others.cu_seqlens);
  }
  list.launch(target);
}

void launch_one_pass(const Problem& p, const Plan& plan, const BackwardArguments& a,
                     const Target& target) {
  const Workspace& w = plan.workspace;
  const Kernel& kernel = *plan.kernel;
  const Scratch scratch(a.workspace);
  const auto for_each = [&](const auto& launch) { for_each_part(p, kernel, launch); };
  clear(w, scratch, target);
  for_each([&](const Part& part) { preprocess(p, plan, a, part, target); });
  for_each([&](const Part& part) { gradients(p, plan, a, part, target); });
  const Others others = kernel.grouped ? Others{} : Others{a.dk, a.dv, a.cu_seqlens_k};
  for_each([&](const Part& part) {
    postprocess(p, kernel.postprocess_dq, scratch.at(w.dq_accum), a.dq, p.num_heads, w.rows_q,
                a.softmax_scale, a.cu_seqlens_q, others, part, target);
  });
  if (!kernel.grouped) return;
  for_each([&](const Part& part) {
    postprocess(p, kernel.postprocess_dk, scratch.at(w.dk_accum), a.dk, p.num_heads_kv, w.rows_k,
                a.softmax_scale, a.cu_seqlens_k, {}, part, target);
    postprocess(p, kernel.postprocess_dv, scratch.at(w.dv_accum), a.dv, p.num_heads_kv, w.rows_k,
                1.0f, a.cu_seqlens_k, {}, part, target);
  });
}

}  // namespace

void launch_backward(const Problem& p, const Plan& plan, const BackwardArguments& a,
                     const Target& target) {
  const DeviceScope scope(target.device);
  const bool in_two = plan.kernel->op == Op::kBackwardKeys;
  (in_two ? launch_two_passes : launch_one_pass)(p, plan, a, target);
}

}  // namespace fa4
