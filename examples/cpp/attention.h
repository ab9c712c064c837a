// What both programs need besides fa4_ext.
#pragma once

#include <ATen/ATen.h>
#include <fa4_ext.h>

#include <stdexcept>

// Relative errors of bf16 attention against fp32 are a few thousandths.
constexpr double kTolerance = 1e-2;

inline double relative_error(const at::Tensor& result, const at::Tensor& reference) {
  return ((result.to(at::kDouble) - reference.to(at::kDouble)).norm() /
          reference.to(at::kDouble).norm())
      .item<double>();
}

inline void set_option(const char* name, int value) {
  if (fa4_ext_set_option(name, value) != 0) throw std::runtime_error(fa4_ext_last_error());
}
