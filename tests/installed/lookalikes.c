// Stands before torch's own torch_library_impl, by LD_PRELOAD: remembers the kernels that a library
// registers, so that a test can register them for ops of another schema, as a torch to come may
// have.
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

typedef void Kernel(uint64_t* stack, uint64_t num_inputs, uint64_t num_outputs);
typedef int Impl(void* library, const char* op, Kernel* kernel, uint64_t version);
typedef int Init(const char* name_space, const char* key, const char* file, uint32_t line,
                 void** library);

static struct {
  char op[128];
  Kernel* kernel;
} seen[32];
static int count;

static void* of_torch(const char* name) {
  return dlsym(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY), name);
}

int torch_library_impl(void* library, const char* op, Kernel* kernel, uint64_t version) {
  if (count < 32) {
    strncpy(seen[count].op, op, sizeof seen[count].op - 1);
    seen[count++].kernel = kernel;
  }
  return ((Impl*)of_torch("torch_library_impl"))(library, op, kernel, version);
}

// Registers the kernel of an op for another one, in the namespace lookalike, on CPU tensors.
int look_alike(const char* op, const char* other, uint64_t version) {
  for (int i = 0; i < count; ++i) {
    if (strcmp(seen[i].op, op)) continue;
    void* library;
    if (((Init*)of_torch("aoti_torch_library_init_impl"))("lookalike", "CPU", "lookalikes.c", 0,
                                                          &library))
      return 1;
    return ((Impl*)of_torch("torch_library_impl"))(library, other, seen[i].kernel, version);
  }
  return 1;
}
