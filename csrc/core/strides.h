// The strides of results, as torch promises them.
#pragma once

#include <cstdint>

namespace fa4 {

constexpr int kMaxDim = 8;

// What at::empty_like gives: the tensor's own order of dimensions, without gaps.
void empty_like_strides(int64_t dim, const int64_t* size, const int64_t* stride, int64_t* result);

// Those of an output that has query's shape but for the last dimension, value's: query's order of dimensions (torch 2.15's rule).
void output_strides(int64_t dim, const int64_t* size, const int64_t* query_stride, int64_t* result);

}  // namespace fa4
