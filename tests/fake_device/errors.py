"""Calls the overrides with tensors of the CPU, behind device.c, where something fails; prints what
they raise, a JSON a step."""

import ctypes
import io
import json
import sys
from collections.abc import Callable

import torch
from torch._subclasses.schema_check_mode import SchemaCheckMode

import fa4_ext

device = ctypes.CDLL("libcuda.so.1")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
aten = torch.ops.aten
MIB = 2**20


def fake(**values: int) -> None:
    """Sets what the driver does from now on."""
    for name, value in values.items():
        (ctypes.c_int64 if name == "free_memory" else ctypes.c_int).in_dll(
            device, name
        ).value = value


def outcome(call: Callable) -> None:
    """Prints the type and the text of what it raises, or the layout of what it returns."""
    try:
        results = call()
    except Exception as error:
        found = {
            "type": type(error).__name__,
            "text": str(error),
            "out_of_memory": isinstance(error, torch.OutOfMemoryError),
        }
    else:
        results = results if isinstance(results, tuple) else (results,)
        found = {
            "results": [
                [list(t.shape), list(t.stride()), str(t.dtype)]
                for t in results
                if isinstance(t, torch.Tensor)
            ]
        }
    print(json.dumps(found))


q, k, v = (torch.randn(2, 129, 4, 128, dtype=torch.bfloat16) for _ in range(3))
LENGTHS = (None, None, 129, 129, 0.0, True)


def forward():
    return aten._flash_attention_forward.default.redispatch(CUDA, q, k, v, *LENGTHS, False)


def backward(results):
    out, lse, rng_state, unused, _ = results
    arguments = torch.randn_like(out), q, k, v, out, lse, *LENGTHS, rng_state, unused
    return aten._flash_attention_backward.default.redispatch(CUDA, *arguments)


def misaligned() -> torch.Tensor:
    return torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)


def inplace(out: torch.Tensor):
    return aten._flash_attention_forward_no_dropout_inplace.default.redispatch(
        CUDA, out, q, k, v, *LENGTHS, False
    )


def allocation() -> None:
    """Makes torch's C function fail: first its C++ function does what it would have done, then it
    raises."""
    outcome(forward)
    for failing in (1, 5):
        fake(failing_allocations=failing)
        outcome(forward)
    results = forward()
    outcome(lambda: backward(results))
    fake(failing_allocations=4)
    outcome(lambda: backward(results))
    fake(impossible_allocations=1)
    outcome(forward)
    fake(impossible_allocations=1)
    outcome(lambda: backward(results))
    outcome(forward)


def copy() -> None:
    fake(failing_copies=1)
    outcome(lambda: inplace(misaligned()))
    outcome(lambda: inplace(torch.zeros(2, 129, 1, 128, dtype=q.dtype).expand(q.shape)))


def module() -> None:
    """Makes the loading of a kernel's code fail. The arguments say what fails, with which result,
    and how much memory is free, in MiB."""
    failing, value, free = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    fake(free_memory=free * MIB, **{failing: value})
    outcome(forward)
    fake(free_memory=2**36, **{failing: 0})
    outcome(forward)
    fake(free_memory=free * MIB, **{failing: value})
    outcome(forward)


def clusters() -> None:
    """Has the driver say of the decode kernel's clusters what the arguments are: a result, and how
    many can be active."""
    result, active = map(int, sys.argv[2:])
    keys = torch.zeros(2, 4096, 4, 128, dtype=q.dtype)

    def few_queries():
        out, *_ = aten._flash_attention_forward.default.redispatch(
            CUDA, q[:, :1], keys, keys, None, None, 1, 4096, 0.0, False, False
        )
        return out

    fake(clusters_result=result, active_clusters=active)
    outcome(few_queries)
    fake(clusters_result=0, active_clusters=1)
    outcome(few_queries)


def context() -> None:
    """Launches on streams of a context that is not the primary one."""
    fake(other_context=1)
    outcome(forward)
    for free in (2**36, 3 * MIB):
        fake(launch_result=1, free_memory=free)
        outcome(forward)
    # The function of the primary context is not asked for, even if the context's SMs are not known.
    fake(launch_result=0, function_result=2, resource_result=999)
    outcome(forward)


def undefined() -> None:
    """Makes a tensor of torch's C++ function, for which there is no handle."""
    for failing in (1, 2):
        fake(failing_allocations=1, failing_undefined=failing)
        outcome(forward)
    outcome(forward)


def results() -> None:
    """Handles the results of the op as programs do that rely on its schema."""
    library = torch.library.Library("aten", "IMPL")
    for op in (aten._flash_attention_forward.default, aten._flash_attention_backward.default):
        library.impl(
            op.name().removeprefix("aten::"),
            lambda *given, _op=op: _op.redispatch(CUDA, *given),
            "CPU",
        )

    @torch.library.custom_op("fake_device::attention", mutates_args=())
    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return aten._flash_attention_forward(q, k, v, *LENGTHS, False)[:4]

    outcome(lambda: attention(q, k, v))
    with SchemaCheckMode():
        found = aten._flash_attention_forward(q, k, v, *LENGTHS, False)
        out, lse, rng_state, unused, _ = found
        gradients = aten._flash_attention_backward(
            torch.randn_like(out), q, k, v, out, lse, *LENGTHS, rng_state, unused
        )
    print(
        json.dumps(
            {"storages": [t.untyped_storage()._cdata for t in (q, k, v, *found, *gradients)]}
        )
    )
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    outcome(lambda: tuple(torch.load(file)))


def driver() -> None:
    """Runs three calls with a driver that is too old."""
    fake(driver_version=12080)
    outcome(forward)
    fake(version_questions=0)
    outcome(forward)
    outcome(forward)
    print(json.dumps({"questions": ctypes.c_int.in_dll(device, "version_questions").value}))


with fa4_ext.register(fallback="error", speed_rules=False):
    {
        "allocation": allocation,
        "clusters": clusters,
        "context": context,
        "copy": copy,
        "driver": driver,
        "module": module,
        "results": results,
        "undefined": undefined,
    }[sys.argv[1]]()
