// Defines torch.ops.fa4_ext.explain, which says what a call would get, for any tensors (meta too)
// and any device. The op is defined when the library is loaded.
#pragma once

namespace fa4::aten {

// Returns why torch refused the op, for people to read: another copy of this library has taken the
// namespace fa4_ext, for example. The text is empty where the op is defined.
const char* explain_problem() noexcept;

}  // namespace fa4::aten
