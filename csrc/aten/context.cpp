#include "context.h"

#include "torch_symbol.h"

namespace fa4::aten {
namespace {

// at::globalContext() and two of its getters, which every torch since 2.11 exports.
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
  found.deterministic = torch_function<bool(const void*)>(kLibrary, "_ZNK2at7Context23deterministicAlgorithmsEv");
  found.warn_only = torch_function<bool(const void*)>(kLibrary, "_ZNK2at7Context31deterministicAlgorithmsWarnOnlyEv");
  return found;
}

}  // namespace

bool deterministic_algorithms() {
  static const Context torch = find_context();
  if (!torch.context || !torch.deterministic || !torch.warn_only) return true;  // unknown: the same bits are never wrong
  return torch.deterministic(torch.context) && !torch.warn_only(torch.context);
}

}  // namespace fa4::aten
