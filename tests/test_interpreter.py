"""Compiled kernels, run by an interpreter of their PTX: without a GPU, in random orders of warps
and copies."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import biases
import fake_device
import pytest
from built import kernels
from interpreter.sources import compiling, programs

from kernels.kernel import ONE_PASS, Kernel, Layout, Mask, Op
from kernels.matrix import companions

ROOT = Path(__file__).parent.parent
CALLS = int(os.environ.get("FA4_EXT_INTERPRETED_CALLS", "4"))  # per kernel
SEED = int(os.environ.get("FA4_EXT_SEED", "0"))
LISTS = 40  # calls whose lists of tiles are read
# A kernel takes ten seconds to compile again, and as much to run, so by default these are of one
# dtype.
DTYPES = os.environ.get("FA4_EXT_INTERPRETED_DTYPES", "bf16").split(",")
ATTENTION = [kernel for kernel in kernels() if kernel.dtype in DTYPES]
ALL_FORWARDS = [kernel for kernel in ATTENTION if kernel.op is Op.FORWARD]
FORWARDS = [kernel for kernel in ALL_FORWARDS if kernel.layout is not Layout.PAGED]
PAGED = [kernel for kernel in ALL_FORWARDS if kernel.layout is Layout.PAGED]
UNBIASED = [kernel for kernel in FORWARDS if kernel.mask is not Mask.BIAS]
DECODES = [kernel for kernel in ATTENTION if kernel.op is Op.DECODE]
BACKWARDS = [kernel for kernel in ATTENTION if kernel.op in ONE_PASS and not kernel.tuned]
TWO_PASSES = [kernel for kernel in ATTENTION if kernel.op is Op.BACKWARD_KEYS]
BIASED = [kernel for kernel in (*FORWARDS, *TWO_PASSES) if kernel.mask is Mask.BIAS]


@pytest.fixture(scope="module", autouse=True)
def compiled(request) -> None:
    """Compiles the kernels of all chosen tests together: one by one they would leave a core idle.
    Of several pytest workers the first one compiles, and the others wait for it."""
    chosen = [
        item.callspec.params["kernel"]
        for item in request.session.items
        if item.module is request.module
    ]
    with compiling():
        programs(*(one for kernel in chosen for one in run_by(kernel)))


def each(kernels: list[Kernel]) -> pytest.MarkDecorator:
    """Parametrizes by kernel. The first one of an architecture is part of the short suite, and the
    first one with a bias."""
    short = {(one.arch, one.mask is Mask.BIAS): one for one in reversed(kernels)}.values()
    cases = [
        pytest.param(kernel, id=kernel.name, marks=() if kernel in short else pytest.mark.long)
        for kernel in kernels
    ]
    return pytest.mark.parametrize("kernel", cases)


def lengths(draw: random.Random, kernel: Kernel, varlen: bool) -> tuple[list[int], list[int]]:
    """Draws lengths around tiles' ends: queries and keys of the sequences."""
    longest = draw.choice((kernel.block_m, 2 * kernel.block_m, 3 * kernel.block_m))

    def length() -> int:
        return draw.choice(
            (draw.randint(1, longest), longest, max(1, longest // 64 * 64 - draw.randint(0, 64)))
        )

    count = draw.choice((1, 2, 5)) if varlen else 1
    queries = [length() for _ in range(count)]
    keys = list(queries) if draw.random() < 0.5 else [length() for _ in range(count)]
    return queries, keys


def problem(draw: random.Random, kernel: Kernel) -> dict:
    layouts, masks = (kernel.layout,), (kernel.mask,)
    if kernel.layout is Layout.ANY:
        layouts, masks = (
            (Layout.DENSE, Layout.VARLEN),
            tuple(dict.fromkeys(forward.mask for forward in UNBIASED)),
        )
    varlen, mask = draw.choice(layouts) is not Layout.DENSE, draw.choice(masks)
    queries, keys = lengths(draw, kernel, varlen)
    heads_kv, ratio = draw.choice(((1, 1), (1, 2), (2, 1)))
    batch = 1 if varlen else draw.choice((1, 2))
    fields = {
        "dtype": kernel.dtype, "head_dim": kernel.head_dim - draw.choice((0, 0, 8)),
        "head_dim_v": kernel.head_dim_v,
        "heads": heads_kv * ratio, "heads_kv": heads_kv, "varlen": varlen,
        "seqlens_q": queries * batch, "seqlens_k": keys * batch,
    }  # fmt: skip
    if mask is Mask.CAUSAL:
        fields["is_causal"] = True
    if mask is Mask.WINDOW:
        fields["window"] = [draw.randint(0, max(keys) - 1), draw.randint(0, max(keys) - 1)]
    return fields | bias(draw) if mask is Mask.BIAS else fields


def bias(draw: random.Random) -> dict:
    """Draws a kind of bias, as it is or in another form and layout."""
    fields = {"bias": draw.choice(list(biases.KINDS))}
    if draw.random() < 0.5:
        return fields
    layouts = [*biases.LAYOUTS, biases.EXPANDED]
    return fields | {
        "bias_form": draw.choice(list(biases.FORMS)),
        "bias_layout": draw.choice(layouts),
    }


def run_by(kernel: Kernel) -> list[Kernel]:
    """Returns the kernels that a test of this one runs, but for those that they launch."""
    if kernel.op not in (*ONE_PASS, Op.BACKWARD_KEYS):
        return [kernel]
    alike = ("arch", "dtype", "head_dim", "head_dim_v", "layout", "mask")
    # Where heads are not grouped, Blackwell's kernel for grouped ones may run, too.
    variants = (*alike, "deterministic")
    forwards = [
        one
        for one in FORWARDS
        if all(getattr(one, field) == getattr(kernel, field) for field in alike)
    ]
    tiles = [
        one
        for one in ATTENTION
        if one.op is kernel.op and all(getattr(one, x) == getattr(kernel, x) for x in variants)
    ]
    return [*forwards, *tiles]


def of_groups(kernel: Kernel) -> bool:
    return kernel.grouped or kernel.op is Op.BACKWARD_GROUPS


def rivals(kernel: Kernel) -> list[str]:
    """Returns the names of the kernels that may run a problem in this one's place: the kernel of
    groups runs short packed sequences, the others the rest of what is small."""
    if kernel.arch != 90 or kernel.op not in ONE_PASS:
        return []
    return [one.name for one in ATTENTION if one.op in ONE_PASS and one.op is not kernel.op]


def answers(driver: Path, request: dict, script: str = "attend.py") -> list[str | None]:
    imported = (ROOT, ROOT / "tests", ROOT / "tests" / "gpu", ROOT / "build" / "tests")
    script = ROOT / "tests" / "interpreter" / script
    return fake_device.printed(
        driver, script, imported=imported, asked=json.dumps(request), timeout=1200
    )


def check(
    driver: Path,
    problems: list[dict],
    launched: dict[str, str],
    *,
    sm_count: int = 3,
    **options,
) -> None:
    defaults = {
        "page_size": 0, "cache_rows": 0, "own": False, "backward": False, "deterministic": False,
        "beside": [0, 0],
    }  # fmt: skip
    common = {name: options.pop(name, default) for name, default in defaults.items()}
    # A problem may have pages of its own.
    calls = [
        common | {"problem": problem, "seed": SEED + number, "page_size": page_size}
        for number, given in enumerate(problems)
        for problem in [{name: value for name, value in given.items() if name != "page_size"}]
        for page_size in [given.get("page_size", common["page_size"])]
    ]
    request = {
        "tile": None,
        "decode": -1,
        "disable": [],
        "capability": 90,
        "programs": launched,
        "multiprocessors": sm_count,
    }
    for call, wrong in zip(
        calls, answers(driver, request | options | {"calls": calls}), strict=True
    ):
        assert wrong is None, f"{call}: {wrong}"


def drawn(kernel: Kernel) -> list[dict]:
    draw = random.Random(f"{SEED} {kernel.name}")
    return [problem(draw, kernel) for _ in range(CALLS)]


@each(FORWARDS)
def test_forward(driver, kernel):
    """A CTA has several tiles, or none."""
    check(
        driver,
        drawn(kernel),
        programs(kernel),
        tile=[kernel.block_m, kernel.block_n],
        capability=kernel.arch,
    )


@each(PAGED)
def test_forward_in_pages(driver, kernel):
    """Pages hold key blocks, boxes of 64 keys or of 16, in a random order among pages of NaN. The
    last one of a sequence ends in rows of NaN, and a table's row in entries that point nowhere."""
    draw = random.Random(f"{SEED} {kernel.name} pages")
    sizes = (16, 64, 48, 256, 32, 128)
    problems = [
        one | {"page_size": size}
        for one, size in zip(drawn(kernel), itertools.cycle(sizes), strict=False)
    ]
    tile, sm_count = [kernel.block_m, kernel.block_n], draw.choice((1, 3))
    options = {"tile": tile, "sm_count": sm_count, "capability": kernel.arch}
    check(driver, problems, programs(kernel), **options)


def decoded(driver: Path, problems: list[dict], kernel: Kernel, **options) -> None:
    """Checks problems on this decode kernel, whatever tile the planner would take. There are as
    many SMs as make it split the keys."""
    others = [one.name for one in DECODES if one != kernel]
    options |= {"disable": others, "capability": kernel.arch, "sm_count": 16}
    check(driver, problems, programs(kernel), **options)


@each(DECODES)
def test_decode(driver, kernel):
    decoded(driver, drawn(kernel), kernel, decode=1)


@each(DECODES)
def test_decode_of_one_query(driver, kernel):
    """The rows of a tile are the query heads that share keys, from one on to more than a tile
    holds."""
    draw = random.Random(f"{SEED} {kernel.name} one")
    fields = {"dtype": kernel.dtype, "head_dim_v": kernel.head_dim_v, "heads_kv": 1}
    problems = [
        fields
        | {
            "head_dim": kernel.head_dim - draw.choice((0, 8)),
            "heads": ratio,
            "seqlens_q": [1],
            "seqlens_k": [draw.randint(1, 5 * kernel.block_n)],
        }
        for ratio in (1, 4, 7, kernel.block_m, kernel.block_m + 1)
    ]
    decoded(driver, problems, kernel, decode=1)


@each(DECODES)
def test_decode_in_pages(driver, kernel):
    """There is one head of keys, or some, or as many as value's head dim has elements: an output of
    another shape was once taken."""
    draw = random.Random(f"{SEED} {kernel.name} pages")
    fields = {
        "dtype": kernel.dtype,
        "head_dim": kernel.head_dim,
        "head_dim_v": kernel.head_dim_v,
        "varlen": True,
    }
    cases = ((1, 1, [1]), (2, 2, [1, 3, 1]), (kernel.head_dim_v, 1, [1]))
    problems = [
        fields
        | {
            "heads": kv * ratio,
            "heads_kv": kv,
            "seqlens_q": queries,
            "seqlens_k": [draw.randint(1, 300) for _ in queries],
        }
        for kv, ratio, queries in cases
    ]
    sizes = (2 * kernel.block_n, 16, 48)
    problems = [one | {"page_size": size} for one in problems for size in sizes]
    decoded(driver, problems, kernel, decode=1)


@each(DECODES)
def test_decode_of_a_dense_cache(driver, kernel):
    """Every sequence uses as many rows as seqused_k says. The cache's heads lie outside its
    rows."""
    draw = random.Random(f"{SEED} {kernel.name} cache")
    problems = [
        {
            "dtype": kernel.dtype,
            "head_dim": kernel.head_dim,
            "head_dim_v": kernel.head_dim_v,
            "varlen": True,
            "heads": 2 * kv,
            "heads_kv": kv,
            "seqlens_q": [queries] * batch,
            "seqlens_k": [draw.randint(1, 300) for _ in range(batch)],
        }
        | mask
        for kv, queries, batch, mask in (
            (1, 1, 3, {}),
            (2, 3, 2, {"is_causal": True}),
            (1, 2, 2, {"is_causal": True}),
        )
    ]
    decoded(driver, problems, kernel, cache_rows=300)


@each([*BACKWARDS, *TWO_PASSES])
def test_backward(driver, kernel):
    """It runs with the forward and the launches before and after it, on the tiles that the planner
    takes; packed, among rows of NaN."""
    problems = drawn(kernel)[: CALLS // 2]
    if kernel.op in ONE_PASS:
        ratio = 2 if of_groups(kernel) else 1
        problems = [one | {"heads": one["heads_kv"] * ratio} for one in problems]
    launched = programs(*run_by(kernel))
    beside = [3, 50] if kernel.layout is Layout.VARLEN else [0, 0]
    options = {
        "deterministic": kernel.deterministic, "capability": kernel.arch, "beside": beside,
        "disable": rivals(kernel),
    }  # fmt: skip
    check(driver, problems, launched, backward=True, **options)


GROUPS = [
    kernel
    for kernel in BACKWARDS
    if kernel.op is Op.BACKWARD_GROUPS
    and kernel.layout is Layout.VARLEN
    and kernel.mask is Mask.CAUSAL
]


@pytest.mark.long
@each(GROUPS[:1])
def test_more_sequences_than_a_warp_has_lanes(driver, kernel):
    """The search for a CTA's sequence takes two steps, here and in the kernels before and after."""
    draw = random.Random(f"{SEED} {kernel.name} many")
    queries, keys = ([draw.choice((0, 1, 3, 70)) for _ in range(70)] for _ in range(2))
    problem = {
        "dtype": kernel.dtype, "head_dim": kernel.head_dim, "head_dim_v": kernel.head_dim_v,
        "heads": 2, "heads_kv": 1, "varlen": True, "seqlens_q": queries, "seqlens_k": keys,
        "is_causal": True,
    }  # fmt: skip
    options = {"beside": [3, 50], "disable": rivals(kernel)}
    check(driver, [problem], programs(*run_by(kernel)), backward=True, **options)


# Query tiles and key blocks of 64 and 128 rows: fewer keys than queries, which leaves rows without
# keys under a mask, and fewer queries; sequences that have none of one or the other; groups of
# heads; head dims below the bucket, in either. Those of a smaller bucket are smaller in proportion.
DENSE = (
    {"seqlens_q": [130], "seqlens_k": [190], "heads": 4, "head_dim": 256, "head_dim_v": 256},
    {"seqlens_q": [200] * 2, "seqlens_k": [70] * 2, "heads": 1, "head_dim": 200, "head_dim_v": 200},
    {"seqlens_q": [33] * 2, "seqlens_k": [150] * 2, "heads": 2, "head_dim": 136, "head_dim_v": 256},
)
PACKED = (
    {
        "seqlens_q": [70, 0, 129, 5], "seqlens_k": [64, 33, 90, 0],
        "heads": 4, "head_dim": 256, "head_dim_v": 256,
    },
    {"seqlens_q": [1, 200], "seqlens_k": [200, 1], "heads": 1, "head_dim": 200, "head_dim_v": 200},
    {
        "seqlens_q": [65, 127, 3], "seqlens_k": [65, 127, 3],
        "heads": 2, "head_dim": 256, "head_dim_v": 136,
    },
)  # fmt: skip
# Rows of a bias that begin at multiples of 16 bytes, as those above do not, and a broadcast one.
BIASED_ROWS = (
    {
        "seqlens_q": [140], "seqlens_k": [200], "heads": 2, "head_dim": 256, "head_dim_v": 256,
    },
    {
        "seqlens_q": [70] * 2, "seqlens_k": [136] * 2, "heads": 2, "head_dim": 256,
        "head_dim_v": 256,
    },
)  # fmt: skip
MASKS = {
    Mask.FULL: ({}, {}, {}),
    Mask.CAUSAL: ({"is_causal": True},) * 3,
    Mask.WINDOW: (
        {"window": [37, 21]},
        {"is_causal": True, "window": [30, -1]},
        {"window": [-1, 9]},
    ),
    Mask.BIAS: (
        {"bias": "documents"},
        {"bias": "filled_rows"},
        {"bias": "normal"},
        {"bias": "blocks"},
        {"bias": "normal", "bias_form": "batch_keys"},
    ),
}


@each(TWO_PASSES)
def test_backward_in_two_passes(driver, kernel):
    """Packed sequences lie among rows of NaN. A deterministic algorithm is asked for."""
    varlen = kernel.layout is Layout.VARLEN
    fields = {"dtype": kernel.dtype, "heads_kv": 1, "varlen": varlen}
    given = PACKED if varlen else DENSE
    if kernel.mask is Mask.BIAS:
        given += BIASED_ROWS
    shapes = [
        shape
        | {
            name: getattr(kernel, name) - (256 - shape[name]) * kernel.head_dim // 256 // 8 * 8
            for name in ("head_dim", "head_dim_v")
        }
        for shape in given
    ]
    problems = [
        fields | shape | mask for shape, mask in zip(shapes, MASKS[kernel.mask], strict=True)
    ]
    options = {"deterministic": True, "beside": [3, 50] if varlen else [0, 0]}
    check(driver, problems, programs(*run_by(kernel)), backward=True, **options)


DIVIDED = [kernel for kernel in TWO_PASSES if kernel.mask is not Mask.BIAS]


@each(DIVIDED)
def test_query_tiles_divided_among_ctas(driver, kernel):
    """There are so many SMs that a cluster has two and four CTAs. One gets no query tile of a short
    sequence."""
    varlen = kernel.layout is Layout.VARLEN
    fields = {
        "dtype": kernel.dtype, "head_dim": kernel.head_dim - 8, "head_dim_v": kernel.head_dim_v,
        "varlen": varlen,
    }  # fmt: skip
    masks = {
        Mask.FULL: {},
        Mask.CAUSAL: {"is_causal": True},
        Mask.WINDOW: {"window": [90, 50]},
    }
    shapes = (
        {"heads": 6, "heads_kv": 2, "seqlens_q": [190], "seqlens_k": [190]},
        {"heads": 5, "heads_kv": 1, "seqlens_q": [300, 1], "seqlens_k": [70, 3]},
    )
    for shape, sm_count in zip(shapes, (16, 132), strict=True):
        if not varlen:
            shape = shape | {x: shape[x][:1] for x in ("seqlens_q", "seqlens_k")}
        problem = fields | shape | masks[kernel.mask]
        launched = programs(*run_by(kernel))
        check(driver, [problem], launched, backward=True, sm_count=sm_count)


@each(BACKWARDS[:1])
def test_own_op(driver, kernel):
    problems = [one | {"heads": one["heads_kv"]} for one in drawn(kernel)[:2]]
    options = {"deterministic": kernel.deterministic, "capability": kernel.arch}
    check(driver, problems, programs(*run_by(kernel)), own=True, backward=True, **options)


TOP_LEFT = [
    kernel
    for kernel in (*BACKWARDS, *TWO_PASSES)
    if kernel.mask is Mask.CAUSAL and kernel.layout is Layout.DENSE
]


@each(TOP_LEFT)
def test_a_causal_mask_aligned_top_left(driver, kernel):
    """The cuDNN op's, with fewer queries than keys: the kernels get the keys that a query sees, and
    the gradients of the others are zeros."""
    fields = {
        "dtype": kernel.dtype, "head_dim": kernel.head_dim, "head_dim_v": kernel.head_dim_v,
        "heads": 2 if of_groups(kernel) else 1, "heads_kv": 1, "is_causal": True, "top_left": True,
    }  # fmt: skip
    # Most keys are unseen, or few.
    problems = [fields | {"seqlens_q": [q], "seqlens_k": [k]} for q, k in ((70, 203), (130, 150))]
    options = {
        "deterministic": kernel.deterministic, "capability": kernel.arch, "disable": rivals(kernel)
    }  # fmt: skip
    check(driver, problems, programs(*run_by(kernel)), backward=True, **options)


@each(list({kernel.op: kernel for kernel in reversed(BIASED)}.values()))
def test_lists_of_tiles(driver, kernel):
    """Those of a forward, and both of a backward, without attention: what is hidden in whole tiles
    is in no list, and all else is in one."""
    draw = random.Random(f"{SEED} {kernel.name} lists")
    maps = companions(kernel)
    fields = {"dtype": "bf16", "head_dim": 64, "heads": 2, "heads_kv": 1}
    problems = []
    for number in range(LISTS):
        queries, keys = (draw.choice((draw.randint(1, 520), 64 * draw.randint(1, 8))) for _ in "qk")
        drawn = {"bias": "blocks"} if number % 3 == 0 else bias(draw)
        problems.append(fields | {"seqlens_q": [queries] * 2, "seqlens_k": [keys] * 2} | drawn)
    calls = [{"problem": problem, "seed": SEED + number} for number, problem in enumerate(problems)]
    request = {
        "programs": programs(*(one for one in (maps.map_queries, maps.map_keys) if one)),
        "queries": [maps.map_queries.block_m, maps.map_queries.block_n],
        "keys": maps.map_keys and [maps.map_keys.block_m, maps.map_keys.block_n],
        "calls": calls,
    }
    for call, wrong in zip(calls, answers(driver, request, "lists.py"), strict=True):
        assert wrong is None, f"{call}: {wrong}"
