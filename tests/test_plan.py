"""The planner: total, deterministic, never a kernel that is not there, never a workspace that does
not fit its tensors."""

from __future__ import annotations

import re
from pathlib import Path

import fa4_core
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_problems import problems

from kernels.kernel import HEAD_DIM_BUCKETS
from scripts.core_problem import core_problem

ROWS = fa4_core.kernels()
BUILT = {row.name for row in ROWS}


LEGAL = {
    "op": "forward", "dtype": "bf16", "layout": "dense", "capability": 90, "batch": 2,
    "seqlen_q": 512, "seqlen_k": 512,
    "total_q": 1024, "total_k": 1024, "num_heads": 8, "num_heads_kv": 8, "head_dim": 128,
    "head_dim_v": 128, "is_causal": False,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip


def plan(problem: dict, speed_rules: bool = False):
    return fa4_core.plan(core_problem(problem), speed_rules)


def describe(plan) -> tuple:
    return (
        plan.supported,
        plan.kernel and plan.kernel.name,
        plan.window_size_left,
        plan.window_size_right,
        plan.workspace.bytes,
        plan.reason,
    )


@settings(max_examples=500, deadline=None)
@given(problems(legal=False), st.booleans())
def test_any_problem_gets_a_kernel_or_a_reason_and_the_same_one_twice(problem, speed_rules):
    first = plan(problem, speed_rules)
    assert first.supported == (not first.reason), describe(first)
    assert first.workspace.bytes >= 0, describe(first)
    assert describe(first) == describe(plan(problem, speed_rules))


def smallest_bucket(problem) -> tuple[int, int]:
    """Returns the smallest bucket of head dims that holds a problem's."""
    return min(
        bucket
        for bucket in HEAD_DIM_BUCKETS[90 if problem["capability"] == 90 else 100]
        if bucket[0] >= problem["head_dim"] and bucket[1] >= problem["head_dim_v"]
    )


@settings(max_examples=500, deadline=None)
@given(problems())
def test_a_legal_problem_gets_the_smallest_bucket_of_its_own_kind(problem):
    chosen = plan(problem)
    assert chosen.supported, (problem, chosen.reason)
    kernel = chosen.kernel
    assert kernel.name in BUILT
    assert (kernel.head_dim, kernel.head_dim_v) == smallest_bucket(problem)
    assert kernel.arch == (90 if problem["capability"] == 90 else 100)
    assert kernel.layout.name == (
        "ANY" if kernel.op == fa4_core.Op.DECODE else problem["layout"].upper()
    )
    if kernel.op == fa4_core.Op.BACKWARD_KEYS:
        return
    assert kernel.deterministic == problem["deterministic"]
    # The kernel of groups runs MHA in packed sequences alone.
    if kernel.op == fa4_core.Op.BACKWARD:
        grouped = problem["num_heads"] != problem["num_heads_kv"]
        assert kernel.grouped == grouped or stores_whole_rows(problem, kernel)


def stores_whole_rows(problem, kernel) -> bool:
    """Returns where the SM100 kernel for MHA would store beyond head_dim, and the one with
    accumulators runs instead."""
    head_dims = problem["head_dim"], problem["head_dim_v"]
    below_bucket = kernel.arch == 100 and head_dims != (kernel.head_dim, kernel.head_dim_v)
    return below_bucket and (problem["layout"] == "varlen" or kernel.mask == fa4_core.Mask.WINDOW)


@pytest.mark.parametrize(
    ("capability", "head_dims", "bucket"),
    [
        (90, (192, 128), (192, 128)), (90, (160, 128), (192, 128)), (90, (136, 96), (192, 128)),
        (90, (192, 136), (192, 192)),
        (90, (128, 192), (192, 192)), (90, (128, 64), (128, 128)), (90, (64, 128), (128, 128)),
        (90, (256, 128), (256, 256)),
        (90, (64, 200), (256, 256)), (100, (192, 128), (192, 128)), (100, (136, 8), (192, 128)),
        (100, (128, 64), (128, 128)),
        (100, (64, 128), (128, 128)), (100, (192, 136), (256, 256)), (100, (64, 192), (256, 256)),
        (90, (264, 64), None), (100, (64, 264), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op", ("forward", "backward"))
def test_unequal_head_dims_get_the_smallest_bucket_that_holds_both(
    capability, head_dims, bucket, op
):
    chosen = plan(
        LEGAL
        | {"op": op, "capability": capability, "head_dim": head_dims[0], "head_dim_v": head_dims[1]}
    )
    assert (chosen.supported and (chosen.kernel.head_dim, chosen.kernel.head_dim_v)) == (
        bucket or False
    ), chosen.reason


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize(
    ("seqlen_q", "pair"), [(1, False), (128, False), (129, True), (4096, True)]
)
def test_sm100_gives_longer_queries_of_head_dim_256_a_pair_of_blocks(seqlen_q, pair, layout):
    lengths = {"seqlen_q": seqlen_q, "total_q": 2 * seqlen_q, "layout": layout}
    kernel = plan(LEGAL | lengths | {"capability": 100, "head_dim": 256, "head_dim_v": 256}).kernel
    assert (kernel.head_dim, kernel.block_m, kernel.two_cta) == (256, 128, pair)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "grouped"),
    [
        (64, 64, False), (56, 56, True), (128, 128, False), (96, 96, True), (128, 64, True),
        (64, 128, True), (192, 128, False),
        (160, 128, True), (192, 96, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "change", [{"layout": "varlen"}, {"window_size_left": 100}], ids=["varlen", "window"]
)
def test_sm100_gradients_below_the_bucket_come_from_accumulators(
    change, head_dim, head_dim_v, grouped
):
    problem = LEGAL | {
        "op": "backward",
        "capability": 100,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
    }
    chosen = plan(problem | change)
    assert chosen.supported and chosen.kernel.grouped == grouped
    dense = plan(problem)
    assert not dense.kernel.grouped


@settings(max_examples=100, deadline=None)
@given(problems(capabilities=(90,)), st.sampled_from([8, 200, 256]))
def test_hopper_s_backward_of_head_dims_above_192_goes_in_two_passes(problem, head_dim_v):
    """One pair of kernels serves every ratio of heads, and is deterministic."""
    chosen = plan(problem | {"op": "backward", "head_dim": 200, "head_dim_v": head_dim_v})
    mask = {0: "full", 1: "causal", 2: "window"}[int(chosen.kernel.mask)]
    kind = f"{problem['dtype']}_d256_{problem['layout']}_{mask}"
    assert chosen.kernel.name == f"sm90_backward_keys_{kind}_m64n64"
    assert ROWS[chosen.kernel.preprocess].name == f"sm90_backward_queries_{kind}_m128n64"
    rows = problem["total_q"]  # of logsumexp, in all sequences
    delta = 4 * rows * problem["num_heads"]
    assert delta <= chosen.workspace.bytes < delta + 256
    assert (chosen.workspace.delta, chosen.workspace.zeroed) == (0, chosen.workspace.bytes)


def end_of(parts: dict[str, tuple[int, int]]) -> int:
    """Returns where the last of (offset, size) ends. None overlap, and each is aligned as an
    allocation of its own would be."""
    end = 0
    for name, (offset, size) in sorted(parts.items(), key=lambda part: part[1][0]):
        assert offset % 256 == 0, f"{name} starts at {offset}"
        assert offset >= end, f"{name} starts at {offset}, the part before it ends at {end}"
        end = offset + size
    return end


@settings(max_examples=500, deadline=None)
@given(problems(largest=2**27))
def test_the_workspace_holds_every_tensor_and_nothing_overlaps(problem):
    chosen = plan(problem | {"op": "backward"})
    if not chosen.supported:
        assert "2^31 elements or more" in chosen.reason or "less than 2^30" in chosen.reason, (
            chosen.reason
        )
        return
    w, kernel = chosen.workspace, chosen.kernel
    if kernel.op == fa4_core.Op.BACKWARD_KEYS:  # which the test above is about
        return
    heads, heads_kv = problem["num_heads"], problem["num_heads_kv"]
    batch = problem["batch"] if problem["layout"] == "dense" else 1
    numbers = {
        "lse_log2": (w.lse_log2, 4 * batch * heads * w.rows_q),
        "delta": (w.delta, 4 * batch * heads * w.rows_q),
    }
    parts = {"dq_accum": (w.dq_accum, 4 * batch * heads * w.rows_q * kernel.head_dim)}
    zeroed = {}
    if kernel.grouped:
        zeroed["dk_accum"] = (w.dk_accum, 4 * batch * heads_kv * w.rows_k * kernel.head_dim)
        zeroed["dv_accum"] = (w.dv_accum, 4 * batch * heads_kv * w.rows_k * kernel.head_dim_v)
    if kernel.deterministic:
        zeroed["dq_semaphore"] = (
            w.dq_semaphore,
            4 * problem["batch"] * heads * w.tiles_q * w.cluster,
        )
        if kernel.grouped:
            size = 4 * problem["batch"] * heads_kv * w.tiles_k * 2
            zeroed |= {
                "dk_semaphore": (w.dk_semaphore, size),
                "dv_semaphore": (w.dv_semaphore, size),
            }
    if not w.numbers_in_dq:
        parts = numbers | parts
    for name, (offset, _) in (parts | zeroed).items():
        assert (offset >= w.zeroed) == (name in zeroed), (
            f"{name} at {offset}, zeroed from {w.zeroed} on"
        )
    assert end_of(parts | zeroed) <= w.bytes
    dq_bytes = 2 * problem["total_q"] * heads * problem["head_dim"]
    assert w.numbers_in_dq == (end_of(numbers) <= dq_bytes), (
        f"{end_of(numbers)} bytes of row numbers, {dq_bytes} of dQ"
    )
    assert max(w.rows_q, w.rows_k) * kernel.head_dim < 2**31
    longest = "seqlen" if problem["layout"] == "dense" else "total"
    # Whatever the caller says is the longest, one sequence may be all there is.
    tiles = w.tiles_q * kernel.block_m, w.tiles_k * kernel.block_n
    assert all(
        rows >= problem[f"{longest}_{side}"] for rows, side in zip(tiles, "qk", strict=True)
    ), (tiles, problem)
    assert w.rows_q >= problem[f"{longest}_q"] and w.rows_k >= problem[f"{longest}_k"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"capability": 80},
            "FA4 requires compute capability 9.0, 10.0 or 10.3, the device has 8.0",
        ),
        ({"capability": 120}, "the device has 12.0"),
        (
            {"head_dim": 264, "head_dim_v": 264},
            "head_dim must be at most 256 on compute capability 9.0 in this build, is 264",
        ),
        (  # where it runs in two passes, too
            {"op": "backward", "head_dim": 264, "head_dim_v": 264},
            "head_dim must be at most 256 on compute capability 9.0 in this build, is 264",
        ),
        (
            {"head_dim_v": 264, "capability": 103},
            "value's head_dim must be at most 256 on compute capability 10.3 in this build, is 264",
        ),
        ({"head_dim": 100, "head_dim_v": 100}, "head_dim must be a multiple of 8, is 100"),
        ({"head_dim_v": 100}, "value's head_dim must be a multiple of 8, is 100"),
        ({"head_dim": 0}, "head_dim must be positive, is 0"),
        ({"head_dim_v": 0}, "value's head_dim must be positive, is 0"),
        ({"num_heads_kv": 3}, "8, is not a multiple of the number of key/value heads, 3"),
        ({"seqlen_k": -1}, "max_k must not be negative, is -1"),
        (
            {"num_heads": 65_536, "num_heads_kv": 1},
            "at most 65535 query heads can share a key/value head, here 65536",
        ),
        (
            {"num_heads": 2**30, "num_heads_kv": 2**30},
            "the number of heads must be less than 2^30, is 1073741824",
        ),
        (
            {"seqlen_q": 2**30, "total_q": 2**31},
            "queries and keys of all sequences must each be less than 2^30, are 2147483648",
        ),
        (
            {"layout": "varlen", "page_size": 256, "total_k": 2**31},
            "queries of all sequences and keys of all pages must each be less than 2^30, are "
            "2147483648",
        ),
    ],
)
def test_a_reason_names_the_argument_and_the_value(change, reason):
    chosen = plan(LEGAL | change)
    assert not chosen.supported
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("is_causal", "left", "right", "mask", "bounds"),
    [
        (False, -1, -1, "FULL", (fa4_core.UNBOUNDED, fa4_core.UNBOUNDED)),
        # A window of the whole length masks nothing.
        (False, 512, 512, "FULL", (fa4_core.UNBOUNDED, fa4_core.UNBOUNDED)),
        (True, -1, -1, "CAUSAL", (fa4_core.UNBOUNDED, 0)),
        # A causal mask is a right bound of zero, whatever the window says.
        (True, -1, 100, "CAUSAL", (fa4_core.UNBOUNDED, 0)),
        (False, -1, 0, "CAUSAL", (fa4_core.UNBOUNDED, 0)),
        (True, 100, 0, "WINDOW", (100, 0)),
        (True, 600, 0, "CAUSAL", (fa4_core.UNBOUNDED, 0)),
        (False, 100, -1, "WINDOW", (100, fa4_core.UNBOUNDED)),
        (False, -1, 100, "WINDOW", (fa4_core.UNBOUNDED, 100)),
        (False, 0, 0, "WINDOW", (0, 0)),
    ],
)
def test_masks_resolve_as_the_stock_kernel_resolves_them(is_causal, left, right, mask, bounds):
    # With half the tiles it would be decoded, whose mask is any.
    forward = {"batch": 4, "total_q": 2048, "total_k": 2048}
    chosen = plan(
        LEGAL
        | forward
        | {"is_causal": is_causal, "window_size_left": left, "window_size_right": right}
    )
    assert chosen.kernel.mask.name == mask
    assert (chosen.window_size_left, chosen.window_size_right) == bounds


@pytest.mark.parametrize(
    ("change", "decode"),
    [
        ({"batch": 8, "seqlen_q": 1}, True),  # a step of decoding
        # of a block of keys each, which a start outweighs
        ({"batch": 8, "seqlen_q": 1, "seqlen_k": 64}, False),
        # 8 tiles of 64 rows a key/value head against 4 of 128
        ({"batch": 32, "seqlen_q": 128, "num_heads": 32}, False),
        ({"batch": 32, "seqlen_q": 32, "num_heads": 32}, True),  # 2 against 4 of 64
        ({"batch": 1, "seqlen_q": 64, "num_heads": 32}, True),  # 32 tiles for 132 SMs
        # many short sequences
        ({"batch": 256, "seqlen_q": 64, "seqlen_k": 64, "num_heads": 8}, False),
        ({"batch": 1, "seqlen_q": 513, "num_heads": 64}, False),  # more rows than are decoded
    ],
    ids=str,
)
def test_few_queries_are_decoded_where_that_is_faster(change, decode):
    problem = LEGAL | {"seqlen_k": 8192, "num_heads_kv": 8} | change
    chosen = plan(
        problem | {f"total_{side}": problem["batch"] * problem[f"seqlen_{side}"] for side in "qk"}
    )
    assert (chosen.kernel.op == fa4_core.Op.DECODE) == decode, chosen.kernel.name


def decode(where: fa4_core.Decode) -> fa4_core.Overrides:
    return fa4_core.Overrides(decode=where)


@settings(max_examples=300, deadline=None)
@given(problems(largest=5000))
def test_the_decode_kernel_can_be_forced_up_to_its_most_rows_and_avoided(problem):
    core = core_problem(problem | {"op": "forward", "capability": 90, "deterministic": False})
    rows = problem["seqlen_q"] * problem["num_heads"] // problem["num_heads_kv"]
    forced = fa4_core.plan(core, False, decode(fa4_core.Decode.WHERE_POSSIBLE)).kernel
    assert (forced.op == fa4_core.Op.DECODE) == (problem["seqlen_q"] <= 512 and rows <= 4096), (
        problem,
        forced.name,
    )
    avoided = fa4_core.plan(core, False, decode(fa4_core.Decode.WHERE_NEEDED)).kernel
    assert avoided.op == fa4_core.Op.FORWARD


@pytest.mark.parametrize("capability", (90, 100))
def test_with_one_split_the_tile_does_not_depend_on_the_batch(capability):
    """A sequence must get the same kernel alone, with longer ones and with many: that is batch
    invariance."""
    packed = {
        "layout": "varlen",
        "num_splits": 1,
        "capability": capability,
        "num_heads": 8,
        "num_heads_kv": 8,
    }
    batches = [(1, 5), (1, 64), (64, 64), (64, 300), (3, 5000)]
    names = {
        plan(
            LEGAL
            | packed
            | {
                "batch": batch,
                "seqlen_q": longest,
                "seqlen_k": longest,
                "total_q": 400,
                "total_k": 400,
            }
        ).kernel.name
        for batch, longest in batches
    }
    assert len(names) == 1, names


@st.composite
def batches_of_a_sequence(draw) -> tuple[dict, dict]:
    """Draws two problems with num_splits=1 that the same sequence may be a part of."""
    paged = draw(st.booleans())
    problem = draw(problems(capabilities=(90, 100)))
    problem |= {"op": "forward", "deterministic": False, "num_splits": 1}
    if paged:
        problem |= {"layout": "varlen", "page_size": 256}

    def with_others() -> dict:
        batch = draw(st.sampled_from((1, 2, 3, 64, 300, 3_000)))
        lengths = {"batch": batch}
        for side in ("q", "k"):
            length = problem[f"seqlen_{side}"]
            if problem["layout"] == "varlen":
                length = draw(st.integers(1, 40_000))
                lengths[f"total_{side}"] = draw(st.integers(length, batch * length))
            else:
                lengths[f"total_{side}"] = batch * length
            lengths[f"seqlen_{side}"] = length
        return problem | lengths

    return with_others(), with_others()


@settings(max_examples=500, deadline=None)
@given(batches_of_a_sequence())
def test_with_one_split_what_decides_bits_does_not_depend_on_other_sequences(batches):
    """The mask may: a window of the longest keys is none. The order of keys is the same then."""
    one, other = (plan(problem, speed_rules=True) for problem in batches)
    too_long = "must each be less than 2^30"
    for chosen in (one, other):
        assert chosen.supported or too_long in chosen.reason, (batches, chosen.reason)
    if not (one.supported and other.supported):
        return
    if one.kernel.mask == other.kernel.mask:
        assert one.kernel.name == other.kernel.name, batches
    decides = ("op", "head_dim", "head_dim_v", "block_m", "block_n", "two_cta", "tuned")
    facts = [
        {"splits": chosen.splits} | {name: getattr(chosen.kernel, name) for name in decides}
        for chosen in (one, other)
    ]
    assert facts[0] == facts[1], batches


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({"batch": 1}, 16),  # the most that a cluster holds
        ({"batch": 2}, 8),
        ({"batch": 5}, 3),
        ({"batch": 10}, 2),  # 80 heads leave SMs idle, and two CTAs share one
        ({"batch": 17}, 1),
        ({"batch": 10, "head_dim": 256, "head_dim_v": 256}, 1),  # of this head dim, one fills it
        ({"batch": 1, "seqlen_k": 200}, 4),  # blocks of 64 keys
        ({"batch": 1, "seqlen_k": 200, "head_dim": 64, "head_dim_v": 64}, 2),  # of 128
        ({"batch": 1, "is_causal": True, "window_size_left": 127}, 2),  # of which a query sees 128
    ],
    ids=str,
)
def test_keys_are_split_over_the_sms_that_heads_leave_idle(change, splits):
    problem = core_problem(LEGAL | {"seqlen_q": 1, "seqlen_k": 16_384} | change)
    chosen = fa4_core.plan(problem, False, decode(fa4_core.Decode.WHERE_POSSIBLE))
    assert chosen.kernel.op == fa4_core.Op.DECODE
    assert chosen.splits == splits


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({}, 4),  # 32 key blocks
        ({"batch": 2}, 2),
        ({"batch": 4}, 1),
        ({"seqlen_q": 64}, 2),  # eight heads' query tiles
        ({"num_heads": 1, "seqlen_q": 400}, 1),
        ({"layout": "varlen", "batch": 3, "total_q": 2_048, "total_k": 2_048}, 2),
        ({"head_dim": 128, "head_dim_v": 128}, 1),  # in one pass
    ],
    ids=str,
)
def test_query_tiles_are_divided_over_the_sms_that_key_blocks_leave_idle(change, splits):
    problem = {"op": "backward", "is_causal": True, "batch": 1, "num_heads": 8, "num_heads_kv": 1}
    lengths = {"seqlen_q": 2_048, "seqlen_k": 2_048, "head_dim": 256, "head_dim_v": 256}
    chosen = fa4_core.plan(core_problem(LEGAL | problem | lengths | change), False)
    assert chosen.supported
    assert chosen.splits == splits


DECODE = {"layout": "varlen", "seqlen_q": 1, "total_q": 2, "num_heads_kv": 2}
# Each sequence uses a number of a dense cache's rows.
CACHE = {"layout": "dense", "keys_in_use": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (CACHE, ""),
        (CACHE | {"batch": 1, "seqlen_q": 512, "total_q": 512}, ""),
        (
            CACHE | {"batch": 1, "seqlen_q": 513, "total_q": 513},
            "seqused_k of dense tensors is supported for at most 512 queries, here 513",
        ),
        (CACHE | {"capability": 100}, ""),
        (
            CACHE | {"op": "backward"},
            "seqused_k of dense tensors is supported only in a forward",
        ),
        ({"num_splits": 3}, ""),
        (
            {"num_splits": 3, "seqlen_q": 513, "total_q": 513},
            "SplitKV (num_splits is 3) is supported for at most 512 queries, here 513",
        ),
        (
            {"num_splits": 3, "op": "backward"},
            "SplitKV (num_splits is 3) is supported only in a forward",
        ),
        ({"num_splits": 1, "seqlen_q": 513, "total_q": 513}, ""),
    ],
    ids=str,
)
def test_a_dense_cache_and_splits_are_the_decode_kernel_s(change, reason):
    chosen = plan(LEGAL | DECODE | change)
    assert chosen.supported == (not reason), chosen.reason
    assert chosen.reason == reason


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        ({}, (16, 128)),
        ({"seqlen_q": 4, "total_q": 8}, (16, 128)),  # of 4 heads each
        ({"seqlen_q": 5, "total_q": 10}, (64, 64)),
        ({"seqlen_q": 40, "total_q": 80}, (64, 64)),
        ({"page_size": 64}, (64, 64)),  # half a key block of the other tile
        ({"page_size": 128}, (16, 128)),
        ({"page_size": 96}, (16, 128)),  # half a key block of the other tile, too
        ({"page_size": 16}, (16, 128)),
        ({"page_size": 128, "num_splits": 1}, (64, 64)),  # whatever the rest of the batch
        ({"page_size": 16, "num_splits": 1}, (64, 64)),
        ({"num_splits": 3}, (16, 128)),
    ],
    ids=str,
)
def test_the_smallest_tile_decodes_that_holds_all_rows_and_reads_whole_blocks(change, tile):
    problem = LEGAL | DECODE | {"head_dim": 64, "head_dim_v": 64} | change
    chosen = fa4_core.plan(core_problem(problem), False, decode(fa4_core.Decode.WHERE_POSSIBLE))
    assert chosen.kernel.op == fa4_core.Op.DECODE
    assert (chosen.kernel.block_m, chosen.kernel.block_n) == tile


@pytest.mark.parametrize(
    ("change", "decoded"),
    [
        ({}, True),
        ({"num_heads": 32, "num_heads_kv": 1}, True),
        # Two tiles would read the keys twice, with slower products than the forward's.
        ({"num_heads": 33, "num_heads_kv": 1}, False),
        ({"num_heads": 33, "num_heads_kv": 1, "num_splits": 2}, True),
    ],
    ids=str,
)
def test_blackwell_decodes_where_keys_are_read_once(change, decoded):
    problem = {"capability": 100, "batch": 1, "seqlen_q": 1, "total_q": 1, "seqlen_k": 30_000}
    chosen = plan(LEGAL | problem | {"total_k": 30_000} | change)
    assert (chosen.kernel.op == fa4_core.Op.DECODE) == decoded, chosen.kernel.name


PREFILL = DECODE | {"seqlen_q": 4096, "total_q": 5000}
LONG = {"seqlen_k": 8192}


@pytest.mark.parametrize(
    ("change", "op"),
    [
        (LONG, fa4_core.Op.DECODE),
        (LONG | {"page_size": 16}, fa4_core.Op.DECODE),
        (PREFILL, fa4_core.Op.FORWARD),
        (PREFILL | {"page_size": 16, "is_causal": True}, fa4_core.Op.FORWARD),
        (PREFILL | {"page_size": 48, "window_size_left": 100}, fa4_core.Op.FORWARD),
        # a hint about speed, where it is not 1
        (PREFILL | {"num_splits": 3}, fa4_core.Op.FORWARD),
        # the same bits in every batch, whatever its longest sequence
        (PREFILL | {"num_splits": 1}, fa4_core.Op.DECODE),
        ({"num_splits": 1}, fa4_core.Op.DECODE),
        # Few queries run where they run without pages.
        ({}, fa4_core.Op.FORWARD),
        ({"batch": 32, "seqlen_q": 96, "total_q": 3072, "num_heads_kv": 8}, fa4_core.Op.FORWARD),
        ({"seqlen_q": 513, "total_q": 513}, fa4_core.Op.FORWARD),
        ({"seqlen_q": 512, "total_q": 512, "num_heads": 18}, fa4_core.Op.FORWARD),
        # more heads than a grid of the decode kernel holds
        ({"num_heads": 70_000, "num_heads_kv": 70_000}, fa4_core.Op.FORWARD),
    ],
    ids=str,
)
@pytest.mark.parametrize(("capability", "workspace"), [(90, 4), (100, 0)])
def test_pages_have_a_kernel_for_any_number_of_queries(change, op, capability, workspace):
    chosen = plan(LEGAL | DECODE | {"page_size": 256, "capability": capability} | change)
    assert chosen.supported, chosen.reason
    assert chosen.kernel.op == op, chosen.kernel.name
    if op == fa4_core.Op.FORWARD:
        assert chosen.kernel.layout == fa4_core.Layout.PAGED
        assert (chosen.splits, chosen.workspace.bytes) == (1, workspace)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_size": 100}, "a page of block_table must hold a multiple of 16 keys, holds 100"),
        ({"page_size": 8}, "a page of block_table must hold a multiple of 16 keys, holds 8"),
        (
            {"capability": 100, "pages_in_rows": False},
            "on compute capability 10.0 and 10.3 the pages of block_table must lie whole rows "
            "apart, with less than 2^30 rows in all",
        ),
        ({"op": "backward"}, "paged KV (block_table) is supported only in a forward"),
        (
            {"op": "backward", "capability": 100},
            "paged KV (block_table) is supported only in a forward",
        ),
    ],
    ids=str,
)
def test_why_pages_are_read_by_no_kernel(change, reason):
    assert plan(LEGAL | PREFILL | {"page_size": 256} | change).reason == reason


def test_no_rule_decides_about_pages():
    """The rules of speed and of tiles were measured without pages."""
    long = {
        "layout": "varlen", "batch": 4, "seqlen_q": 8192, "seqlen_k": 8192, "total_q": 32_768,
        "total_k": 32_768, "head_dim": 96, "head_dim_v": 96,
    }  # fmt: skip
    plain, paged = (
        plan(LEGAL | long | pages, speed_rules=True) for pages in ({}, {"page_size": 16})
    )
    assert plain.kernel.tuned
    assert paged.supported and not paged.kernel.tuned


@settings(max_examples=300, deadline=None)
@given(problems(capabilities=(90,), ops=("forward",)), st.sampled_from((16, 48, 64, 256)))
def test_the_forward_in_pages_has_the_tile_without_pages(problem, page_size):
    problem |= {"layout": "varlen", "seqlen_q": 4096, "total_q": 4096 * problem["batch"]}
    plain, paged = plan(problem), plan(problem | {"page_size": page_size})
    for field in ("op", "mask", "head_dim", "head_dim_v", "block_m", "block_n"):
        assert getattr(plain.kernel, field) == getattr(paged.kernel, field), field


@settings(max_examples=300, deadline=None)
@given(
    problems(),
    st.sampled_from((1, 64, 513)),
    st.sampled_from((1, 4_000)),
    st.sampled_from(({"keys_in_use": True}, {"num_splits": 3})),
)
def test_a_reason_about_caches_or_splits_is_true_of_its_call(problem, queries, more_heads, change):
    problem["seqlen_q"] = min(problem["seqlen_q"], queries)
    for heads in ("num_heads", "num_heads_kv"):
        problem[heads] *= more_heads
    name = {
        "keys_in_use": "seqused_k of dense tensors",
        "num_splits": "SplitKV (num_splits is 3)",
    }[next(iter(change))]
    rows = problem["seqlen_q"] * problem["num_heads"] // problem["num_heads_kv"]
    tiles = problem["num_heads_kv"] * -(-rows // (64 if problem["capability"] == 90 else 32))
    chosen = plan(problem | change)
    if chosen.supported and chosen.kernel.op != fa4_core.Op.DECODE:
        # PyTorch cannot run it, or would compute another function.
        assert "num_splits" in change and not plan(problem, speed_rules=True).stock_is_faster
        return
    if problem["op"] == "backward":
        limit = "only in a forward"
    elif problem["seqlen_q"] > 512:
        limit = f"for at most 512 queries, here {problem['seqlen_q']}"
    elif rows > 4096:
        limit = f"for at most 4096 queries times query heads of a key/value head, here {rows}"
    elif tiles > 65_535:
        limit = f"for at most 65535 tiles of queries and heads in a sequence, here {tiles}"
    else:
        assert "is supported" not in chosen.reason
        return
    assert chosen.reason == f"{name} is supported {limit}"


@pytest.mark.parametrize(("asked", "splits"), [(0, 8), (5, 5), (100, 16)])
def test_number_of_splits_is_the_caller_s_where_given(asked, splits):
    assert (
        plan(
            LEGAL | DECODE | {"batch": 8, "total_q": 8, "seqlen_k": 8192, "num_splits": asked}
        ).splits
        == splits
    )


@pytest.mark.parametrize(
    "change", [{}, {"batch": 8, "total_q": 8}, {"seqlen_q": 100, "total_q": 101}], ids=str
)
def test_one_split_gets_the_same_kernel_whatever_the_batch(change):
    """torch promises for num_splits=1 the same bits alone and in any batch."""
    assert plan(LEGAL | DECODE | {"num_splits": 1} | change).kernel.op == fa4_core.Op.FORWARD
    chosen = plan(LEGAL | DECODE | {"num_splits": 1, "page_size": 256} | change)
    assert (chosen.kernel.op, chosen.splits) == (fa4_core.Op.DECODE, 1)


def test_a_cluster_is_no_larger_than_the_kernel_and_the_gpu_allow():
    source = (Path(__file__).parents[1] / "kernels" / "sm90" / "decode.py").read_text()
    most = int(re.search(r"^MAX_SPLITS = (\d+)", source, re.MULTILINE)[1])
    problem = core_problem(
        LEGAL | DECODE | {"batch": 1, "num_heads": 1, "num_heads_kv": 1, "seqlen_k": 2**20}
    )
    assert fa4_core.plan(problem, False).splits == most == 16
    # A part of a device may have no 16 SMs side by side.
    problem.sm_count = 78
    assert fa4_core.plan(problem, False).splits == 8


SHORT_OF_TILES = {"batch": 1, "seqlen_q": 1, "seqlen_k": 65_536, "total_q": 1, "total_k": 65_536}
OF_SENTENCES = {
    "layout": "varlen", "batch": 280, "seqlen_q": 150, "seqlen_k": 150, "total_q": 42_000,
    "total_k": 42_000, "num_heads": 12,
    "num_heads_kv": 12, "head_dim": 64, "head_dim_v": 64,
}  # fmt: skip
BACKWARD = {"op": "backward"}


@pytest.mark.parametrize(
    ("change", "stock"),
    [
        ({}, False),
        (SHORT_OF_TILES, False),  # which the decode kernel runs
        (OF_SENTENCES, False),
        (BACKWARD | OF_SENTENCES, True),
        (BACKWARD | OF_SENTENCES | {"capability": 100}, False),  # measured on Hopper only
        (BACKWARD | OF_SENTENCES | {"head_dim_v": 128}, False),  # which stock can't run
        (BACKWARD | OF_SENTENCES | {"batch": 4, "seqlen_q": 4096, "seqlen_k": 4096}, False),
        (BACKWARD | SHORT_OF_TILES, False),
    ],
    ids=[
        "training",
        "decode",
        "sentences",
        "backward",
        "on_sm100",
        "of_64_and_128",
        "of_long_sequences",
        "of_decode",
    ],
)
def test_speed_rules_leave_to_stock_what_it_runs_faster(change, stock):
    problem = LEGAL | change
    chosen = plan(problem, speed_rules=True)
    assert plan(problem).supported
    assert chosen.supported == (not stock), chosen.reason
    assert chosen.reason.startswith("the stock kernel is faster") == stock


def test_every_backward_row_names_its_companions():
    for row in ROWS:
        companions = (row.preprocess, row.postprocess_dq, row.postprocess_dk, row.postprocess_dv)
        if row.op == fa4_core.Op.BACKWARD_KEYS:
            first = ROWS[row.preprocess]
            assert first.op == fa4_core.Op.BACKWARD_QUERIES and companions[1:] == (-1,) * 3
            alike = ("arch", "dtype", "head_dim", "head_dim_v", "layout", "mask")
            assert all(getattr(first, x) == getattr(row, x) for x in alike), row.name
            continue
        if row.op not in (fa4_core.Op.BACKWARD, fa4_core.Op.BACKWARD_GROUPS):
            assert companions == (-1,) * 4, row.name
            continue
        assert ROWS[row.preprocess].op == fa4_core.Op.PREPROCESS, row.name
        assert ROWS[row.postprocess_dq].op == fa4_core.Op.POSTPROCESS, row.name
        assert (row.postprocess_dk >= 0) == (row.postprocess_dv >= 0) == row.grouped, row.name
        assert ROWS[row.preprocess].head_dim_v == row.head_dim_v, row.name
        if row.grouped:
            assert (ROWS[row.postprocess_dk].head_dim, ROWS[row.postprocess_dv].head_dim) == (
                row.head_dim,
                row.head_dim_v,
            ), row.name


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_strides_of_results_are_empty_likes(sizes, data):
    """Views of every kind are tried: permuted, sliced, expanded."""
    given_sizes = [size * data.draw(st.integers(1, 2)) for size in sizes]
    tensor = torch.empty(given_sizes).permute(*data.draw(st.permutations(range(len(sizes)))))
    for dim in range(tensor.dim()):
        step = data.draw(st.integers(1, 2))
        tensor = (
            tensor.narrow(dim, 0, 1).expand(*[-1] * dim, 3, *[-1] * (tensor.dim() - dim - 1))
            if data.draw(st.booleans()) and step == 2
            else (tensor[(slice(None),) * dim + (slice(None, None, step),)])
        )
    ours = fa4_core.empty_like_strides(list(tensor.shape), list(tensor.stride()))
    assert ours == list(torch.empty_like(tensor).stride()), (tensor.shape, tensor.stride())


@settings(max_examples=300, deadline=None)
@given(st.integers(3, 4), st.data())
def test_strides_of_an_output_with_value_s_head_dim_are_torch_s(rank, data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    query = torch.empty(sizes, device="meta").permute(*data.draw(st.permutations(range(rank))))
    shape = (*query.shape[:-1], query.size(-1) + 1)
    # Torch 2.15's rule holds for every rank.
    order = sorted(range(rank), key=lambda dim: query.stride(dim), reverse=True)
    inverse = [order.index(dim) for dim in range(rank)]
    expected = torch.empty([shape[dim] for dim in order], device="meta").permute(inverse).stride()
    assert fa4_core.output_strides(list(shape), list(query.stride())) == list(expected), (
        shape,
        query.stride(),
    )


@pytest.mark.parametrize("change", [{}, {"deterministic": True}, {"num_heads_kv": 1}], ids=str)
def test_a_workspace_of_more_bytes_than_can_be_counted_is_turned_down(change):
    extreme = {"op": "backward", "batch": 65_535, "num_heads": 65_535, "num_heads_kv": 65_535}
    lengths = {f"{length}_{side}": 2**23 for length in ("seqlen", "total") for side in "qk"}
    chosen = plan(LEGAL | extreme | lengths | change)
    assert not chosen.supported
    assert chosen.reason == (
        "the backward's workspace must have less than 2^62 bytes, has more for 65535 sequences of "
        "65535 heads"
    ), chosen.reason


@pytest.mark.parametrize("sm_count", (2**31 - 1, 2**30, 1, 0, -1, -(2**31)))
@pytest.mark.parametrize("is_causal", (False, True))
def test_any_number_of_sms_gives_a_plan_with_ctas(sm_count, is_causal):
    problem = core_problem(
        LEGAL
        | {
            "is_causal": is_causal,
            "batch": 64,
            "seqlen_q": 8192,
            "seqlen_k": 8192,
            "num_heads_kv": 1,
        }
    )
    problem.sm_count = sm_count
    chosen = fa4_core.plan(problem, False)
    assert chosen.supported, chosen.reason
    assert 1 <= chosen.num_ctas <= max(sm_count, 1), chosen.num_ctas
    assert 0 <= chosen.paired_heads <= 64 * 8, chosen.paired_heads


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"total_q": 0, "seqlen_q": 0},
        {"total_k": 0, "seqlen_k": 0},
        {"num_heads": 0, "num_heads_kv": 0},
    ],
)
@pytest.mark.parametrize("op", ("forward", "backward"))
@pytest.mark.parametrize("speed_rules", (False, True))
def test_without_queries_or_keys_there_is_nothing_to_compute(op, change, speed_rules):
    chosen = plan(LEGAL | {"op": op} | change, speed_rules)
    assert chosen.supported and chosen.nothing_to_compute and chosen.kernel is None, describe(
        chosen
    )
    assert chosen.workspace.bytes == 0, describe(chosen)


SHORT_SEQUENCES = LEGAL | {
    "op": "backward", "layout": "varlen", "batch": 300, "seqlen_q": 100, "seqlen_k": 20,
    "total_q": 15_000, "total_k": 3_000,
    "head_dim": 64, "head_dim_v": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        ({}, True),
        ({"window_size_left": 5, "window_size_right": 3}, True),
        ({"window_size_right": 3}, True),
        ({"is_causal": True, "window_size_left": 5}, True),
        ({"seqlen_k": 0}, False),  # a launch without key blocks, for PyTorch
        ({"seqlen_q": 0}, False),
        ({"longest_is_zero": True}, False),
        ({"window_size_left": 5}, False),  # a right bound of max_k, for PyTorch
        ({"window_size_left": 5, "window_size_right": 20}, False),  # that bound is none
        ({"window_size_left": 5, "seqlen_q": 21, "total_q": 6_000}, True),
        ({"window_size_left": 5, "seqlen_q": 22, "total_q": 6_000}, False),
        ({"window_size_left": 2**31}, False),  # narrowed to 32 bits, there
        ({"window_size_left": 3, "window_size_right": 2**32 + 1}, False),
        ({"batch": 65_536, "total_q": 900_000, "total_k": 900_000}, False),  # beyond its grids
        (
            {
                "batch": 5,
                "num_heads": 65_536,
                "num_heads_kv": 65_536,
                "total_q": 500,
                "total_k": 100,
            },
            False,
        ),
    ],
)
def test_a_speed_rule_holds_only_where_pytorchs_kernel_computes_the_same(change, agrees):
    problem = SHORT_SEQUENCES | change
    assert plan(problem).supported, plan(problem).reason
    chosen = plan(problem, speed_rules=True)
    assert chosen.stock_is_faster == (not chosen.supported)
    assert chosen.supported == (not agrees), describe(chosen)


FEW_KEYS = {
    "op": "backward", "layout": "dense", "seqlen_q": 100, "seqlen_k": 76, "num_heads": 32,
    "num_heads_kv": 8,
}  # fmt: skip
OF_96 = {
    "op": "backward", "layout": "varlen", "seqlen_q": 60, "seqlen_k": 60, "num_heads": 32,
    "num_heads_kv": 32, "head_dim": 96, "head_dim_v": 96,
}  # fmt: skip
DETERMINISTIC = {
    "op": "backward", "layout": "varlen", "seqlen_q": 60, "seqlen_k": 60, "num_heads": 32,
    "num_heads_kv": 32, "is_causal": True, "deterministic": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "batch", "rule_holds"),
    [
        # 128 rows of 32 heads x 128 columns a sequence, in all less than 2^31 or more
        (FEW_KEYS, 4_095, True), (FEW_KEYS, 4_096, False), (FEW_KEYS, 8_192, False),
        # 60 + 128 rows of 32 x 96 columns
        (OF_96, 3_700, True), (OF_96, 12_000, False),
        (DETERMINISTIC, 2_700, True), (DETERMINISTIC, 12_000, False),
    ],
)  # fmt: skip
def test_no_rule_leaves_to_pytorch_what_its_accumulator_cannot_hold(problem, batch, rule_holds):
    """Its backward counts the accumulator's elements in int."""
    rows = {name: batch * problem[f"seqlen_{name[-1]}"] for name in ("total_q", "total_k")}
    chosen = plan(LEGAL | problem | rows | {"batch": batch}, speed_rules=True)
    assert chosen.stock_is_faster == rule_holds, describe(chosen)
    assert chosen.supported == (not rule_holds), describe(chosen)


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize(
    ("queries", "supported"),
    [(2_000, True), (601, False)],  # PyTorch's right bound, of 600 keys, hides some of the first
)
def test_splits_leave_no_forward_to_pytorch_whose_backward_is_ours(layout, queries, supported):
    window = {"window_size_left": 100, "window_size_right": -1, "num_splits": 2}
    lengths = {"seqlen_q": queries, "total_q": 2 * queries, "seqlen_k": 600, "total_k": 1_200}
    problem = LEGAL | {"batch": 2, "layout": layout} | lengths | window
    forward, backward = plan(problem), plan(problem | {"op": "backward", "num_splits": 0})
    assert backward.supported
    assert forward.supported == supported, describe(forward)
    assert supported or "SplitKV (num_splits is 2) is supported" in forward.reason


def test_a_forward_says_why_no_backward_could_follow():
    """PyTorch's grid does not hold the sequences, our accumulators not their rows."""
    total = 70_000 * 200
    lengths = {"seqlen_q": 200, "seqlen_k": 200, "total_q": total, "total_k": total}
    chosen = plan(LEGAL | {"layout": "varlen", "batch": 70_000} | lengths)
    assert chosen.reason == (
        "no kernel could run its backward (an accumulator has 2^31 elements or more a head: "
        f"{total} rows), and PyTorch's does not compute its derivative"
    )
