"""Lists what can be wrong with a call. None of it makes PyTorch's kernel or ours read or write
outside of a tensor.

On the host PyTorch's kernel checks dtype, rank, size, stride and device of what it gets. What it
does not check is not here: the values of cum_seq_q and cum_seq_k, which are on the device; the
shape of the backward's logsumexp; that there are heads, by whose number it divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# The arguments of _flash_attention_forward or _flash_attention_backward, by name.
Arguments = dict

LOW_LEVEL = ("flash", "inplace")
WITH_DEBUG_MASK = ("flash", "sdpa")
ALL = ("flash", "inplace", "sdpa", "functional")


@dataclass(frozen=True)
class Fault:
    """One fault of a call. `change` makes the arguments wrong, in place."""

    change: Callable[[Arguments], None]
    ops: tuple[str, ...] = ALL
    layouts: tuple[str, ...] = ("dense", "varlen")
    # The forward is right then, and the backward's arguments are wrong.
    backward: bool = False
    devices: int = 1


def _each(names: tuple[str, ...], function) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        for name in names:
            arguments[name] = function(arguments[name])

    return change


def _set(**values) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(values)


def _other_dtype(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.float16 if t.dtype == torch.bfloat16 else torch.bfloat16)


def _longer(dim: int, by: int):
    """Adds `by` entries along a dimension, copies of the first one."""

    def lengthen(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t] + by * [t.narrow(dim, 0, 1)], dim)

    return lengthen


def _last_strided(t: torch.Tensor) -> torch.Tensor:
    return (
        t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if t.shape[-2] > 1
        else torch.cat([t, t], -1)[..., ::2]
    )


def _strided(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2)[::2]


def _to_cpu(t: torch.Tensor) -> torch.Tensor:
    return t.cpu() if t.device.type != "meta" else torch.empty_like(t, device="cpu")


def _lengths_of_dense(arguments: Arguments) -> None:
    for name, tensor in (("cum_seq_q", arguments["query"]), ("cum_seq_k", arguments["key"])):
        arguments[name] = (
            torch.arange(tensor.shape[0] + 1, dtype=torch.int32, device=tensor.device)
            * tensor.shape[1]
        )


INPUTS = ("query", "key", "value")
LENGTHS = ("cum_seq_q", "cum_seq_k")
VARLEN = {"ops": LOW_LEVEL, "layouts": ("varlen",)}
DENSE = {"ops": LOW_LEVEL, "layouts": ("dense",)}
GRADIENT = {"ops": ("flash",), "backward": True}

FAULTS = {
    "float32": Fault(_each(INPUTS, torch.Tensor.float)),
    "key_dtype": Fault(_each(("key",), _other_dtype)),
    "value_dtype": Fault(_each(("value",), _other_dtype)),
    "query_float32": Fault(_each(("query",), torch.Tensor.float)),
    "key_on_cpu": Fault(_each(("key",), _to_cpu)),
    "value_on_cpu": Fault(_each(("value",), _to_cpu)),
    "all_on_cpu": Fault(_each(INPUTS, _to_cpu), ops=LOW_LEVEL),
    "key_on_other_gpu": Fault(
        _each(("key",), lambda t: t.to("cuda:1")), ops=("flash", "sdpa"), devices=2
    ),
    "key_head_dim": Fault(_each(("key",), _longer(-1, 8))),
    "value_head_dim_not_a_multiple_of_8": Fault(_each(("value",), _longer(-1, 3))),
    "head_dim_not_a_multiple_of_8": Fault(_each(INPUTS, _longer(-1, 3)), ops=(*LOW_LEVEL, "sdpa")),
    "head_dim_above_256": Fault(_each(INPUTS, _longer(-1, 256))),
    "value_rows": Fault(_each(("value",), _longer(-3, 1))),
    "value_heads": Fault(_each(("value",), _longer(-2, 1))),
    "key_batch": Fault(_each(("key", "value"), _longer(0, 1)), layouts=("dense",)),
    "query_batch": Fault(_each(("query",), _longer(0, 1)), layouts=("dense",)),
    "heads_no_divisor": Fault(
        lambda arguments: _each(("key", "value"), _longer(-2, arguments["query"].shape[-2]))(
            arguments
        )
    ),
    "key_rank": Fault(_each(("key",), lambda t: t.flatten(-2)), ops=LOW_LEVEL),
    "query_rank": Fault(_each(("query",), lambda t: t.flatten(0, 1)), **DENSE),
    "query_last_dim_strided": Fault(_each(("query",), _last_strided)),
    "key_last_dim_strided": Fault(_each(("key",), _last_strided)),
    "value_last_dim_strided": Fault(_each(("value",), _last_strided)),
    "cum_seq_int64": Fault(_each(LENGTHS, torch.Tensor.long), **VARLEN),
    "cum_seq_k_int64": Fault(_each(("cum_seq_k",), torch.Tensor.long), **VARLEN),
    "cum_seq_q_float": Fault(_each(("cum_seq_q",), torch.Tensor.float), **VARLEN),
    "cum_seq_on_cpu": Fault(_each(LENGTHS, _to_cpu), **VARLEN),
    "cum_seq_k_on_cpu": Fault(_each(("cum_seq_k",), _to_cpu), **VARLEN),
    "cum_seq_2d": Fault(_each(LENGTHS, lambda t: t[None]), **VARLEN),
    "cum_seq_0d": Fault(_each(LENGTHS, lambda t: t[0]), **VARLEN),
    "cum_seq_of_none": Fault(_each(LENGTHS, lambda t: t[:0]), **VARLEN),
    "cum_seq_strided": Fault(_each(LENGTHS, _strided), **VARLEN),
    "cum_seq_k_strided": Fault(_each(("cum_seq_k",), _strided), **VARLEN),
    "cum_seq_k_longer": Fault(_each(("cum_seq_k",), _longer(0, 1)), **VARLEN),
    "cum_seq_k_shorter": Fault(_each(("cum_seq_k",), lambda t: t[:-1]), **VARLEN),
    "only_cum_seq_q": Fault(_set(cum_seq_k=None), **VARLEN),
    "only_cum_seq_k": Fault(_set(cum_seq_q=None), **VARLEN),
    "no_cum_seq": Fault(_set(cum_seq_q=None, cum_seq_k=None), **VARLEN),
    "cum_seq_of_dense": Fault(_lengths_of_dense, **DENSE),
    "max_q_negative": Fault(_set(max_q=-1), **VARLEN),
    "max_k_negative": Fault(_set(max_k=-3), **VARLEN),
    "debug_mask_without_dropout": Fault(_set(return_debug_mask=True), ops=WITH_DEBUG_MASK),
    "dropout_of_1": Fault(_set(dropout_p=1.0), ops=("flash", "sdpa", "functional")),
    "alibi": Fault(
        lambda a: a.update(alibi_slopes=_slopes(a["query"], (a["query"].shape[-2],))), ops=LOW_LEVEL
    ),
    "alibi_shape": Fault(
        lambda a: a.update(alibi_slopes=_slopes(a["query"], (1, 1, 3))), ops=LOW_LEVEL
    ),
    "seqused_k_int64": Fault(lambda a: a.update(seqused_k=_no_keys(a).long()), **VARLEN),
    "seqused_k_on_cpu": Fault(lambda a: a.update(seqused_k=_to_cpu(_no_keys(a))), **VARLEN),
    "seqused_k_shape": Fault(lambda a: a.update(seqused_k=_no_keys(a)[None]), **VARLEN),
    "out_dtype": Fault(_each(("out",), _other_dtype), ops=("inplace",)),
    "out_rows": Fault(_each(("out",), _longer(-3, 1)), ops=("inplace",)),
    "grad_dtype": Fault(_each(("grad_out",), _other_dtype), **GRADIENT),
    "grad_rows": Fault(_each(("grad_out",), _longer(-3, 1)), **GRADIENT),
    "grad_head_dim": Fault(_each(("grad_out",), _longer(-1, 8)), **GRADIENT),
    "grad_on_cpu": Fault(_each(("grad_out",), _to_cpu), **GRADIENT),
    "grad_undefined": Fault(_set(grad_out=None), **GRADIENT),
    "backward_out_dtype": Fault(_each(("out",), _other_dtype), **GRADIENT),
    "backward_out_rows": Fault(_each(("out",), _longer(-3, 1)), **GRADIENT),
    "backward_key_on_cpu": Fault(_each(("key",), _to_cpu), **GRADIENT),
    "backward_key_dtype": Fault(_each(("key",), _other_dtype), **GRADIENT),
    "backward_only_cum_seq_q": Fault(_set(cum_seq_k=None), **GRADIENT, layouts=("varlen",)),
    "backward_only_cum_seq_k": Fault(_set(cum_seq_q=None), **GRADIENT, layouts=("varlen",)),
    "backward_cum_seq_int64": Fault(
        _each(LENGTHS, torch.Tensor.long), **GRADIENT, layouts=("varlen",)
    ),
    "backward_cum_seq_k_shorter": Fault(
        _each(("cum_seq_k",), lambda t: t[:-1]), **GRADIENT, layouts=("varlen",)
    ),
}


def _slopes(query: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, device=query.device)


def _no_keys(arguments: Arguments) -> torch.Tensor:
    """Sets a seqused_k by which no sequence has keys."""
    lengths = arguments["cum_seq_k"]
    return torch.zeros(lengths.shape[0] - 1, dtype=torch.int32, device=lengths.device)


def applicable(op: str, layout: str) -> list[str]:
    return [name for name, fault in FAULTS.items() if op in fault.ops and layout in fault.layouts]
