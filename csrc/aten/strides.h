// Strides: those of results, as torch promises them, and those that the kernels can read.
#pragma once

#include <cstdint>

#include "../core/plan/problem.h"

namespace fa4 {

constexpr int kMaxDim = 8;
constexpr int64_t kTmaBytes = 16;  // addresses and strides that TMA takes are multiples of it
constexpr int64_t kPairBytes = 2 * kElementBytes;

// Strides without gaps, the last dimension innermost.
void contiguous_strides(int64_t dim, const int64_t* size, int64_t* result);

// The strides that at::empty_like gives: the tensor's own order of dimensions, without gaps.
void empty_like_strides(int64_t dim, const int64_t* size, const int64_t* stride, int64_t* result);

// The strides of an output with value's head dim, in query's order of dimensions (torch 2.15's
// rule).
void output_strides(int64_t dim, const int64_t* size, const int64_t* query_stride, int64_t* result);

// The strides of a tensor [batch, heads, rows, head_dim] in which the heads of a row lie side by
// side, as in the results of memory-efficient attention.
void rows_first_strides(const int64_t* size, int64_t* result);

// Whether TMA can address a tensor of elements of kElementBytes: contiguous last dimension, every
// other stride and the first element's address multiples of kTmaBytes. `byte_offset`: that address,
// or its offset where there is no memory.
bool tma_can_address(int64_t dim, const int64_t* size, const int64_t* stride, int64_t byte_offset);

// The same of a kernel that reads pairs of elements at multiples of kPairBytes.
bool can_read_pairs(int64_t dim, const int64_t* size, const int64_t* stride, int64_t byte_offset);

}  // namespace fa4
