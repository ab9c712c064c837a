#include "stock.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "../core/error.h"
#include "torch_symbol.h"

// Absent from a CPU build of torch.
#pragma weak aoti_torch_cuda__flash_attention_forward
#pragma weak aoti_torch_cuda__flash_attention_backward
#pragma weak aoti_torch_cuda__scaled_dot_product_flash_attention
#pragma weak aoti_torch_cuda__scaled_dot_product_flash_attention_backward

namespace fa4::aten {
namespace {

// Since torch 2.12: the 17 arguments of its schema.
using ForwardV2 = AOTITorchError(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* cum_seq_q,
                                 AtenTensorHandle* cum_seq_k, int64_t max_q, int64_t max_k, double dropout_p, int32_t is_causal,
                                 int32_t return_debug_mask, double* scale, int64_t* window_size_left, int64_t* window_size_right,
                                 AtenTensorHandle* seqused_k, AtenTensorHandle* alibi_slopes, AtenTensorHandle* block_table,
                                 int64_t* num_splits, AtenTensorHandle* ret0, AtenTensorHandle* ret1, AtenTensorHandle* ret2,
                                 AtenTensorHandle* ret3, AtenTensorHandle* ret4);

ForwardV2* forward_v2() {
  static const auto function = torch_function<ForwardV2>("libtorch_cuda.so", "aoti_torch_cuda__flash_attention_forward_v2");
  return function;
}

using ForwardInplaceV2 = AOTITorchError(AtenTensorHandle out, AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                        AtenTensorHandle* cum_seq_q, AtenTensorHandle* cum_seq_k, int64_t max_q, int64_t max_k,
                                        double dropout_p, int32_t is_causal, int32_t return_debug_mask, double* scale,
                                        int64_t* window_size_left, int64_t* window_size_right, AtenTensorHandle* seqused_k,
                                        AtenTensorHandle* alibi_slopes, AtenTensorHandle* block_table, int64_t* num_splits,
                                        AtenTensorHandle* ret0);

ForwardInplaceV2* forward_inplace_v2() {
  static const auto function =
      torch_function<ForwardInplaceV2>("libtorch_cuda.so", "aoti_torch_cuda__flash_attention_forward_no_dropout_inplace_v2");
  return function;
}

template <class Shim, class... Arguments>
void call_stock(const char* op, Shim* shim, Arguments... arguments) {
  if (!shim) fail(op, ": this build of torch has no CUDA kernel for it");
  if (shim(arguments...) == AOTI_TORCH_SUCCESS) return;
  fail(exception_text(concat(op, ": the stock kernel raised an error")));
}

// The shims take an optional as a pointer that may be null.
struct OptionalTensor {
  AtenTensorHandle handle;
  explicit OptionalTensor(const Handle& tensor) : handle(tensor.get()) {}
  AtenTensorHandle* pointer() { return handle ? &handle : nullptr; }
};

template <class T>
T* pointer(std::optional<T>& value) {
  return value ? &*value : nullptr;
}

thread_local bool inside_sdpa = false;

struct InsideSdpa {
  InsideSdpa() { inside_sdpa = true; }
  ~InsideSdpa() { inside_sdpa = false; }
};

template <class T>
void put(StableIValue* stack, T value) {
  *stack = torch::stable::detail::from(value);
}

void sdpa_forward(const ForwardCall& call, StableIValue* stack) {
  const InsideSdpa scope;
  AtenTensorHandle out, lse, cum_seq_q, cum_seq_k, rng_state, unused, debug_mask;
  int64_t max_q, max_k;
  auto scale = call.scale;
  call_stock(call.op, &aoti_torch_cuda__scaled_dot_product_flash_attention, call.query.get(), call.key.get(), call.value.get(),
             call.dropout_p, int32_t{call.is_causal}, int32_t{call.return_debug_mask}, pointer(scale), &out, &lse, &cum_seq_q,
             &cum_seq_k, &max_q, &max_k, &rng_state, &unused, &debug_mask);
  put(stack, out), put(stack + 1, lse), put(stack + 2, cum_seq_q), put(stack + 3, cum_seq_k), put(stack + 4, max_q),
      put(stack + 5, max_k);
  put(stack + 6, rng_state), put(stack + 7, unused), put(stack + 8, debug_mask);
}

void flash_forward(const ForwardCall& call, StableIValue* stack) {
  AtenTensorHandle results[5];
  auto scale = call.scale;
  auto left = call.window_size_left, right = call.window_size_right, num_splits = call.num_splits;
  OptionalTensor cum_seq_q(call.cum_seq_q), cum_seq_k(call.cum_seq_k), seqused_k(call.seqused_k), alibi_slopes(call.alibi_slopes);
  OptionalTensor block_table(call.block_table);
  if (call.has_block_table) {
    call_stock(call.op, forward_v2(), call.query.get(), call.key.get(), call.value.get(), cum_seq_q.pointer(), cum_seq_k.pointer(),
               call.max_q, call.max_k, call.dropout_p, int32_t{call.is_causal}, int32_t{call.return_debug_mask}, pointer(scale),
               pointer(left), pointer(right), seqused_k.pointer(), alibi_slopes.pointer(), block_table.pointer(),
               pointer(num_splits), results, results + 1, results + 2, results + 3, results + 4);
  } else {
    call_stock(call.op, &aoti_torch_cuda__flash_attention_forward, call.query.get(), call.key.get(), call.value.get(),
               cum_seq_q.pointer(), cum_seq_k.pointer(), call.max_q, call.max_k, call.dropout_p, int32_t{call.is_causal},
               int32_t{call.return_debug_mask}, pointer(scale), pointer(left), pointer(right), seqused_k.pointer(),
               alibi_slopes.pointer(), results, results + 1, results + 2, results + 3, results + 4);
  }
  for (int i = 0; i < 5; ++i) put(stack + i, results[i]);
}

}  // namespace

bool stock_is_running() { return inside_sdpa; }

void stock_forward(const ForwardCall& call, StableIValue* stack) {
  call.order == DimOrder::kHeadsFirst ? sdpa_forward(call, stack) : flash_forward(call, stack);
}

void stock_forward_inplace(const ForwardCall& call, StableIValue* stack) {
  AtenTensorHandle logsumexp;
  auto scale = call.scale;
  auto left = call.window_size_left, right = call.window_size_right, num_splits = call.num_splits;
  OptionalTensor cum_seq_q(call.cum_seq_q), cum_seq_k(call.cum_seq_k), seqused_k(call.seqused_k), alibi_slopes(call.alibi_slopes);
  OptionalTensor block_table(call.block_table);
  call_stock(call.op, forward_inplace_v2(), call.out.get(), call.query.get(), call.key.get(), call.value.get(), cum_seq_q.pointer(),
             cum_seq_k.pointer(), call.max_q, call.max_k, call.dropout_p, int32_t{call.is_causal}, int32_t{call.return_debug_mask},
             pointer(scale), pointer(left), pointer(right), seqused_k.pointer(), alibi_slopes.pointer(), block_table.pointer(),
             pointer(num_splits), &logsumexp);
  put(stack, logsumexp);
}

void stock_backward(const BackwardCall& call, StableIValue* stack) {
  AtenTensorHandle results[3];
  auto scale = call.scale;
  auto left = call.window_size_left, right = call.window_size_right;
  if (call.order == DimOrder::kHeadsFirst) {
    const InsideSdpa scope;
    call_stock(call.op, &aoti_torch_cuda__scaled_dot_product_flash_attention_backward, call.grad_out.get(), call.query.get(),
               call.key.get(), call.value.get(), call.out.get(), call.logsumexp.get(), call.cum_seq_q.get(), call.cum_seq_k.get(),
               call.max_q, call.max_k, call.dropout_p, int32_t{call.is_causal}, call.rng_state.get(), call.unused.get(),
               pointer(scale), results, results + 1, results + 2);
  } else {
    call_stock(call.op, &aoti_torch_cuda__flash_attention_backward, call.grad_out.get(), call.query.get(), call.key.get(),
               call.value.get(), call.out.get(), call.logsumexp.get(), call.cum_seq_q.get(), call.cum_seq_k.get(), call.max_q,
               call.max_k, call.dropout_p, int32_t{call.is_causal}, call.rng_state.get(), call.unused.get(), pointer(scale),
               pointer(left), pointer(right), results, results + 1, results + 2);
  }
  for (int i = 0; i < 3; ++i) put(stack + i, results[i]);
}

}  // namespace fa4::aten
