"""Defines the ways into the kernels, each in steps: the results of the forward by name, then those
of the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from calls import deterministic
from cases import Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuzz.case import Case
from fuzz.faults import Arguments
from fuzz.tensors import backward_arguments

Results = dict[str, torch.Tensor | None]
GRADIENTS = ("dq", "dk", "dv")


class TorchOps:
    """PyTorch's own ops, by the names that the steps below use."""

    def __init__(self):
        aten = torch.ops.aten
        self.flash_forward = aten._flash_attention_forward
        self.flash_backward = aten._flash_attention_backward
        self.sdpa_forward = aten._scaled_dot_product_flash_attention
        # The op exists since torch 2.12.
        self.inplace_forward = getattr(aten, "_flash_attention_forward_no_dropout_inplace", None)

        self.functional = F.scaled_dot_product_attention


def _flash(case: Case, inputs: Inputs, arguments: Arguments, ops) -> Iterator[Results]:
    results = ops.flash_forward(**arguments)
    yield dict(zip(("out", "lse", "rng_state", "unused", "debug_mask"), results, strict=True))
    gradients = ops.flash_backward(**backward_arguments(case, inputs, arguments, results))
    yield dict(zip(GRADIENTS, gradients, strict=True))


def _inplace(case: Case, inputs: Inputs, arguments: Arguments, ops) -> Iterator[Results]:
    arguments["out"].fill_(float("nan"))
    lse = ops.inplace_forward(**arguments)
    yield {"out": arguments["out"].clone(), "lse": lse}


def heads_first(case: Case, arguments: Arguments) -> list[torch.Tensor]:
    """Returns query, key and value as [batch, heads, seqlen, head_dim]."""
    tensors = (arguments[name].detach().transpose(1, 2) for name in ("query", "key", "value"))
    return [t.requires_grad_(case.backward) for t in tensors]


def _autograd(out: torch.Tensor, tensors: list[torch.Tensor], inputs: Inputs) -> Results:
    return dict(
        zip(GRADIENTS, torch.autograd.grad(out, tensors, inputs.do.transpose(1, 2)), strict=True)
    )


def _sdpa(case: Case, inputs: Inputs, arguments: Arguments, ops) -> Iterator[Results]:
    tensors = heads_first(case, arguments)
    positional = (arguments[name] for name in ("dropout_p", "is_causal", "return_debug_mask"))
    out, lse, _, _, _, _, rng_state, unused, debug_mask = ops.sdpa_forward(
        *tensors, *positional, scale=arguments["scale"]
    )
    yield {
        "out": out.detach(),
        "lse": lse,
        "rng_state": rng_state,
        "unused": unused,
        "debug_mask": debug_mask,
    }
    yield _autograd(out, tensors, inputs)


def _functional(case: Case, inputs: Inputs, arguments: Arguments, ops) -> Iterator[Results]:
    tensors = heads_first(case, arguments)
    options = {name: arguments[name] for name in ("attn_mask", "dropout_p", "is_causal", "scale")}
    # With other rows in value than in key, cuDNN ends the process, with us and without us.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if case.fault else nullcontext():
        out = ops.functional(
            *tensors, **options, enable_gqa=case.problem.heads != case.problem.heads_kv
        )
    yield {"out": out.detach()}
    yield _autograd(out, tensors, inputs)


STEPS = {"flash": _flash, "inplace": _inplace, "sdpa": _sdpa, "functional": _functional}


@dataclass
class Outcome:
    results: Results = field(default_factory=dict)  # as the op returns them
    error: Exception | None = None
    stage: str = "forward"  # the last step that began


def run(
    case: Case,
    inputs: Inputs,
    arguments: Arguments,
    ops,
    before_each: Callable[[], None],
    *,
    backward: bool,
) -> Outcome:
    """Runs the call, and its backward if asked. `before_each` step makes the memory that results
    come to lie in worthless."""
    outcome = Outcome()
    steps = STEPS[case.op](case, inputs, arguments, ops)
    if case.dropout_p:
        torch.manual_seed(case.seed)
    with deterministic(case.deterministic):
        for outcome.stage in ("forward", "backward") if backward else ("forward",):
            before_each()
            try:
                outcome.results |= next(steps)
            except Exception as error:
                outcome.error = error
                break
    return outcome


def run_halves(
    case: Case, inputs: Inputs, arguments: Arguments, engine, forward_ours: bool
) -> Results:
    """Runs the forward by our kernels and the backward by PyTorch's, or the reverse."""
    steps, results = STEPS[case.op](case, inputs, arguments, engine.ops), {}
    with deterministic(case.deterministic):
        for ours in (forward_ours, not forward_ours):
            engine.poison(inputs)
            with engine.registered(strict=True, speed_rules=False) if ours else nullcontext():
                results |= next(steps)
    return results
