// PyTorch's own use of cuDNN's attention.
#pragma once

#include "calls.h"

namespace fa4::aten {

void cudnn_forward(const ForwardCall& call, StableIValue* stack);
void cudnn_forward_inplace(const ForwardCall& call, StableIValue* stack);
void cudnn_backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
