#include "registration.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <memory>
#include <mutex>

#include "ops.h"

namespace fa4::aten {
namespace {

using torch::stable::detail::StableLibrary;

std::mutex mutex;

// Stays in the dispatcher while the process exits, when other threads may still call.
std::unique_ptr<StableLibrary>& overrides() {
  static auto* const held = new std::unique_ptr<StableLibrary>;
  return *held;
}

bool torch_has_inplace_forward() {
  constexpr uint64_t kTorch212 = uint64_t{2} << 56 | uint64_t{12} << 48;
  return aoti_torch_abi_version() >= kTorch212;
}

}  // namespace

void register_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", "CUDA", "fa4_ext", 0);
  library->impl("_flash_attention_forward", &flash_attention_forward);
  if (torch_has_inplace_forward()) {
    library->impl("_flash_attention_forward_no_dropout_inplace", &flash_attention_forward_no_dropout_inplace);
  }
  library->impl("_flash_attention_backward", &flash_attention_backward);
  library->impl("_scaled_dot_product_flash_attention", &scaled_dot_product_flash_attention);
  library->impl("_scaled_dot_product_flash_attention_backward", &scaled_dot_product_flash_attention_backward);
  overrides() = std::move(library);  // an older registration of ours ends after the new one began: no call falls between them
}

void remove_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  overrides().reset();
}

}  // namespace fa4::aten
