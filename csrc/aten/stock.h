// The stock kernels, through torch's versioned C shims: static dispatch, which never comes back to an override.
#pragma once

#include "calls.h"

namespace fa4::aten {

// Each passes the call's arguments on as they came and puts the results on the stack.
void stock_forward(const ForwardCall& call, StableIValue* stack);
void stock_backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
