"""What the library takes from torch by name: there in this torch, and declared as the library calls it."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from processes import run
from test_schemas import ARGUMENTS_AND_RESULTS, INPLACE
from this_torch import HAS_CUDA, VERSION

import fa4_ext

LIBRARY = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
HEADER = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h"
SHIM = "aoti_torch_cuda_"
# Looked up at run time, because older versions lack them.
SINCE = {
    "aoti_torch_cuda__flash_attention_forward_v2": (2, 12),
    "aoti_torch_cuda__flash_attention_forward_no_dropout_inplace_v2": (2, 12),
    "torch_exception_get_what_without_backtrace": (2, 13),
}
FORWARD_V1_ARGUMENTS = 15


def names() -> list[str]:
    """Imports, weak ones too, and what it passes to dlsym: all of them lie in the file as text that a zero byte ends."""
    found = re.findall(rb"(?<![\w.])((?:aoti_torch|aoti_record_function|torch)_\w+|_ZNK?2at\w+)(?=\0)", LIBRARY.read_bytes())
    return sorted({name.decode() for name in found})


def shims() -> list[str]:
    """The stock kernels among them that this torch should have."""
    return [name for name in names() if name.startswith(SHIM) and SINCE.get(name, VERSION) <= VERSION]


def loaded(library: str) -> ctypes.CDLL:
    return ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)


def test_names_of_every_kind_are_found_in_the_library():
    assert set(names()) >= {
        "aoti_torch_library_init_impl", "aoti_torch_cuda__flash_attention_forward", "aoti_torch_cuda__flash_attention_forward_v2",
        "torch_exception_get_what_without_backtrace", "_ZN2at13globalContextEv", "aoti_record_function_start",
    }  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_name_resolves_from_the_version_on_that_has_it(name):
    needs_cuda = name.startswith(SHIM) or name == "aoti_torch_get_current_cuda_stream"
    expected = SINCE.get(name, (2, 11)) <= VERSION and (HAS_CUDA or not needs_cuda)
    assert hasattr(ctypes.CDLL(str(LIBRARY)), name) == expected  # what the dynamic linker sees from our library
    assert hasattr(loaded("libtorch_cuda.so" if needs_cuda and HAS_CUDA else "libtorch_cpu.so"), name) == expected  # dlsym


C_TYPES = {
    "Tensor": "AtenTensorHandle", "Tensor(a!)": "AtenTensorHandle", "Tensor?": "AtenTensorHandle*", "int": "int64_t",
    "int?": "int64_t*", "float": "double", "float?": "double*", "bool": "int32_t",
}  # fmt: skip


@pytest.mark.parametrize("shim", shims())
def test_shim_is_declared_as_it_is_called(shim):
    op = shim.removeprefix(SHIM).removesuffix("_v2")
    arguments, results = ARGUMENTS_AND_RESULTS[op]
    types = [C_TYPES[argument.split()[0]] for argument in arguments.split(", ")]
    if shim == "aoti_torch_cuda__flash_attention_forward":
        types = types[:FORWARD_V1_ARGUMENTS]
    types += [C_TYPES[result] + "*" for result in results]
    (declared,) = re.findall(rf"AOTITorchError {shim}\((.*)\);", HEADER.read_text())
    assert [parameter.rpartition(" ")[0] for parameter in declared.split(", ")] == types


def test_no_cuda_runtime_is_named():
    assert b"libcudart" not in LIBRARY.read_bytes()


@pytest.mark.skipif(not HAS_CUDA, reason="a CPU build of torch has no stock kernels")
@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
def test_a_call_left_to_the_stock_kernel_fails_as_it_does_without_us(op):
    """Of stock kernels no more can be seen without a GPU than the error that they raise for want of one."""
    done = run(
        f"""
        import torch
        import fa4_ext

        tensor, rows, one = torch.zeros(1, 16, 8, 64, dtype=torch.bfloat16), torch.zeros(1, 8, 16), torch.zeros(())
        lengths = (None, None, 16, 16)
        forward = (tensor,) * 3
        backward = (*(tensor,) * 5, rows, *lengths, 0.0, False, one, one)
        arguments = {{
            "_scaled_dot_product_flash_attention": forward,
            "_scaled_dot_product_flash_attention_backward": backward,
            "_flash_attention_forward": (*forward, *lengths, 0.0, False, False),
            "_flash_attention_backward": backward,
            {INPLACE!r}: (tensor, *forward, *lengths, 0.0, False, False),
        }}[{op!r}]
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # CPU tensors would never get there on their own

        def error():
            try:
                torch.ops.aten.{op}.default.redispatch(cuda, *arguments)
            except RuntimeError as error:
                return str(error).splitlines()[0]

        print(error())
        with fa4_ext.register():
            print(error())
        """,
        FA4_EXT_AUTOREGISTER="0",
    )
    stock, ours = done.stdout.splitlines()
    assert stock not in ("", "None")
    has_text = SINCE["torch_exception_get_what_without_backtrace"] <= VERSION
    assert stock in (ours if has_text else ours + done.stderr)
