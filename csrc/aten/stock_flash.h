// PyTorch's own flash attention: FlashAttention-2, or what the build of torch has in its place.
#pragma once

#include "calls.h"

namespace fa4::aten {

void flash_forward(const ForwardCall& call, StableIValue* stack);
void flash_forward_inplace(const ForwardCall& call, StableIValue* stack);
void flash_backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
