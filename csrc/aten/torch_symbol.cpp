#include "torch_symbol.h"

#include "../core/launch/dynamic_library.h"

namespace fa4::aten {

void* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

}  // namespace fa4::aten
