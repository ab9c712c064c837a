// The backward of every op.
#pragma once

#include "calls.h"

namespace fa4::aten {

// Puts the three gradients on the stack. Our kernels compute them if they can, or else the
// peer does.
void backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
