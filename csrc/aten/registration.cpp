#include "registration.h"

#include <mutex>
#include <vector>

#include "../core/error.h"
#include "calls.h"
#include "dispatcher_library.h"
#include "ops.h"
#include "own_ops.h"
#include "torch_version.h"

namespace fa4::aten {
namespace {

std::mutex mutex;

// The newest library is the last one. Older ones stay below it until all of them end, because
// another thread may have looked up one of their kernels and not entered it yet. The vector itself
// is never destroyed, because other threads may still call while the process exits.
std::vector<DispatcherLibrary>& overrides() {
  static auto* const held = new std::vector<DispatcherLibrary>;
  return *held;
}

}  // namespace

void register_overrides() {
  if (const char* problem = own_ops_problem(); *problem) fail(problem);
  std::lock_guard<std::mutex> lock(mutex);
  DispatcherLibrary library("aten", "CUDA", "fa4_ext");
  library.implement(kFlashForward.name, &flash_attention_forward);
  if (torch_is_at_least(2, 12))
    library.implement(kFlashForwardInplace.name, &flash_attention_forward_no_dropout_inplace);
  library.implement(kFlashBackward.name, &flash_attention_backward);
  library.implement(kSdpaForward.name, &scaled_dot_product_flash_attention);
  library.implement(kSdpaBackward.name, &scaled_dot_product_flash_attention_backward);
  library.implement(kCudnnSdpaForward.name, &scaled_dot_product_cudnn_attention);
  library.implement(kCudnnSdpaBackward.name, &scaled_dot_product_cudnn_attention_backward);
  library.implement(kCudnnForward.name, &cudnn_attention_forward);
  library.implement(kCudnnBackward.name, &cudnn_attention_backward);
  if (torch_is_at_least(2, 15))
    library.implement(kCudnnForwardInplace.name, &cudnn_attention_forward_no_dropout_inplace);
  library.implement(kEfficientForward.name, &scaled_dot_product_efficient_attention);
  library.implement(kEfficientBackward.name, &scaled_dot_product_efficient_attention_backward);
  overrides().push_back(std::move(library));
}

void remove_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  overrides().clear();
}

}  // namespace fa4::aten
