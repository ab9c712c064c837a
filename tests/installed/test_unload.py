"""The library stays loaded: PyTorch's dispatcher keeps pointers into it."""

from __future__ import annotations

from processes import run

CALL = """
import ctypes, sys, torch
from pathlib import Path
from importlib.util import find_spec

# The library alone, without the package.
path = str(Path(find_spec("fa4_ext").origin).with_name("libfa4_ext.so"))
library = ctypes.CDLL(path)
assert library.fa4_ext_register() == 0
assert library.fa4_ext_set_option(b"strict", 1) == 0  # a call that no kernel runs raises
ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
"""


def test_a_call_after_dlclose_still_runs_the_overrides():
    run(
        CALL
        + """
assert path in Path("/proc/self/maps").read_text()
query = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
# CPU tensors would never get there on their own.
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.aten._scaled_dot_product_flash_attention.default.redispatch(cuda, query, query, query)
except RuntimeError as error:
    assert "unsupported: inputs must be CUDA tensors" in str(error), error
else:
    raise AssertionError("the call did not get to the override")
"""
    )
