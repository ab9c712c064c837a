"""Draws random problems for the planner's tests, as hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st

LARGEST_HEAD_DIMS = {90: (256, 256), 100: (256, 256)}  # of query and of value


@st.composite
def problems(
    draw,
    largest: int = 40_000,
    dtypes=("bf16", "fp16"),
    capabilities=(90, 100, 103),
    legal: bool = True,
    ops=("forward", "backward"),
) -> dict:
    """Draws problems. A `legal` one is inside what the matrix covers; others are anything that fits
    the fields, the hopeless included."""
    size = st.integers(1, largest) if legal else st.integers(-1, 2**40)
    layout = draw(st.sampled_from(["dense", "varlen"]))
    heads_kv = draw(st.integers(1, 8)) if legal else draw(st.integers(-1, 70_000))
    batch = draw(st.integers(1, 8)) if legal else draw(st.integers(-1, 70_000))
    seqlen_q, seqlen_k = draw(size), draw(size)
    windowed = draw(st.booleans())
    bound = st.integers(-1, max(2 * seqlen_k, 1)) if windowed else st.just(-1)
    op = draw(st.sampled_from(ops))
    capability = draw(st.sampled_from(capabilities)) if legal else draw(st.integers(0, 130))
    largest_head_dim, largest_head_dim_v = LARGEST_HEAD_DIMS[90 if capability == 90 else 100]
    equal_head_dims = draw(st.booleans())
    if legal:
        head_dim_v = draw(st.sampled_from(range(8, largest_head_dim_v + 1, 8)))
        head_dim = (
            head_dim_v
            if equal_head_dims
            else draw(st.sampled_from(range(8, largest_head_dim + 1, 8)))
        )
    else:
        head_dim = draw(st.integers(-8, 300))
        head_dim_v = head_dim if equal_head_dims else draw(st.integers(-8, 300))
    bias = {}
    if not legal and draw(st.booleans()):
        some = st.sampled_from([1, batch, draw(st.integers(-1, 2**40))])
        bias = {"bias": (draw(some), draw(st.sampled_from([1, 8, 70_000])))}
    return bias | {
        "op": op,
        "dtype": draw(st.sampled_from(dtypes)),
        "layout": layout,
        "capability": capability,
        "batch": batch,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        # Lengths are ragged: no sequence is longer than the longest, which is there.
        "total_q": batch * seqlen_q
        if layout == "dense"
        else draw(st.integers(seqlen_q, max(batch, 1) * max(seqlen_q, 1))),
        "total_k": batch * seqlen_k
        if layout == "dense"
        else draw(st.integers(seqlen_k, max(batch, 1) * max(seqlen_k, 1))),
        "num_heads": heads_kv * draw(st.integers(1, 8)) if legal else draw(st.integers(-1, 70_000)),
        "num_heads_kv": heads_kv,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "is_causal": draw(st.booleans()),
        "window_size_left": draw(bound),
        "window_size_right": draw(bound),
        "deterministic": op == "backward" and draw(st.booleans()),
    }


@st.composite
def biased_problems(draw, largest: int = 40_000) -> dict:
    """Draws problems with a bias that Hopper's kernels run. It may be broadcast over the batch and
    over the heads."""
    problem = draw(problems(largest, capabilities=(90,)))
    batch, heads = problem["batch"], problem["num_heads"]
    return problem | {
        "layout": "dense",
        "total_q": batch * problem["seqlen_q"],
        "total_k": batch * problem["seqlen_k"],
        "is_causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "bias": (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))),
        "bias_by_query": draw(st.booleans()),
    }
