// PyTorch's own kernels for the ops that we override. They are called by static dispatch, which
// does not consult the dispatcher for the op itself.
#pragma once

#include "calls.h"

namespace fa4::aten {

// Each function passes the call's arguments on as they came and puts the results on the stack.
void stock_forward(const ForwardCall& call, StableIValue* stack);
void stock_forward_inplace(const ForwardCall& call, StableIValue* stack);
void stock_backward(const BackwardCall& call, StableIValue* stack);

// Returns whether the calling thread is inside a stock scaled_dot_product op. That op calls the
// low-level op through the dispatcher, which finds our override, and we have turned the call down
// already.
bool stock_is_running();

}  // namespace fa4::aten
