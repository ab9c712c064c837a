"""Programs that call PyTorch's attention themselves."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.clients.contenders import EAGER
from benchmarks.clients.language_models import lengths_of
from benchmarks.clients.workload import BACKENDS, Place, Results, Step, Workload, loss

HEADS = 16


class Block(nn.Module):
    """A layer of a small decoder, as scripts for training have it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def seeded(make, place: Place) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(place.device):
        return place.values(make())


def training(model: nn.Module, forward, valid: torch.Tensor | None = None) -> Step:
    def step() -> Results:
        model.zero_grad(set_to_none=True)
        out = forward()
        out = out if valid is None else out[valid]
        loss(out).backward()
        weights = [
            one.grad for one in model.parameters() if one.dim() == 2 and one.grad is not None
        ]
        return {"out": out.detach().clone(), "gradient": weights[0].clone()}

    return step


def small_gpt(implementation: str, place: Place, *, mode: str | None = None) -> Step:
    width, heads = place.size(1024, 64), place.size(HEADS, 4)
    model = seeded(lambda: nn.Sequential(*(Block(width, heads) for _ in range(4))), place)
    x = place.normal(place.size(8, 2), place.size(1024, 32), width)
    # CUDA graphs need a device.
    run = torch.compile(model, mode=None if place.tiny else mode) if mode else model

    def forward() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(x)

    return training(model, forward)


def encoder(implementation: str, place: Place, *, padded: bool) -> Step:
    width, heads = place.size(1024, 64), place.size(HEADS, 4)

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    model, batch, rows = seeded(make, place), 8, place.size(1024, 32)
    x = place.normal(batch, rows, width)
    hidden = None
    if padded:
        hidden = torch.arange(rows)[None] >= lengths_of(batch, rows)[:, None]
        hidden = hidden.to(place.device)
    valid = None if hidden is None else ~hidden
    return training(model, lambda: model(x, src_key_padding_mask=hidden), valid)


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]):
    """Returns causal attention within packed sequences, each in a call of its own."""
    sequences = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*one, is_causal=True) for one in sequences]
    return torch.cat(outs, 1).transpose(0, 1)


def varlen(implementation: str, place: Place) -> Step:
    """Makes attention over packed sequences through torch.nn.attention.varlen, which computes
    neither in fp32 nor by math: the reference takes the sequences one by one."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = lengths_of(8, place.size(2048, 32))
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(place.device)
    total, longest = int(lengths.sum()), int(lengths.max())
    q, k, v, gradient = (place.normal(total, HEADS, 128, seed=seed) for seed in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    window = {"window_size": (-1, 0)}

    def step() -> Results:
        if implementation == EAGER:
            out = one_by_one(q, k, v, lengths.tolist())
        else:
            out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **window)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), gradient)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    return step


IMPORT_ALONE = (*BACKENDS, "import")
WORKLOADS = (
    Workload("small GPT", small_gpt, IMPORT_ALONE),
    Workload(
        "small GPT, compiled", partial(small_gpt, mode="default"), IMPORT_ALONE, compiled=True
    ),
    Workload(
        "small GPT, CUDA graphs",
        partial(small_gpt, mode="reduce-overhead"),
        IMPORT_ALONE,
        compiled=True,
    ),
    Workload("TransformerEncoder", partial(encoder, padded=False), IMPORT_ALONE),
    Workload("TransformerEncoder, padded", partial(encoder, padded=True), IMPORT_ALONE),
    Workload("varlen_attn", varlen, ("torch", "import"), eager=True),
)
