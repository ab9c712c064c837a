"""This module lists calls that stand for what people run, and says what would run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fa4_ext._explain import Explanation, explain_shapes


@dataclass(frozen=True)
class Call:
    name: str
    # [batch, heads, seqlen, head_dim], or with `sequences` [tokens, heads, head_dim]
    q: tuple[int, ...]
    kv: tuple[int, ...] | None = None  # None: the shape of q
    is_causal: bool = True
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 0  # packed sequences of equal length; 0 for a dense call
    trains: bool = True

    def explain(self, capability: tuple[int, int], backward: bool) -> Explanation:
        kv = self.kv or self.q
        return explain_shapes(
            self.q,
            kv,
            kv,
            self.dtype,
            sequences=self.sequences,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            backward=backward,
            deterministic=False,
            device_capability=capability,
        )


CALLS = (
    Call("training, B2 H16 S4096 D64, full", (2, 16, 4096, 64), is_causal=False),
    Call("training, B2 H16 S4096 D128, causal", (2, 16, 4096, 128)),
    Call(
        "training, B2 H32/8 S4096 D128, causal, grouped heads",
        (2, 32, 4096, 128),
        (2, 8, 4096, 128),
    ),
    Call(
        "training, 8 sequences of 2048 tokens back to back, H16 D128, causal",
        (16384, 16, 128),
        sequences=8,
    ),
    Call(
        "decoding, B8 H32/8, 1 query, 8192 keys, D128",
        (8, 32, 1, 128),
        (8, 8, 8192, 128),
        is_causal=False,
        trains=False,
    ),
    Call("training, B2 H8 S4096 D256, causal", (2, 8, 4096, 256)),
    Call("training, B2 H16 S4096 D128, causal, dropout 0.1", (2, 16, 4096, 128), dropout_p=0.1),
    Call("training, B2 H16 S4096 D128, causal, fp32", (2, 16, 4096, 128), dtype=torch.float32),
)


@dataclass(frozen=True)
class Row:
    """One direction of a call, and what would run it."""

    capability: tuple[int, int]
    call: str
    direction: str
    explanation: Explanation


def rows(capabilities: Sequence[tuple[int, int]]) -> list[Row]:
    return [
        Row(
            capability,
            call.name,
            "backward" if backward else "forward",
            call.explain(capability, backward),
        )
        for capability in capabilities
        for call in CALLS
        for backward in ((False, True) if call.trains else (False,))
    ]
