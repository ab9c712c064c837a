/* fa4_ext's C interface, for programs without Python: FlashAttention-4 kernels behind the ops
   through which PyTorch calls flash attention, cuDNN and memory-efficient attention.

   Link libfa4_ext.so (CMake: find_package(fa4_ext), fa4_ext::fa4_ext), or dlopen it once PyTorch's
   libraries are loaded. Loading it defines the op fa4_ext::explain and nothing else;
   fa4_ext_register() does the rest. Once loaded it stays: dlclose does not unload it, because
   PyTorch keeps pointers into it. Only one copy can be used in a process: another one refuses to
   register, and its fa4_ext_problem() says why.

   at::scaled_dot_product_attention picks a backend before it calls any of the ops below. On Hopper
   and Blackwell it tries cuDNN before flash attention. No function here changes that order, and no
   program needs to: the ops of all three backends are overridden. cuDNN still runs the calls that
   come to its ops
   - where no kernel here covers the call, or a speed rule leaves it to cuDNN,
   - with the option "prefer" at 0,
   - where the program has chosen cuDNN: at::globalContext().setSDPUseFlash(false), or an order of
   its own in setSDPPriorityOrder() that has cuDNN before flash attention,
   - with PyTorch's variable TORCH_CUDNN_SDPA_AVOID_RECOMPILE in the environment.
   What the program has chosen when a dense forward runs also holds for its backward.

   Every function may be called from any thread, concurrently with every other one here; none
   throws. Strings are the library's and are never freed by the caller. A process has one
   registration and one set of options: `import fa4_ext` in the same process uses the same ones, and
   its handles do not know of calls made here. */
#ifndef FA4_EXT_H
#define FA4_EXT_H

#define FA4_EXT_API __attribute__((visibility("default")))

#ifdef __cplusplus
#define FA4_EXT_NOEXCEPT noexcept
extern "C" {
#else
#define FA4_EXT_NOEXCEPT
#endif

/* Why this library cannot be used in this process, found when it was loaded: PyTorch refused to
   define fa4_ext::explain, because another copy of the library, or something else by the name
   fa4_ext, is loaded. "" where it can be used. Valid while the process runs. */
FA4_EXT_API const char* fa4_ext_problem(void) FA4_EXT_NOEXCEPT;

/* Overrides these ops of aten for CUDA tensors in PyTorch's dispatcher, on top of whatever is
   there, PyTorch's own kernels or another provider's:
   - _scaled_dot_product_flash_attention, _scaled_dot_product_flash_attention_backward,
   - _flash_attention_forward, _flash_attention_backward,
   - _flash_attention_forward_no_dropout_inplace, which PyTorch has since 2.12,
   - _scaled_dot_product_cudnn_attention, _scaled_dot_product_cudnn_attention_backward,
   - _cudnn_attention_forward, _cudnn_attention_backward,
   - _cudnn_attention_forward_no_dropout_inplace, which PyTorch has since 2.15,
   - _scaled_dot_product_efficient_attention, _scaled_dot_product_efficient_attention_backward.
   Calling it again moves the overrides to the top; one fa4_ext_remove() undoes any number of calls.
   The overrides that a call replaces keep about 4 KB of memory until then, because another thread
   may be about to run them.

   Needs no GPU, initialises no CUDA and loads no kernel: the first call of an op that needs one
   does. The first override of a kernel in a process makes PyTorch print one warning on stderr,
   "Overriding a previously registered kernel".

   PyTorch's dispatcher writes its tables without a lock that callers take. Registering again while
   these overrides are on top is safe while other threads call these ops, because the old and the
   new overrides do the same. Otherwise, at first or with another provider on top, let no thread be
   inside one of these ops meanwhile: it could run half of one kernel and half of another, and
   crash.

   If PyTorch passes an op a number of arguments that no torch version known here has, the op throws
   a std::exception that says so.

   Returns 0, or 1 with fa4_ext_last_error() set; on failure an earlier registration stays in force.
 */
FA4_EXT_API int fa4_ext_register(void) FA4_EXT_NOEXCEPT;

/* Takes the overrides out of the dispatcher, whoever registered them and however often: PyTorch is
   as before. Does nothing when they are not there. Never safe beside running calls: let no thread
   be inside one of these ops meanwhile. */
FA4_EXT_API void fa4_ext_remove(void) FA4_EXT_NOEXCEPT;

/* Sets an option of the overrides by its name. It takes effect with the next call of an op;
   registering and removing do not change it. Options take 0 or 1:
   - "strict", 0 at first. 1: a call that no kernel here runs throws a std::exception, "FA4 <op>
   unsupported: <reason>". 0: PyTorch's own kernel runs it, the one that PyTorch called. Calls that
   the program leaves to cuDNN, as above, never throw.
   - "speed_rules", 1 at first. 1: calls on which PyTorch's own kernel was measured to be faster are
   treated like calls that no kernel here runs.
   - "prefer", 1 at first. 1: the kernels here also run calls that PyTorch takes to cuDNN or to
   memory-efficient attention. 0: those run all of them.

   Returns 0, or 1 with fa4_ext_last_error() set, which says what is allowed; nothing has changed
   then. */
FA4_EXT_API int fa4_ext_set_option(const char* name, int value) FA4_EXT_NOEXCEPT;

/* Leaves kernels out, from the next call of an op on, so that a program can go on while one of them
   is broken: another kernel runs what it can of their calls, PyTorch's own the others. `patterns`
   are names of kernels, as in fa4_ext_manifest(), separated by commas or spaces, in which * stands
   for any text, ? for one character and [...] for one of several. They replace those of an earlier
   call; "" leaves none out. A kernel needs each of those that it is launched with.
   FA4_EXT_DISABLE in the environment is for `import fa4_ext`: this library does not read it.

   Returns 0, or 1 with fa4_ext_last_error() set where a pattern matches no kernel of this build;
   nothing has changed then. */
FA4_EXT_API int fa4_ext_disable_kernels(const char* patterns) FA4_EXT_NOEXCEPT;

/* Why the calling thread's last failing call failed; "" when none did. Valid until the thread's
 * next failing call or its end. */
FA4_EXT_API const char* fa4_ext_last_error(void) FA4_EXT_NOEXCEPT;

/* A JSON object: the subset and architectures of the kernels, and the versions that they were
   compiled with. Valid while the library is loaded. */
FA4_EXT_API const char* fa4_ext_build_info(void) FA4_EXT_NOEXCEPT;

/* A JSON array with an object for every compiled kernel: its name, arch, registers, sizes. Valid
 * while the library is loaded. */
FA4_EXT_API const char* fa4_ext_manifest(void) FA4_EXT_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#undef FA4_EXT_NOEXCEPT
#undef FA4_EXT_API

#endif
