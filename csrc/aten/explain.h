// torch.ops.fa4_ext.explain: what a call would get, for any tensors (meta too) and any device.
// Defined when the library is loaded.
#pragma once

namespace fa4::aten {

// Why torch refused the op, for people to read: the namespace fa4_ext is taken, by another copy of
// this library for example. "" where the op is defined.
const char* explain_problem() noexcept;

}  // namespace fa4::aten
