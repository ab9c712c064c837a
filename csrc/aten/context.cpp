#include "context.h"

#include <dlfcn.h>

__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");

namespace fa4::aten {
namespace {

// at::globalContext() and two of its getters, in the libtorch_cpu.so that is already loaded. Looked up by name at run time, because
// linking to them would tie the library to a torch version; every torch since 2.11 exports them.
struct Context {
  const void* context = nullptr;
  bool (*deterministic)(const void*) = nullptr;
  bool (*warn_only)(const void*) = nullptr;
};

Context find_context() {
  Context found;
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return found;
  const auto global_context = reinterpret_cast<void* (*)()>(dlsym(library, "_ZN2at13globalContextEv"));
  if (global_context) found.context = global_context();
  found.deterministic = reinterpret_cast<bool (*)(const void*)>(dlsym(library, "_ZNK2at7Context23deterministicAlgorithmsEv"));
  found.warn_only = reinterpret_cast<bool (*)(const void*)>(dlsym(library, "_ZNK2at7Context31deterministicAlgorithmsWarnOnlyEv"));
  return found;
}

}  // namespace

bool deterministic_algorithms() {
  static const Context torch = find_context();
  if (!torch.context || !torch.deterministic || !torch.warn_only) return true;  // unknown: the same bits are never wrong
  return torch.deterministic(torch.context) && !torch.warn_only(torch.context);
}

}  // namespace fa4::aten
