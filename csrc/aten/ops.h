// The overrides of the aten ops, in the boxed form that the stable ABI registers.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace fa4::aten {

void scaled_dot_product_flash_attention(StableIValue* stack, uint64_t num_inputs,
                                        uint64_t num_outputs);
void scaled_dot_product_flash_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                 uint64_t num_outputs);
void flash_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void flash_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t num_inputs,
                                                uint64_t num_outputs);
void flash_attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

void scaled_dot_product_cudnn_attention(StableIValue* stack, uint64_t num_inputs,
                                        uint64_t num_outputs);
void scaled_dot_product_cudnn_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                 uint64_t num_outputs);
void cudnn_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void cudnn_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t num_inputs,
                                                uint64_t num_outputs);
void cudnn_attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

void scaled_dot_product_efficient_attention(StableIValue* stack, uint64_t num_inputs,
                                            uint64_t num_outputs);
void scaled_dot_product_efficient_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                     uint64_t num_outputs);

}  // namespace fa4::aten
