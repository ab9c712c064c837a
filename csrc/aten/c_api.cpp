// The library's exported C functions. The header says what they promise, to fa4_ext/_library.py and
// to programs without Python.
#include "fa4_ext.h"

#include <cstdio>
#include <exception>

#include "../core/plan/kernel_table.h"
#include "explain.h"
#include "options.h"
#include "registration.h"

namespace {

thread_local char last_error[4096] =
    "";  // not a std::string: keeping an error must not raise another

int failed(const char* what) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", what);
  return 1;
}

}  // namespace

const char* fa4_ext_problem() noexcept { return fa4::aten::explain_problem(); }

int fa4_ext_register() noexcept {
  try {
    fa4::aten::register_overrides();
    return 0;
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("an exception that is no std::exception");
  }
}

void fa4_ext_remove() noexcept { fa4::aten::remove_overrides(); }

void fa4_ext_configure(int strict, int speed_rules) noexcept {
  fa4::aten::options().strict = strict != 0;
  fa4::aten::options().speed_rules = speed_rules != 0;
}

void fa4_ext_force_tile(int queries, int keys) noexcept {
  fa4::aten::options().tile = fa4::Tile{queries, keys};
}

void fa4_ext_force_dealing(int workers, int paired) noexcept {
  fa4::aten::options().dealing = fa4::Dealing{workers, paired};
}

void fa4_ext_force_decode(int where) noexcept {
  fa4::aten::options().decode = where > 0   ? fa4::Decode::kWherePossible
                                : where < 0 ? fa4::Decode::kWhereNeeded
                                            : fa4::Decode::kWhereFaster;
}

const char* fa4_ext_last_error() noexcept { return last_error; }

const char* fa4_ext_build_info() noexcept { return fa4::kBuildInfo; }

const char* fa4_ext_manifest() noexcept { return fa4::kManifest; }
