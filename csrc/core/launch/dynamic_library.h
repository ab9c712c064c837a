// dlopen, dlsym and dladdr under the versions that every glibc since 2.28 has: 2.34 moved them into
// libc.so.6 and gave them new ones.
#pragma once

#include <dlfcn.h>

#ifdef __x86_64__
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dladdr,dladdr@GLIBC_2.2.5");
#endif
