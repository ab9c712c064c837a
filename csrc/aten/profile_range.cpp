#include "profile_range.h"

#include "torch_symbol.h"

namespace fa4::aten {
namespace {

// These functions are in torch's C shim, but under names that its stable interface does not
// promise.
struct RecordFunction {
  decltype(&aoti_record_function_start) start = nullptr;
  decltype(&aoti_record_function_end) end = nullptr;
};

RecordFunction find_record_function() {
  constexpr const char* kLibrary = "libtorch_cpu.so";
  RecordFunction found;
  found.start =
      torch_function<decltype(aoti_record_function_start)>(kLibrary, "aoti_record_function_start");
  found.end =
      torch_function<decltype(aoti_record_function_end)>(kLibrary, "aoti_record_function_end");
  return found;
}

const RecordFunction& record_function() {
  static const RecordFunction found = find_record_function();
  return found;
}

}  // namespace

ProfileRange::ProfileRange(const char* name) {
  const RecordFunction& record = record_function();
  if (!record.start || !record.end) return;
  if (record.start(name, nullptr, nullptr, 0, &range_) != AOTI_TORCH_SUCCESS) range_ = nullptr;
}

ProfileRange::~ProfileRange() {
  if (range_) record_function().end(range_);
}

}  // namespace fa4::aten
