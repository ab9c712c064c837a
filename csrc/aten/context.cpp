#include "context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "torch_symbol.h"

namespace fa4::aten {
namespace {

// These are at::globalContext() and two of its getters, which every torch since 2.11 exports.
struct Context {
  const void* context = nullptr;
  bool (*deterministic)(const void*) = nullptr;
  bool (*warn_only)(const void*) = nullptr;
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
  return found;
}

const Context& context() {
  static const Context found = find_context();
  return found;
}

bool known() { return context().context && context().deterministic && context().warn_only; }

}  // namespace

bool deterministic_algorithms() {
  if (!known()) return true;  // A deterministic backward is never wrong.
  return context().deterministic(context().context) && !context().warn_only(context().context);
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
