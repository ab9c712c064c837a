// Exports the library's C functions. Their headers say what they promise: fa4_ext.h to programs
// without Python and to fa4_ext/_library.py, overrides_api.h to measurements and tests.
#include "fa4_ext.h"

#include <cstdio>
#include <exception>

#include "../core/plan/kernel_table.h"
#include "options.h"
#include "overrides_api.h"
#include "own_ops.h"
#include "registration.h"

namespace {

// The text is not a std::string, because keeping an error must not raise another.
thread_local char last_error[4096] = "";

int failed(const char* what) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", what);
  return 1;
}

// Returns 0. Where `function` throws, it sets the last error and returns 1.
template <class Function>
int attempt(Function&& function) noexcept {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("an exception that is no std::exception");
  }
}

}  // namespace

const char* fa4_ext_problem() noexcept { return fa4::aten::own_ops_problem(); }

int fa4_ext_register() noexcept { return attempt(fa4::aten::register_overrides); }

void fa4_ext_remove() noexcept { fa4::aten::remove_overrides(); }

int fa4_ext_set_option(const char* name, int value) noexcept {
  return attempt([&] { fa4::aten::set_option(name, value); });
}

int fa4_ext_disable_kernels(const char* patterns) noexcept {
  return attempt([&] { fa4::aten::disable_kernels(patterns); });
}

void fa4_ext_override(int tile_queries, int tile_keys, int num_ctas, int paired_heads,
                      int decode) noexcept {
  fa4::Overrides overrides;
  overrides.tile = {tile_queries, tile_keys};
  overrides.schedule = {num_ctas, paired_heads};
  if (decode > 0) overrides.decode = fa4::Decode::kWherePossible;
  if (decode < 0) overrides.decode = fa4::Decode::kWhereNeeded;
  fa4::aten::set_overrides(overrides);
}

const char* fa4_ext_last_error() noexcept { return last_error; }

const char* fa4_ext_build_info() noexcept { return fa4::kBuildInfo; }

const char* fa4_ext_manifest() noexcept { return fa4::kManifest; }
