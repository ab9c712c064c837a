"""The ways in which programs call attention in PyTorch, and who runs each of them on Hopper while
fa4_ext is registered: our kernels, or PyTorch as it would without us. docs/support.md shows them;
test_ways.py asks the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

OURS, PYTORCH = "fa4_ext", "PyTorch"
MIXED = "forward fa4_ext, backward PyTorch"
NEVER = "-"  # this torch has no such call
NOT_RUN = "not run"
# The versions that the table shows.
VERSIONS = ((2, 11), (2, 13), (2, 15))

BATCH, HEADS, ROWS, HEAD_DIM = 2, 8, 512, 64
EMBEDDING = HEADS * HEAD_DIM
LENGTHS = (300, 200, 12)


@dataclass(frozen=True)
class Way:
    name: str
    # Makes the inputs, then returns the work on them.
    make: Callable[[], Callable[[], object]]
    # Who runs it in each of VERSIONS. One name stands for all of them.
    runs: tuple[str, ...]

    def runs_in(self, version: tuple[int, int]) -> str:
        return self.runs[VERSIONS.index(version) if len(self.runs) > 1 else 0]


def qkv(
    *,
    keys: int = ROWS,
    heads_kv: int = HEADS,
    head_dim: int = HEAD_DIM,
    head_dim_v: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = ROWS,
) -> list[torch.Tensor]:
    shapes = (
        (BATCH, HEADS, rows, head_dim),
        (BATCH, heads_kv, keys, head_dim),
        (BATCH, heads_kv, keys, head_dim_v or head_dim),
    )
    return [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]


def sdpa(context=contextlib.nullcontext, tensors: dict | None = None, **options):
    """Makes a call of F.scaled_dot_product_attention with its backward. Values in `options` may be
    functions."""

    def make():
        given = qkv(**(tensors or {}))
        made = {name: value() if callable(value) else value for name, value in options.items()}
        learned = [*given, *(t for t in made.values() if getattr(t, "requires_grad", False))]

        def work():
            with context():
                out = F.scaled_dot_product_attention(*given, **made)
            torch.autograd.grad(out.sum(), learned)

        return work

    return make


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def without_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def mask(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(ROWS, ROWS, device="cuda").tril().to(dtype)


def packed(**options):
    def make():
        from torch.nn.attention.varlen import varlen_attn

        rows = torch.tensor((0, *LENGTHS), dtype=torch.int32, device="cuda").cumsum(0).int()
        given = [
            torch.randn(sum(LENGTHS), HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            for _ in range(3)
        ]
        given = [tensor.requires_grad_() for tensor in given]

        def work():
            out = varlen_attn(*given, rows, rows, max(LENGTHS), max(LENGTHS), **options)
            torch.autograd.grad(out.sum(), given)

        return work

    return make


def paged():
    """Keys and values in pages, for one query a sequence."""
    from torch.nn.attention.varlen import varlen_attn

    query = torch.randn(BATCH, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    cache = torch.randn(8, 256, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(BATCH + 1, dtype=torch.int32, device="cuda")
    table = torch.arange(8, dtype=torch.int32, device="cuda").view(BATCH, 4)
    used = torch.tensor((1000, 700), dtype=torch.int32, device="cuda")

    def work():
        with torch.no_grad():
            varlen_attn(
                query, cache, cache, starts, None, 1, 1024, seqused_k=used, block_table=table
            )

    return work


def nested(layout: torch.layout):
    def make():
        given = [
            torch.nested.nested_tensor(
                [torch.randn(length, HEADS, HEAD_DIM) for length in LENGTHS],
                layout=layout,
                dtype=torch.bfloat16,
                device="cuda",
            )
            for _ in range(3)
        ]

        def work():
            with torch.no_grad():
                F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in given))

        return work

    return make


def module(make_module, *, train: bool, padding: bool = False, fastpath: bool = True):
    """An encoder or an attention module on a batch, with its backward in training."""

    def make():
        kind = make_module().to("cuda", torch.bfloat16).train(train)
        given = torch.randn(BATCH, ROWS, EMBEDDING, dtype=torch.bfloat16, device="cuda")
        hidden = torch.zeros(BATCH, ROWS, dtype=torch.bool, device="cuda")
        hidden[0, ROWS // 2 :] = True

        def run():
            if isinstance(kind, nn.MultiheadAttention):
                return kind(given, given, given, need_weights=False)[0]
            return kind(given, src_key_padding_mask=hidden) if padding else kind(given)

        def work():
            torch.backends.mha.set_fastpath_enabled(fastpath)
            try:
                if train:
                    run().sum().backward()
                else:
                    with torch.inference_mode():
                        run()
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

        return work

    return make


def attention():
    return nn.MultiheadAttention(EMBEDDING, HEADS, batch_first=True)


def encoder():
    layer = nn.TransformerEncoderLayer(EMBEDDING, HEADS, 512, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def compiled():
    given = qkv()
    attend = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
    return lambda: torch.autograd.grad(attend(*given, is_causal=True).sum(), given)


def choosing(*backends: SDPBackend):
    return sdpa(lambda: sdpa_kernel(list(backends)))


def learned_mask():
    """A mask that requires a gradient."""
    return torch.randn(ROWS, ROWS, dtype=torch.bfloat16, device="cuda", requires_grad=True)


SDPA = "F.scaled_dot_product_attention"
VARLEN = "torch.nn.attention.varlen"
FASTPATH = (OURS, NOT_RUN, OURS)
WAYS = (
    Way(SDPA, sdpa(), (OURS,)),
    Way("is_causal", sdpa(is_causal=True), (OURS,)),
    Way("is_causal, fewer queries than keys", sdpa(tensors={"keys": 700}, is_causal=True), (OURS,)),
    Way("is_causal, more queries than keys", sdpa(tensors={"keys": 300}, is_causal=True), (OURS,)),
    Way("enable_gqa", sdpa(tensors={"heads_kv": 2}, enable_gqa=True), (OURS,)),
    Way("scale", sdpa(scale=0.3), (OURS,)),
    Way("head dim 20, which is padded", sdpa(tensors={"head_dim": 20}), (OURS,)),
    Way("head dim 256", sdpa(tensors={"head_dim": 256}), (OURS,)),
    Way("head dim 128, of value 64", sdpa(tensors={"head_dim": 128, "head_dim_v": 64}), (OURS,)),
    Way("head dim 192, of value 128", sdpa(tensors={"head_dim": 192, "head_dim_v": 128}), (OURS,)),
    Way("head dim 264", sdpa(tensors={"head_dim": 264}), (PYTORCH,)),
    Way("float32", sdpa(tensors={"dtype": torch.float32}), (PYTORCH,)),
    Way("dropout_p", sdpa(dropout_p=0.1), (PYTORCH,)),
    Way("attn_mask, bool", sdpa(attn_mask=mask(torch.bool)), (OURS,)),
    Way("attn_mask, float", sdpa(attn_mask=mask(torch.bfloat16)), (OURS,)),
    Way(
        "attn_mask, deterministic algorithms",
        sdpa(deterministic, attn_mask=mask(torch.bool)),
        (OURS,),
    ),
    Way(
        "attn_mask, enable_cudnn_sdp(False)",
        sdpa(without_cudnn, attn_mask=mask(torch.bool)),
        (OURS,),
    ),
    Way("attn_mask that requires a gradient", sdpa(attn_mask=learned_mask), (MIXED,)),
    Way("causal_lower_right", sdpa(attn_mask=lambda: bias.causal_lower_right(ROWS, ROWS)), (OURS,)),
    Way("causal_upper_left", sdpa(attn_mask=lambda: bias.causal_upper_left(ROWS, ROWS)), (OURS,)),
    Way("deterministic algorithms", sdpa(deterministic), (OURS,)),
    Way("sdpa_kernel(FLASH_ATTENTION)", choosing(SDPBackend.FLASH_ATTENTION), (OURS,)),
    Way("sdpa_kernel(CUDNN_ATTENTION)", choosing(SDPBackend.CUDNN_ATTENTION), (PYTORCH,)),
    Way("sdpa_kernel(EFFICIENT_ATTENTION)", choosing(SDPBackend.EFFICIENT_ATTENTION), (PYTORCH,)),
    Way("sdpa_kernel(MATH)", choosing(SDPBackend.MATH), (PYTORCH,)),
    Way("torch.compile", compiled, (OURS,)),
    Way("nested tensors, jagged", nested(torch.jagged), (OURS,)),
    Way("nested tensors, strided", nested(torch.strided), (OURS,)),
    Way(VARLEN, packed(), (OURS,)),
    Way(f"{VARLEN}, causal", packed(window_size=(-1, 0)), (OURS,)),
    Way(f"{VARLEN}, window", packed(window_size=(100, 0)), (OURS,)),
    Way(f"{VARLEN}, block_table", paged, (NEVER, OURS, OURS)),
    Way("nn.MultiheadAttention, training", module(attention, train=True), (OURS,)),
    Way("nn.MultiheadAttention, inference", module(attention, train=False), FASTPATH),
    Way(
        "nn.MultiheadAttention, inference, set_fastpath_enabled(False)",
        module(attention, train=False, fastpath=False),
        (OURS,),
    ),
    Way("nn.TransformerEncoder, training", module(encoder, train=True), (OURS,)),
    Way(
        "nn.TransformerEncoder, training, padding mask",
        module(encoder, train=True, padding=True),
        (OURS,),
    ),
    Way("nn.TransformerEncoder, inference", module(encoder, train=False), FASTPATH),
    Way(
        "nn.TransformerEncoder, inference, padding mask",
        module(encoder, train=False, padding=True),
        (OURS,),
    ),
)
