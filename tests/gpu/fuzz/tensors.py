"""Makes the tensors of a case."""

from __future__ import annotations

from dataclasses import replace

import biases
import torch
from cases import Inputs, Problem
from layouts import cut_from, expanded, offset, permuted

from fuzz.case import Case
from fuzz.faults import FAULTS, Arguments

# These layouts are of [batch, seqlen, heads, head_dim] and [total, heads, head_dim] alike.
ROWS, HEADS, DIM = -3, -2, -1
# The layouts of case.UNALIGNED.
_UNALIGNED = {
    "offset_8_bytes": offset(4),
    "offset_2_bytes": offset(1),
    "row_stride_odd": cut_from(DIM, 0, 1),
    "row_stride_8_bytes": cut_from(DIM, 0, 4),
}
SLICED = {
    "contiguous": torch.Tensor.contiguous,
    "slice_of_heads": cut_from(HEADS, 3, 2),
    "slice_of_rows": cut_from(ROWS, 5, 7),
    "slice_of_dim": cut_from(DIM, 8, 16),
    "offset_16_bytes": offset(8),
    **_UNALIGNED,
}
LAYOUTS = {
    "dense": SLICED
    | {
        "bhsd": permuted(0, 2, 1, 3),
        "sbhd": permuted(1, 0, 2, 3),
        "hsbd": permuted(2, 1, 0, 3),
        "slice_of_batch": cut_from(0, 1, 1),
        "expanded_batch": expanded(0),
        "expanded_heads": expanded(HEADS),
    },
    "varlen": SLICED | {"hsd": permuted(1, 0, 2), "expanded_heads": expanded(HEADS)},
}
# Layouts of the gradient of out, which may have any strides.
GRADIENTS = {
    "dense": LAYOUTS["dense"]
    | {"scalar": expanded(0, ROWS, HEADS, DIM), "last_dim_strided": permuted(0, 1, 3, 2)},
    "varlen": LAYOUTS["varlen"]
    | {"scalar": expanded(ROWS, HEADS, DIM), "last_dim_strided": permuted(0, 2, 1)},
}
# Rows that belong to no sequence hold this value.
UNUSED = float("nan")


def make_inputs(case: Case, device: str) -> Inputs:
    """Makes what the case's op gets, laid out as it says, before anything is wrong with it."""
    problem = case.problem
    generator = None if device == "meta" else torch.Generator(device).manual_seed(case.seed)
    before, after = case.unused_rows

    def make(side: str, layouts, layout: str) -> torch.Tensor:
        values = torch.randn(
            problem.shape(side), dtype=problem.dtype, device=device, generator=generator
        )
        if before or after:
            beside = [
                values.new_full((rows, *values.shape[1:]), UNUSED) for rows in case.unused_rows
            ]
            values = torch.cat([beside[0], values, beside[1]])
        return layouts[layout](values)

    inputs = LAYOUTS[case.layout]
    sides = (("q", inputs), ("k", inputs), ("k", inputs), ("q", GRADIENTS[case.layout]))
    tensors = [
        make(side, layouts, layout)
        for (side, layouts), layout in zip(sides, case.layouts, strict=True)
    ]
    if problem.bias:
        return Inputs(*tensors, bias=biases.make(problem, device, generator))
    if not problem.varlen:
        return Inputs(*tensors)
    return Inputs(
        *tensors,
        *(_starts(seqlens, before, device) for seqlens in (problem.seqlens_q, problem.seqlens_k)),
    )


def _starts(seqlens: tuple[int, ...], before: int, device: str) -> torch.Tensor:
    starts = [before + sum(seqlens[:i]) for i in range(len(seqlens) + 1)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def forward_arguments(case: Case, inputs: Inputs) -> Arguments:
    """Returns the arguments of `_flash_attention_forward` by name, with `out` for the in-place op
    and `attn_mask` for F.scaled_dot_product_attention."""
    problem = case.problem
    left, right = (case.unbounded if bound == -1 else bound for bound in problem.window)
    seqused_k = case.seqused_k and torch.tensor(
        case.seqused_k, dtype=torch.int32, device=inputs.q.device
    )
    arguments = dict(
        query=inputs.q, key=inputs.k, value=inputs.v, cum_seq_q=inputs.cu_seqlens_q,
        cum_seq_k=inputs.cu_seqlens_k,
        max_q=problem.max_q, max_k=problem.max_k, dropout_p=case.dropout_p,
        is_causal=problem.is_causal,
        return_debug_mask=case.return_debug_mask, scale=problem.scale, window_size_left=left,
        window_size_right=right,
        seqused_k=seqused_k, alibi_slopes=None,
    )  # fmt: skip
    if case.op == "inplace":
        arguments["out"] = torch.full_like(inputs.q, float("nan"))
    if case.op == "functional":
        arguments["attn_mask"] = inputs.bias
    if case.fault_in_forward:
        FAULTS[case.fault].change(arguments)
    return arguments


def backward_arguments(
    case: Case, inputs: Inputs, forward: Arguments, results: tuple[torch.Tensor, ...]
) -> Arguments:
    """Returns the arguments of `_flash_attention_backward` by name. `results` are those of
    `_flash_attention_forward`."""
    names = (
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "scale",
    )
    windows = ("window_size_left", "window_size_right")
    out, lse, rng_state, unused, _ = results
    arguments = {name: forward[name] for name in (*names, *windows)}
    arguments |= dict(
        grad_out=inputs.do, out=out, logsumexp=lse, rng_state=rng_state, unused=unused
    )
    if case.fault and not case.fault_in_forward:
        FAULTS[case.fault].change(arguments)
    return arguments


def keys_in_use(problem: Problem, seqused_k: tuple[int, ...], packed: torch.Tensor) -> torch.Tensor:
    """Returns packed keys or values without those that seqused_k leaves out."""
    return torch.cat(
        [
            part[:length]
            for part, length in zip(packed.split(problem.seqlens_k), seqused_k, strict=True)
        ]
    )


def with_keys_in_use(case: Case) -> Problem:
    """Returns the problem that remains of the keys in use."""
    problem = case.problem
    return replace(
        problem,
        seqlens_k=case.seqused_k,
        slack=(problem.slack[0], problem.max_k - max(case.seqused_k)),
    )


def outside(case: Case, t: torch.Tensor) -> torch.Tensor:
    """Returns the rows of a gradient that belong to no sequence."""
    before, after = case.unused_rows
    return torch.cat([t[:before], t[t.shape[0] - after :]])


def used(case: Case, name: str, t: torch.Tensor) -> torch.Tensor:
    """Returns the part of an input or a result that belongs to sequences. "lse" is [heads, rows],
    all others have their rows first."""
    if not any(case.unused_rows):
        return t
    dim = 1 if name == "lse" else 0
    before, after = case.unused_rows
    return t.narrow(dim, before, t.shape[dim] - before - after)
