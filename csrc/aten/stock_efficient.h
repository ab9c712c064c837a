// PyTorch's own memory-efficient attention.
#pragma once

#include "calls.h"

namespace fa4::aten {

void efficient_forward(const ForwardCall& call, StableIValue* stack);
void efficient_backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
