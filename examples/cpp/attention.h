// What both programs need besides fa4_ext.
#pragma once

#include <ATen/ATen.h>
#include <ATen/SDPBackend.h>
#include <fa4_ext.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

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

// Makes at::scaled_dot_product_attention try flash attention first; on Hopper and Blackwell PyTorch
// prefers cuDNN.
inline void put_flash_first(const at::Tensor& cuda_tensor) {
  at::_fused_sdp_choice(cuda_tensor, cuda_tensor,
                        cuda_tensor);  // the first choice in a process overwrites an earlier order
  std::vector<int64_t> order;
  for (const auto backend :
       {at::SDPBackend::flash_attention, at::SDPBackend::cudnn_attention,
        at::SDPBackend::efficient_attention, at::SDPBackend::math, at::SDPBackend::overrideable}) {
    order.push_back(static_cast<int64_t>(backend));
  }
  at::globalContext().setSDPPriorityOrder(order);
}
