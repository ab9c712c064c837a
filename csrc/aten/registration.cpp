#include "registration.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <mutex>

#include "ops.h"

namespace fa4::aten {
namespace {

using torch::stable::detail::StableLibrary;

std::mutex mutex;
std::unique_ptr<StableLibrary> overrides;

}  // namespace

void register_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", "CUDA", "fa4_ext", 0);
  library->impl("_flash_attention_forward", &flash_attention_forward);
  library->impl("_flash_attention_backward", &flash_attention_backward);
  library->impl("_scaled_dot_product_flash_attention", &scaled_dot_product_flash_attention);
  library->impl("_scaled_dot_product_flash_attention_backward", &scaled_dot_product_flash_attention_backward);
  overrides = std::move(library);  // an older registration of ours ends after the new one began: no call falls between them
}

void remove_overrides() {
  std::lock_guard<std::mutex> lock(mutex);
  overrides.reset();
}

}  // namespace fa4::aten
