// Integer arithmetic.
#pragma once

#include <cstdint>

namespace fa4 {

constexpr int64_t kMaxGrid = 65535;  // CUDA's bound on a grid's y and z, where heads and batch go

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fa4
