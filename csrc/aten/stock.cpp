#include "stock.h"

#include "stock_cudnn.h"
#include "stock_efficient.h"
#include "stock_flash.h"
#include "stock_run.h"

namespace fa4::aten {

Sdpa& sdpa_stage() {
  thread_local Sdpa stage = Sdpa::kOutside;
  return stage;
}

bool stock_is_running() { return sdpa_stage() != Sdpa::kOutside; }

void stock_forward(const ForwardCall& call, StableIValue* stack) {
  switch (call.peer) {
    case Peer::kFlash:
      return flash_forward(call, stack);
    case Peer::kCudnn:
      return cudnn_forward(call, stack);
    case Peer::kEfficient:
      return efficient_forward(call, stack);
  }
}

void stock_forward_inplace(const ForwardCall& call, StableIValue* stack) {
  call.peer == Peer::kFlash ? flash_forward_inplace(call, stack)
                            : cudnn_forward_inplace(call, stack);
}

void stock_backward(const BackwardCall& call, StableIValue* stack) {
  switch (call.peer) {
    case Peer::kFlash:
      return flash_backward(call, stack);
    case Peer::kCudnn:
      return cudnn_backward(call, stack);
    case Peer::kEfficient:
      return efficient_backward(call, stack);
  }
}

}  // namespace fa4::aten
