"""Defines a transformer block, one step of its training, and what that step must give on one
device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import DEVICE
from compare import assert_close
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# With the loss below, updates are about as large as the parameters, so that a wrong one shows.
LEARNING_RATE = 1.0
COMPUTE_DTYPE = torch.bfloat16
ROUNDING = torch.finfo(COMPUTE_DTYPE).eps  # two roundings, relative


class Block(nn.Module):
    """A pre-norm transformer block with grouped key/value heads: [batch, seqlen, width] -> the
    same.

    The attention's projections have no bias: the gradient of a key's is exactly 0, and any result
    of it mere noise.
    """

    def __init__(self, width: int = 512, heads: int = 8, heads_kv: int = 2):
        super().__init__()
        self.head_dim = width // heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (
            nn.Linear(width, heads_kv * self.head_dim, bias=False) for _ in range(2)
        )
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        batch, seqlen, _ = x.shape
        normed = self.norms[0](x)
        # With tensor parallelism a rank has some of the heads, which -1 stands for.
        q, k, v = (
            linear(normed).view(batch, seqlen, -1, self.head_dim).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.projection(out.transpose(1, 2).reshape(batch, seqlen, -1))
        return x + self.mlp(self.norms[1](x))


@dataclass
class Step:
    """The results of a training step by parameter name, in fp32, the whole tensors."""

    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def backward(
    model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, autocast: bool
) -> None:
    """Computes the loss and its gradients, in `.grad`, of one batch [batch, seqlen, width]."""
    # There is no cache of converted weights: it must not outlive a graph's capture.
    with torch.autocast(DEVICE, COMPUTE_DTYPE, enabled=autocast, cache_enabled=False):
        out = model(x)
    out.float().square().sum(dim=-1).mean().backward()


def snapshot(block: nn.Module) -> Step:
    """Returns what a step has left in `block`'s parameters and their `.grad`."""

    def whole(tensor):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().float().clone()

    named = dict(block.named_parameters())
    return Step(
        {name: whole(p.grad) for name, p in named.items()},
        {name: whole(p) for name, p in named.items()},
    )


def reference(block: Block, x: torch.Tensor, *, in_bf16: bool | None, pieces: int = 1) -> Step:
    """Takes the step with PyTorch's plain math on this device, from `block`'s parameters, which
    stay as they are.

    in_bf16: None, fp32; False, fp32 parameters under autocast; True, all of it. pieces: into
    how many parts the batch is cut; their gradients are averaged.
    """
    total = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
    model = copy.deepcopy(block)
    if in_bf16:
        model, x = model.to(COMPUTE_DTYPE), x.to(COMPUTE_DTYPE)
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # Without it plain math runs in fp32.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for piece in x.chunk(pieces):
                model.zero_grad()
                backward(model, piece, autocast=in_bf16 is False)
                for name, p in model.named_parameters():
                    total[name] += p.grad.float() / pieces
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return Step(
        total,
        {name: p.detach() - LEARNING_RATE * total[name] for name, p in block.named_parameters()},
    )


def assert_step(ours: Step, plain: Step, truth: Step) -> None:
    """Asserts that the step is within twice the error of plain math, plus two roundings of the
    largest gradient: gradients are computed in bf16, kept in fp32."""
    for name, gradient in truth.gradients.items():
        floor = ROUNDING * gradient.abs().max().item()
        assert_close(
            f"gradient of {name}", ours.gradients[name], plain.gradients[name], gradient, floor
        )
        assert_close(
            f"updated {name}",
            ours.parameters[name],
            plain.parameters[name],
            truth.parameters[name],
            LEARNING_RATE * floor,
        )
