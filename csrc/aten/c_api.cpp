// The library's exported C functions, for fa4_ext/_library.py and for programs without Python.
#include <exception>
#include <string>

#include "../core/kernel_table.h"
#include "options.h"
#include "registration.h"

#define FA4_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string last_error;

}  // namespace

// Registers the overrides, on top of whatever is registered. Returns 0, or 1 with fa4_ext_last_error() set.
FA4_EXPORT int fa4_ext_register() {
  try {
    fa4::aten::register_overrides();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

// `strict`: raise where the stock kernel would be called. `speed_rules`: leave to the stock kernel what it runs faster.
FA4_EXPORT void fa4_ext_configure(int strict, int speed_rules) {
  fa4::aten::options().strict = strict != 0;
  fa4::aten::options().speed_rules = speed_rules != 0;
}

FA4_EXPORT void fa4_ext_remove() { fa4::aten::remove_overrides(); }

FA4_EXPORT const char* fa4_ext_last_error() { return last_error.c_str(); }

FA4_EXPORT const char* fa4_ext_build_info() { return fa4::kBuildInfo; }

FA4_EXPORT const char* fa4_ext_manifest() { return fa4::kManifest; }
