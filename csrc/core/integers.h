// Integer arithmetic.
#pragma once

#include <cstdint>

namespace fa4 {

constexpr int64_t kMaxGrid = 65535;  // CUDA's bound on a grid's y and z, where heads and batch go

// At most 2^62, for lengths that a caller may make up.
inline int64_t bounded_product(int64_t a, int64_t b) {
  constexpr int64_t kBound = int64_t{1} << 62;
  return b > 0 && a > kBound / b ? kBound : a * b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fa4
