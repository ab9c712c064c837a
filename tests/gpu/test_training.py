"""Training steps of a whole transformer block, as PyTorch's own features run them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import DEVICE
from profiling import kernels_of, provider
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from training import LEARNING_RATE, Block, assert_step, backward, reference, snapshot

pytestmark = pytest.mark.usefixtures("strict")


def block_and_batch() -> tuple[Block, torch.Tensor]:
    return Block().to(DEVICE), torch.randn(2, 500, 512, device=DEVICE)


def prefer_attention(_context, op, *_arguments, **_options) -> CheckpointPolicy:
    """Keeps attention's results and computes the rest again, as training frameworks do; it knows
    the ops by their names."""
    aten = torch.ops.aten
    saved = op in (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    )
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "none": lambda block, x: block(x),
    "reentrant": lambda block, x: checkpoint(block, x.requires_grad_(), use_reentrant=True),
    "non_reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "selective": lambda block, x: checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, prefer_attention),
    ),
}


@pytest.mark.parametrize("precision", ("autocast", "bf16"))
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_step(how, precision):
    """It runs with and without activation checkpointing, and compares the gradient of every
    parameter, and the parameters after SGD."""
    block, x = block_and_batch()
    in_bf16 = precision == "bf16"
    truth, plain = reference(block, x, in_bf16=None), reference(block, x, in_bf16=in_bf16)
    model = copy.deepcopy(block).bfloat16() if in_bf16 else block
    backward(
        partial(CHECKPOINTS[how], model), x.to(next(model.parameters()).dtype), autocast=not in_bf16
    )
    for ours, p in zip(block.parameters(), model.parameters(), strict=True):
        ours.grad = p.grad.float()
    torch.optim.SGD(block.parameters(), lr=LEARNING_RATE).step()
    assert_step(snapshot(block), plain, truth)


def test_checkpointing_runs_the_forward_again_unless_its_result_is_kept():
    block, x = block_and_batch()

    def launches(how: str) -> int:
        work = partial(backward, partial(CHECKPOINTS[how], block), x, autocast=True)
        return [provider(name) for name in kernels_of(work)].count("ours")

    without = launches("none")
    assert [launches(how) - without for how in ("reentrant", "non_reentrant", "selective")] == [
        1,
        1,
        0,
    ]


def test_step_in_a_graph():
    """Forward, backward and optimizer run in one CUDA graph, which is replayed twice on other
    batches."""
    block, x = block_and_batch()
    optimizer = torch.optim.SGD(block.parameters(), lr=LEARNING_RATE)
    initial = copy.deepcopy(block.state_dict())

    def step():
        backward(block, x, autocast=True)
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(side)
    # After this the capture allocates the gradients, in the graph's memory.
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        block.load_state_dict(initial)
        x.normal_()
        truth, plain = (reference(block, x, in_bf16=in_bf16) for in_bf16 in (None, False))
        graph.replay()
        assert_step(snapshot(block), plain, truth)
