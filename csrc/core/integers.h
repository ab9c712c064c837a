// Integer arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fa4 {

constexpr int64_t kMaxGrid = 65535;  // CUDA's bound on a grid's y and z, where heads and batch go

// A caller may pass any number. Products and sums of non-negative numbers stop at 2^62 instead of
// overflowing. With a negative number the result is 0 or more and has no meaning.
constexpr int64_t kBound = int64_t{1} << 62;

inline int64_t bounded_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kBound : std::clamp<int64_t>(product, 0, kBound);
}
template <class... More>
int64_t bounded_product(int64_t a, int64_t b, More... more) {
  return bounded_product(bounded_product(a, b), more...);
}

inline int64_t bounded_sum(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? kBound : std::clamp<int64_t>(sum, 0, kBound);
}

// `b`: at least 1
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a - 1) / b + 1 : a / b; }
inline int64_t round_up(int64_t a, int64_t b) { return bounded_product(ceil_div(a, b), b); }

}  // namespace fa4
