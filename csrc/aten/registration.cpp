#include "registration.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <mutex>
#include <vector>

#include "../core/error.h"
#include "calls.h"
#include "dispatcher_library.h"
#include "explain.h"
#include "ops.h"

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

bool torch_has_inplace_forward() {
  constexpr uint64_t kTorch212 = uint64_t{2} << 56 | uint64_t{12} << 48;
  return aoti_torch_abi_version() >= kTorch212;
}

}  // namespace

void register_overrides() {
  if (const char* problem = explain_problem(); *problem) fail(problem);
  std::lock_guard<std::mutex> lock(mutex);
  DispatcherLibrary library("aten", "CUDA", "fa4_ext");
  library.implement(kFlashForward.name, &flash_attention_forward);
  if (torch_has_inplace_forward())
    library.implement(kFlashForwardInplace.name, &flash_attention_forward_no_dropout_inplace);
  library.implement(kFlashBackward.name, &flash_attention_backward);
  library.implement(kSdpaForward.name, &scaled_dot_product_flash_attention);
  library.implement(kSdpaBackward.name, &scaled_dot_product_flash_attention_backward);
  overrides().push_back(std::move(library));
}

void remove_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  overrides().clear();
}

}  // namespace fa4::aten
