#include "strides.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "../core/error.h"
#include "../core/integers.h"

namespace fa4 {
namespace {

// Whether the elements lie without gaps or overlaps, in whatever order of dimensions.
bool dense(int64_t dim, const int64_t* size, const int64_t* stride) {
  std::array<int, kMaxDim> order;
  int count = 0;
  for (int d = 0; d < dim; ++d) {
    if (size[d] == 0) return true;
    if (size[d] == 1) continue;
    int at = count++;
    for (; at > 0 && stride[order[at - 1]] > stride[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    if (stride[order[i]] != expected) return false;
    expected = bounded_product(expected, size[order[i]]);
  }
  return true;
}

// Whether the last dimension is contiguous, and every other stride and the first element's address
// are multiples of `bytes`.
bool aligned(int64_t dim, const int64_t* size, const int64_t* stride, int64_t byte_offset,
             int64_t bytes) {
  const int64_t elements = bytes / kElementBytes;
  if (byte_offset % bytes || stride[dim - 1] != 1) return false;
  for (int64_t d = 0; d < dim - 1; ++d) {
    if (size[d] > 1 && (stride[d] < 0 || stride[d] % elements)) return false;
  }
  return true;
}

}  // namespace

void contiguous_strides(int64_t dim, const int64_t* size, int64_t* result) {
  int64_t next = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    result[d] = next;
    next = bounded_product(next, std::max<int64_t>(size[d], 1));
  }
}

void empty_like_strides(int64_t dim, const int64_t* size, const int64_t* stride, int64_t* result) {
  if (dim > kMaxDim) fail("a tensor has ", dim, " dimensions, at most ", kMaxDim, " are expected");
  if (dense(dim, size, stride)) {
    for (int64_t d = 0; d < dim; ++d) result[d] = stride[d];
    return;
  }
  // at::infer_dense_strides: dimensions from innermost to outermost by stride; a stride of 0 says
  // nothing.
  std::array<int64_t, kMaxDim> order;
  for (int64_t i = 0; i < dim; ++i) order[i] = dim - 1 - i;
  const auto outside = [&](int64_t a, int64_t b) {  // 1: a is outside b, -1: inside, 0: unknown
    if (stride[a] == 0 || stride[b] == 0) return 0;
    if (stride[a] != stride[b]) return stride[a] > stride[b] ? 1 : -1;
    return size[a] > size[b] ? 1 : 0;
  };
  for (int64_t i = 1; i < dim; ++i) {
    int64_t at = i;
    for (int64_t j = i - 1; j >= 0; --j) {
      const int order_of = outside(order[j], order[at]);
      if (order_of < 0) break;
      if (order_of > 0) {
        std::swap(order[j], order[at]);
        at = j;
      }
    }
  }
  int64_t next = 1;
  for (int64_t i = 0; i < dim; ++i) {
    result[order[i]] = next;
    if (size[order[i]] > 1) next = bounded_product(next, size[order[i]]);
  }
}

void output_strides(int64_t dim, const int64_t* size, const int64_t* query_stride,
                    int64_t* result) {
  if (dim > kMaxDim) fail("a tensor has ", dim, " dimensions, at most ", kMaxDim, " are expected");
  std::array<int64_t, kMaxDim> order;  // outermost first
  std::iota(order.begin(), order.begin() + dim, 0);
  std::stable_sort(order.begin(), order.begin() + dim, [query_stride](int64_t a, int64_t b) {
    return query_stride[a] > query_stride[b];
  });
  int64_t next = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    result[order[i]] = next;
    next = bounded_product(next, size[order[i]]);
  }
}

void rows_first_strides(const int64_t* size, int64_t* result) {
  const int64_t by_rows[] = {size[0], size[2], size[1], size[3]};
  contiguous_strides(4, by_rows, result);
  std::swap(result[1], result[2]);
}

bool tma_can_address(int64_t dim, const int64_t* size, const int64_t* stride, int64_t byte_offset) {
  return aligned(dim, size, stride, byte_offset, kTmaBytes);
}

bool can_read_pairs(int64_t dim, const int64_t* size, const int64_t* stride, int64_t byte_offset) {
  return aligned(dim, size, stride, byte_offset, kPairBytes);
}

}  // namespace fa4
