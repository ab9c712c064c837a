"""Checks what the library takes from torch by name: it is there in this torch, and declared as the
library calls it."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path

import pytest
import torch
from processes import run
from test_schemas import (
    ARGUMENTS_AND_RESULTS,
    CUDNN_INPLACE,
    EFFICIENT,
    EFFICIENT_BACKWARD,
    INPLACE,
)
from this_torch import HAS_CUDA, VERSION

import fa4_ext

LIBRARY = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
INCLUDE = Path(torch.__file__).parent / "include"
HEADER = INCLUDE / "torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h"
SHIM = "aoti_torch_cuda_"
FORWARD_CPP = (
    "_ZN2at4cuda24_flash_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_lldbbS4_IdES4_Il"
    "ES9_S7_S7_"
)
FORWARD_V2_CPP = FORWARD_CPP + "S7_S9_"
CUDNN_FORWARD_CPP = (
    "_ZN2at4cuda24_cudnn_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_S7_llbdbbS4_IdE"
)
CUDNN_FORWARD_V2_CPP = CUDNN_FORWARD_CPP + "S7_S7_"
CUDNN_INPLACE_CPP = (
    "_ZN2at4cuda43_cudnn_attention_forward_no_dropout_inplaceERNS_6TensorERKS1_S4_S4_S4_"
    "RKSt8optionalIS1_EllbS5_IdES8_S8_"
)
INPLACE_CPP = (
    "_ZN2at4cuda43_flash_attention_forward_no_dropout_inplaceERNS_6TensorERKS1_S4_S4_RKSt8optionalIS1_ES8_lldbbS5_IdES5_IlESA_S8_S8_"
    "S8_SA_"
)
# Looked up at run time, because older versions lack them.
SINCE = {
    "aoti_torch_cuda__flash_attention_forward_v2": (2, 12),
    "aoti_torch_cuda__flash_attention_forward_no_dropout_inplace_v2": (2, 12),
    "torch_exception_get_what_without_backtrace": (2, 13),
    FORWARD_V2_CPP: (2, 12),
    INPLACE_CPP: (2, 12),
    CUDNN_FORWARD_V2_CPP: (2, 14),
    CUDNN_INPLACE_CPP: (2, 15),
}
# The last version that has the function.
UNTIL = {FORWARD_CPP: (2, 11), CUDNN_FORWARD_CPP: (2, 13)}
OUT_OF_MEMORY = (
    "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    "_ZTVN3c1016OutOfMemoryErrorE", "_ZTIN3c1016OutOfMemoryErrorE",
)  # fmt: skip
ALLOCATION = "_ZN2at6detail18empty_strided_cudaE"
FORWARD_V1_ARGUMENTS = 15


def names() -> list[str]:
    """Returns imports, weak ones too, and what it passes to dlsym. All of them lie in the file as
    text that a zero byte ends."""
    found = re.findall(
        rb"(?<![\w.])((?:aoti_torch|aoti_record_function|torch)_\w+|_ZNK?2at\w+|_Z\w*3c10\w+)(?=\0)",
        LIBRARY.read_bytes(),
    )
    return sorted({name.decode() for name in found})


def shims() -> list[str]:
    """Returns the stock kernels among them that this torch should have."""
    return [
        name for name in names() if name.startswith(SHIM) and SINCE.get(name, VERSION) <= VERSION
    ]


def loaded(library: str) -> ctypes.CDLL:
    return ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)


def test_names_of_every_kind_are_found_in_the_library():
    assert set(names()) >= {
        "aoti_torch_library_init_impl", "aoti_torch_cuda__flash_attention_forward",
        "aoti_torch_cuda__flash_attention_forward_v2",
        "torch_exception_get_what_without_backtrace", "_ZN2at13globalContextEv",
        "aoti_record_function_start",
        FORWARD_CPP, FORWARD_V2_CPP, INPLACE_CPP, CUDNN_FORWARD_CPP, CUDNN_FORWARD_V2_CPP,
        CUDNN_INPLACE_CPP,
        *OUT_OF_MEMORY,
        "_ZN2at4_ops5copy_4callERNS_6TensorERKS2_b",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in names() if name not in OUT_OF_MEMORY])
def test_name_resolves_in_the_versions_that_have_it(name):
    needs_cuda = (
        name.startswith((SHIM, "_ZN2at4cuda", ALLOCATION))
        or name == "aoti_torch_get_current_cuda_stream"
    )
    expected = SINCE.get(name, (2, 11)) <= VERSION <= UNTIL.get(name, VERSION) and (
        HAS_CUDA or not needs_cuda
    )
    # The dynamic linker sees these from our library.
    assert hasattr(ctypes.CDLL(str(LIBRARY)), name) == expected
    # dlsym finds these.
    assert (
        hasattr(loaded("libtorch_cuda.so" if needs_cuda and HAS_CUDA else "libtorch_cpu.so"), name)
        == expected
    )


@pytest.mark.skipif(
    not HAS_CUDA and VERSION < (2, 13), reason="before torch 2.13 CUDA builds alone have the class"
)
def test_the_class_of_torchs_out_of_memory_error_is_there():
    """All of it is in one library, libc10 or libc10_cuda, except for the base's constructor, which
    libc10 has."""
    constructor, *rest = OUT_OF_MEMORY
    libraries = ["libc10.so", *(["libc10_cuda.so"] if HAS_CUDA else [])]
    assert hasattr(loaded("libc10.so"), constructor)
    assert any(all(hasattr(loaded(library), name) for name in rest) for library in libraries)


# The C++ functions return these, which their mangled names leave out.
FIVE, FOUR, THREE = (f"::std::tuple<{','.join(count * ['at::Tensor'])}>" for count in (5, 4, 3))
NINE = f"::std::tuple<{4 * 'at::Tensor,'}{2 * 'c10::SymInt,'}at::Tensor,at::Tensor,at::Tensor>"
RETURNED = {
    "_flash_attention_forward": FIVE, "_flash_attention_backward": THREE, INPLACE: "at::Tensor",
    "_scaled_dot_product_flash_attention": NINE,
    "_scaled_dot_product_flash_attention_backward": THREE,
    "_scaled_dot_product_cudnn_attention": NINE, "_cudnn_attention_forward": NINE,
    "_scaled_dot_product_cudnn_attention_backward": THREE, "_cudnn_attention_backward": THREE,
    CUDNN_INPLACE: "at::Tensor", EFFICIENT: FOUR, EFFICIENT_BACKWARD: FOUR,
}  # fmt: skip


@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
def test_cpp_function_returns_what_we_take(op):
    declared = (INCLUDE / f"ATen/ops/{op}_cuda_dispatch.h").read_text()
    assert set(re.findall(rf"TORCH_\w*API (\S.*) {op}\(", declared)) == {RETURNED[op]}


C_TYPES = {
    "Tensor": "AtenTensorHandle", "Tensor(a!)": "AtenTensorHandle", "Tensor?": "AtenTensorHandle*",
    "int": "int64_t",
    "int?": "int64_t*", "float": "double", "float?": "double*", "bool": "int32_t",
    "bool[4]": "const int32_t*, int64_t",
}  # fmt: skip


@pytest.mark.parametrize("shim", shims())
def test_shim_is_declared_as_it_is_called(shim):
    op = shim.removeprefix(SHIM).removesuffix("_v2")
    arguments, results = ARGUMENTS_AND_RESULTS[op]
    types = [C_TYPES[argument.split()[0]] for argument in arguments.split(", ")]
    if shim == "aoti_torch_cuda__flash_attention_forward":
        types = types[:FORWARD_V1_ARGUMENTS]
    types = [one for several in types for one in several.split(", ")]
    types += [C_TYPES[result] + "*" for result in results]
    (declared,) = re.findall(rf"AOTITorchError {shim}\((.*)\);", HEADER.read_text())
    assert [parameter.rpartition(" ")[0] for parameter in declared.split(", ")] == types


def test_no_cuda_runtime_is_named():
    assert b"libcudart" not in LIBRARY.read_bytes()


# The rows and head dims of each tensor. With other ranks, some ops look for a dimension that is not
# there.
SHAPES = {"right": (1, 16, 8, 64), "two_dims": (16, 64), "one_dim": (64,)}


@pytest.mark.skipif(not HAS_CUDA, reason="a CPU build of torch has no stock kernels")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
def test_a_call_left_to_the_stock_kernel_fails_as_it_does_without_us(op, shape):
    """Without a GPU a stock kernel can be seen to raise errors only: for want of one, or before it
    looks for one."""
    done = run(
        f"""
        import json
        import torch
        import fa4_ext

        tensor = torch.zeros({SHAPES[shape]}, dtype=torch.bfloat16)
        rows, one = torch.zeros(1, 8, 16), torch.zeros(())
        lengths = (None, None, 16, 16)
        forward = (tensor,) * 3
        backward = (*(tensor,) * 5, rows, *lengths, 0.0, False, one, one)
        # A seed that begins behind its memory's first two numbers is that of our forward.
        seed, offsets = torch.zeros(3)[2], torch.zeros(2, dtype=torch.int32)
        packed = (offsets, offsets, 16, 16)
        cudnn_backward = (*(tensor,) * 5, rows, seed, one, None)
        arguments = {{
            "_scaled_dot_product_flash_attention": forward,
            "_scaled_dot_product_flash_attention_backward": backward,
            "_flash_attention_forward": (*forward, *lengths, 0.0, False, False),
            "_flash_attention_backward": backward,
            {INPLACE!r}: (tensor, *forward, *lengths, 0.0, False, False),
            "_scaled_dot_product_cudnn_attention": (*forward, None, True),
            "_scaled_dot_product_cudnn_attention_backward":
                (*cudnn_backward, *lengths, 0.0, False),
            "_cudnn_attention_forward": (*forward, None, *lengths, True),
            "_cudnn_attention_backward": (*cudnn_backward, *lengths, 0.0, False),
            {CUDNN_INPLACE!r}: (tensor, *forward, *packed, False),
            {EFFICIENT!r}: (*forward, None, True),
            {EFFICIENT_BACKWARD!r}:
                (tensor, *forward, None, tensor, rows, one, one, 0.0, [True, True, True, False]),
        }}[{op!r}]
        # CPU tensors would never get there on their own.
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def error():
            try:
                torch.ops.aten.{op}.default.redispatch(cuda, *arguments)
            except Exception as error:
                # Other lines may list what is registered, fa4_ext too.
                return type(error).__name__, str(error).splitlines()[0]

        without = error()
        with fa4_ext.register():
            print(json.dumps([without, error()]))
        """,
        FA4_EXT_AUTOREGISTER="0",
    )
    stock, ours = json.loads(done.stdout)
    assert stock and ours == stock
    if shape == "one_dim" and "scaled_dot_product_flash" in op:
        assert stock[0] == "IndexError", "of the cases none has a type of its own"
    if SINCE["torch_exception_get_what_without_backtrace"] <= VERSION:
        # Before this version, torch's C interface prints what it catches.
        assert "Exception in aoti_torch" not in done.stderr


def test_the_order_of_backends_is_returned_as_we_take_it():
    """torch returns a std::array by value, which its mangled name does not say."""

    class Backends(ctypes.Structure):
        _fields_ = (("numbers", ctypes.c_int32 * 64),)

    torch_cpu = loaded("libtorch_cpu.so")
    context, order = torch_cpu._ZN2at13globalContextEv, torch_cpu._ZN2at7Context16sDPPriorityOrderEv
    context.restype, order.restype, order.argtypes = ctypes.c_void_p, Backends, (ctypes.c_void_p,)
    expected = torch._C._get_sdp_priority_order()
    assert len(expected) >= 5, "fewer would come back in registers"
    assert list(order(context()).numbers[: len(expected)]) == expected
