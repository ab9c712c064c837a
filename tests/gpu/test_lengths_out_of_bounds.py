"""No tensor has the rows for these cu_seqlens and seqused_k: there is no fault and no long wait,
and the next call is right.

Each in a process of its own, since a wrong address would end the CUDA context.
"""

from __future__ import annotations

import pytest
from calls import TORCH_2_12
from fresh_process import run_script
from groups import OTHERS

PREAMBLE = """
    import time
    import torch
    from calls import deterministic, flash_backward, flash_forward, run_flash
    from cases import cumulative, make_inputs, varlen
    from compare import assert_matches_reference
    from fa4_ext import _library
    import fa4_ext

    fa4_ext.register(fallback="error", speed_rules=False, disable=DISABLED)
    LIMIT = 5  # seconds; a right call of this size takes a millisecond
    SEQLENS = (300, 129, 7, 64)
    TOTAL = sum(SEQLENS)
    HUGE = 2**31 - 1
    GARBAGE = {
        "last_beyond_the_tensor": [0, 300, 429, 436, TOTAL + 1000],
        "last_huge": [0, 300, 429, 436, HUGE],
        "all_huge": [HUGE] * 5,
        "negative": [-7, -300, -1, -2**31, TOTAL],
        "negative_and_huge": [-2**31, HUGE, -2**31, HUGE, -1],
        "decreasing": [TOTAL, 300, 200, 100, 0],
        "zigzag": [0, TOTAL, 0, TOTAL, 0],
        "overlapping": [0, TOTAL, 10, TOTAL, TOTAL],
        "random": torch.randint(-2**31, HUGE, (5,)).tolist(),
    }

    def sound():
        problem = varlen(SEQLENS, head_dim=HEAD_DIM, heads=4, heads_kv=HEADS_KV, is_causal=True)
        x = make_inputs(problem)
        assert_matches_reference(problem, x, run_flash(problem, x, backward=True))

    def wait(what, begin):
        torch.cuda.synchronize()
        took = time.monotonic() - begin
        assert took < LIMIT, f"{what} took {took:.1f} s"
"""

OFFSETS = """
    sound()
    for mask in ({}, {"is_causal": True}, {"window": (37, 21)}):
        problem = varlen(SEQLENS, head_dim=HEAD_DIM, heads=4, heads_kv=HEADS_KV, **mask)
        x = make_inputs(problem)
        whole = x.cu_seqlens_q
        for name, values in GARBAGE.items():
            garbage = torch.tensor(values, dtype=torch.int32, device="cuda")
            for q, k in ((garbage, whole), (whole, garbage), (garbage, garbage)):
                x.cu_seqlens_q, x.cu_seqlens_k = q, k
                begin = time.monotonic()
                forward = flash_forward(problem, x)
                wait(f"forward, {name}, {mask}", begin)
                for exact in (False, True):
                    with deterministic(exact):
                        begin = time.monotonic()
                        flash_backward(problem, x, forward)
                        wait(f"backward, {name}, {mask}, deterministic {exact}", begin)
    sound()
"""

USED = """
    sound()
    for rows in ((300, 129, 7, 64), (1, 2, 1, 1)):
        heads = dict(head_dim=HEAD_DIM, heads=4, heads_kv=HEADS_KV)
        problem = varlen(rows, SEQLENS, **heads, is_causal=True)
        x = make_inputs(problem)
        expected = flash_forward(problem, x)[0]
        for decode in (1, -1):
            with _library.override(decode=decode):
                for values in ([HUGE] * 4, [10**6] * 4, [301, 130, 8, 65]):  # all of its keys, then
                    used = torch.tensor(values, dtype=torch.int32, device="cuda")
                    begin = time.monotonic()
                    out = flash_forward(problem, x, seqused_k=used)[0]
                    wait(f"seqused_k of {values}", begin)
                    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
                for values in ([-1] * 4, [-2**31] * 4):  # none
                    used = torch.tensor(values, dtype=torch.int32, device="cuda")
                    out, lse = flash_forward(problem, x, seqused_k=used)[:2]
                    assert not out.any() and lse.isneginf().all()
    sound()
"""

PAGES = """
    sound()
    q = torch.randn(3, 4, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    cache = torch.randn(5, 128, HEADS_KV, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.tensor([[0, 1], [2, 3], [4, 0]], dtype=torch.int32, device="cuda")
    cu_seqlens_q = cumulative((1, 1, 1))

    def attend(table, used):
        begin = time.monotonic()
        out = torch.ops.aten._flash_attention_forward(
            q, cache, cache, cu_seqlens_q, None, 1, 256, 0.0, False, False, block_table=table,
            seqused_k=torch.tensor(used, dtype=torch.int32, device="cuda"),
        )[0]
        wait(f"seqused_k of {used}", begin)
        return out

    full = attend(table, [256] * 3)
    for used in ([257] * 3, [HUGE] * 3, [10**6] * 3):
        assert torch.equal(attend(table, used), full)
    assert not attend(table, [-5] * 3).any()
    for pages in (-1, -2**31, 5, HUGE):  # no such pages: zeros, as behind the end of a tensor
        attend(torch.full_like(table, pages), [256] * 3)
    sound()
"""


def run(script: str, head_dim: int, heads_kv: int, disabled: tuple[str, ...] = ()) -> None:
    names = {"HEAD_DIM": head_dim, "HEADS_KV": heads_kv, "DISABLED": disabled}
    code = PREAMBLE + script
    for name, value in names.items():
        code = code.replace(name, repr(value))
    run_script(code, timeout=300)


@pytest.mark.parametrize("heads_kv", (4, 2))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("script", ("OFFSETS", "USED"))
def test_packed(script, head_dim, heads_kv):
    run(globals()[script], head_dim, heads_kv)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_groups_of_heads(head_dim):
    run(OFFSETS, head_dim, 2, OTHERS)


@pytest.mark.skipif(not TORCH_2_12, reason="torch has block_table since 2.12")
@pytest.mark.parametrize("head_dim", (64, 128))
def test_pages(head_dim):
    run(PAGES, head_dim, 2)
