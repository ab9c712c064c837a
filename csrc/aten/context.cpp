#include "context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "torch_symbol.h"

namespace fa4::aten {
namespace {

// These are at::SDPBackend's numbers.
constexpr int32_t kMath = 0, kFlash = 1, kEfficient = 2, kCudnn = 3, kOverrideable = 4;
using Backends = std::array<int32_t, 5>;
// torch returns a std::array with as many elements as it has backends. An array of that size comes
// back in memory of the caller, where there is room for more of them.
struct BackendsInOrder {
  Backends known;
  int32_t room[59];
};

// These are at::globalContext() and some of its getters, which every torch since 2.11 exports.
struct Context {
  void* context = nullptr;
  bool (*deterministic)(const void*) = nullptr;
  bool (*warn_only)(const void*) = nullptr;
  bool (*flash_enabled)(const void*) = nullptr;
  BackendsInOrder (*backends_in_order)(void*) = nullptr;
};

Context find_context() {
  constexpr const char* kLibrary = "libtorch_cpu.so";
  Context found;
  const auto global_context = torch_function<void*()>(kLibrary, "_ZN2at13globalContextEv");
  if (global_context) found.context = global_context();
  found.deterministic =
      torch_function<bool(const void*)>(kLibrary, "_ZNK2at7Context23deterministicAlgorithmsEv");
  found.warn_only = torch_function<bool(const void*)>(
      kLibrary, "_ZNK2at7Context31deterministicAlgorithmsWarnOnlyEv");
  found.flash_enabled =
      torch_function<bool(const void*)>(kLibrary, "_ZNK2at7Context19userEnabledFlashSDPEv");
  found.backends_in_order =
      torch_function<BackendsInOrder(void*)>(kLibrary, "_ZN2at7Context16sDPPriorityOrderEv");
  return found;
}

const Context& context() {
  static const Context found = find_context();
  return found;
}

bool put_before_flash(int32_t backend) {
  if (!context().context || !context().backends_in_order) return false;
  constexpr Backends kTorchsOwn{kCudnn, kFlash, kEfficient, kMath, kOverrideable};
  const Backends order = context().backends_in_order(context().context).known;
  const auto place = [&](int32_t one) { return std::find(order.begin(), order.end(), one); };
  return order != kTorchsOwn && place(backend) < place(kFlash);
}

bool known() { return context().context && context().deterministic && context().warn_only; }

}  // namespace

bool deterministic_algorithms() {
  if (!known()) return true;  // A deterministic backward is never wrong.
  return context().deterministic(context().context) && !context().warn_only(context().context);
}

bool flash_enabled() {
  return context().context && context().flash_enabled && context().flash_enabled(context().context);
}

bool cudnn_put_first() { return put_before_flash(kCudnn); }

bool efficient_put_first() { return put_before_flash(kEfficient); }

bool wants_gradient(std::initializer_list<AtenTensorHandle> tensors) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  static const auto requires_grad =
      torch_function<bool(const void*)>("libc10.so", "_ZNK3c1010TensorImpl13requires_gradEv");
  if (!requires_grad) return true;
  // A handle points to an at::Tensor, which is one pointer to a c10::TensorImpl.
  return std::any_of(tensors.begin(), tensors.end(), [](AtenTensorHandle tensor) {
    return requires_grad(*reinterpret_cast<void**>(tensor));
  });
}

void warn_of_nondeterminism() {
  if (!known() || !context().deterministic(context().context) ||
      !context().warn_only(context().context))
    return;
  static const bool warned = [] {  // The warning comes once a process.
    aoti_torch_warn("fa4_ext", "backward", 0,
                    "Flash Attention defaults to a non-deterministic algorithm. "
                    "torch.use_deterministic_algorithms(True, warn_only=False) "
                    "makes its gradients the same in every run.");
    return true;
  }();
  static_cast<void>(warned);
}

}  // namespace fa4::aten
