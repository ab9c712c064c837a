// Turns a plan and device pointers into launches on a stream.
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace fa4 {

// A tensor in the kernels' order: [batch, seqlen, heads, head_dim], varlen [total, heads,
// head_dim]. Strides in elements.
struct TensorView {
  void* data = nullptr;
  int64_t size[4] = {};
  int64_t stride[4] = {};
};

// A bias: batch, heads, queries, keys. The first two are one where it is broadcast over them; the
// stride of the queries is 0 where it is over these. The keys lie next to each other, and pairs of
// them at multiples of 4 bytes.
struct BiasView {
  const void* data = nullptr;
  int64_t size[4] = {};
  int64_t stride[4] = {};
};

struct Target {
  int device = 0;
  void* stream = nullptr;    // CUstream
  bool whole_device = true;  // as processors() says of the two
};

struct ForwardArguments {
  TensorView q, k, v, o;
  float* lse = nullptr;  // contiguous [batch, heads, seqlen_q], varlen [heads, total_q]
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1], varlen only
  const int32_t* cu_seqlens_k = nullptr;
  // [batch], varlen or problem.keys_in_use: keys in use of each sequence; null: all
  const int32_t* seqused_k = nullptr;
  // [batch, block_table_columns], paged only: each sequence's pages
  const int32_t* block_table = nullptr;
  int64_t block_table_columns = 0, block_table_stride = 0;
  BiasView bias;  // problem.bias only
  float softmax_scale = 0;
  void* workspace = nullptr;  // plan.workspace.bytes, at a multiple of 4
};

struct BackwardArguments {
  TensorView q, k, v, o, grad_o, dq, dk, dv;  // dq: dense, without gaps
  const float* lse = nullptr;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  BiasView bias;  // problem.bias only
  float softmax_scale = 0;
  void* workspace = nullptr;  // plan.workspace.bytes
};

// What PyTorch's own backward returned for packed sequences.
struct StockGradients {
  TensorView dq, dk, dv;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
};

// Writes zeros where that backward wrote nothing: in rows that belong to no sequence, and in dK and
// dV of sequences without queries. Does nothing where the build has no kernel for it, which is
// where no speed rule holds.
void clear_unwritten(const Problem& problem, const StockGradients& gradients, const Target& target);

// Both are asynchronous. The plan must be of this problem. They throw Error when loading or
// launching fails.
void launch_forward(const Problem& problem, const Plan& plan, const ForwardArguments& arguments,
                    const Target& target);
void launch_backward(const Problem& problem, const Plan& plan, const BackwardArguments& arguments,
                     const Target& target);

}  // namespace fa4
