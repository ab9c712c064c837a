#include "torch_symbol.h"

#include <dlfcn.h>

// glibc moved these into libc.so.6 under new versions in 2.34; the old names serve every glibc since 2.28.
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");

namespace fa4::aten {

void* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

}  // namespace fa4::aten
