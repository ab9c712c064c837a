"""The functions of the package flash-attn, on this library's kernels.

They take the arguments of flash-attn 2, 3 and 4 that the kernels can honour, by the names that
those have, and refuse the others by name. Arguments behind the tensors and lengths are keywords
only, because flash-attn 2 has dropout_p where flash-attn 3 has softmax_scale. They return the
output alone, as flash-attn 2 and 3 do, and a pair with return_lse=True; flash-attn 4 always returns
a pair.

They need no registration. A call that no kernel covers, on another GPU for example, runs PyTorch's
flash attention. `fa4_ext.explain` says which calls that are. All functions work under
torch.compile with fullgraph=True, and all but those with a cache are differentiable.
"""

from __future__ import annotations

from ._cache import flash_attn_with_kvcache
from ._functions import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
