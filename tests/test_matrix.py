"""The matrix declares every kernel that the planner may choose, each once."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from kernels import shared_memory
from kernels.kernel import ARCHS, DTYPES, HEAD_DIM_BUCKETS, ONE_PASS, TWO_PASS, Layout, Mask, Op
from kernels.matrix import SUBSETS, companions, matrix, subset, with_candidates

KERNELS = matrix()
README = Path(__file__).parent.parent / "README.md"


def test_names_are_unique_identifiers():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


def test_order_is_stable():
    assert matrix() == KERNELS


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dims", "layout", "mask"),
    [
        (arch, *row)
        for arch in ARCHS
        for row in product(DTYPES, HEAD_DIM_BUCKETS[arch], (Layout.DENSE, Layout.VARLEN), Mask)
    ],
)
def test_every_combination_is_there(arch, dtype, head_dims, layout, mask):
    wanted = (arch, dtype, *head_dims, layout, mask)
    rows = [
        k
        for k in KERNELS
        if (k.arch, k.dtype, k.head_dim, k.head_dim_v, k.layout, k.mask) == wanted
    ]
    if mask is Mask.BIAS and (arch, layout) != (90, Layout.DENSE):
        assert not rows
        return
    assert any(kernel.op is Op.FORWARD for kernel in rows)
    if mask is Mask.BIAS or (arch == 90 and head_dims == (256, 256)):
        passes = [kernel for kernel in rows if kernel.op in TWO_PASS]
        assert sorted(kernel.op for kernel in passes) == sorted(TWO_PASS)
        return
    backwards = {
        (kernel.grouped, kernel.deterministic) for kernel in rows if kernel.op is Op.BACKWARD
    }
    assert backwards == set(product((False, True), repeat=2))


@pytest.mark.parametrize("name", SUBSETS)
def test_a_subset_holds_what_its_backwards_launch(name):
    chosen = set(subset(name))
    for kernel in chosen:
        assert set(companions(kernel).present) <= chosen, kernel.name


def test_a_backward_launches_what_turns_its_accumulators_into_gradients():
    def gradients(kernel):
        return [bool(postprocess) for postprocess in companions(kernel)[1:4]]

    for kernel in KERNELS:
        if kernel.op in ONE_PASS:
            assert companions(kernel).preprocess.op is Op.PREPROCESS, kernel.name
            assert gradients(kernel) == [True, kernel.grouped, kernel.grouped], kernel.name
        elif kernel.op is Op.BACKWARD_KEYS:
            assert companions(kernel).preprocess.op is Op.BACKWARD_QUERIES, kernel.name
            assert not any(gradients(kernel)), kernel.name
        else:
            assert not any((companions(kernel).preprocess, *gradients(kernel))), kernel.name


def test_a_kernel_with_a_bias_launches_the_maps_of_its_tiles():
    for kernel in KERNELS:
        launched = companions(kernel)
        if kernel.mask is not Mask.BIAS or kernel.op is Op.BACKWARD_QUERIES:
            assert not launched.map_queries and not launched.map_keys, kernel.name
            continue
        by_queries = launched.preprocess or kernel
        assert launched.map_queries.op is Op.MAP_QUERIES, kernel.name
        assert tile(launched.map_queries) == tile(by_queries), kernel.name
        if kernel.op is Op.FORWARD:
            assert not launched.map_keys, kernel.name
        else:
            assert launched.map_keys.op is Op.MAP_KEYS, kernel.name
            assert tile(launched.map_keys) == tile(kernel), kernel.name


def tile(kernel):
    return kernel.block_m, kernel.block_n


def test_core_is_a_part_of_full():
    assert set(subset("core")) < set(subset("full")) == set(KERNELS)


def test_unknown_subset_is_named_with_the_known():
    with pytest.raises(
        ValueError, match="kernel subset 'half' is unknown; allowed: full, core, tuning"
    ):
        subset("half")


def test_readme_s_support_table_says_what_the_matrix_holds():
    table = r"^\| (dtype|head dim|mask|layout|deterministic backward) \| ([^|]+?) \| ([^|]+?) \|"
    cells = {
        name: by_arch for name, *by_arch in re.findall(table, README.read_text(), re.MULTILINE)
    }
    rows = {name: by_arch[0] for name, by_arch in cells.items()}
    assert rows["dtype"] == ", ".join(DTYPES)
    largest = [max(HEAD_DIM_BUCKETS[arch]) for arch in ARCHS]
    assert all(head_dim == head_dim_v for head_dim, head_dim_v in largest)
    assert cells["head dim"] == [f"every multiple of 8 up to {head_dim}" for head_dim, _ in largest]
    assert [mask.value in rows["mask"] for mask in Mask] == [True] * len(Mask)
    assert [layout.value in rows["layout"] for layout in (Layout.DENSE, Layout.VARLEN)] == [
        True,
        True,
    ]
    assert (rows["deterministic backward"] == "yes") == any(
        kernel.deterministic for kernel in matrix()
    )


def test_shared_memory_holds_every_config():
    for kernel in with_candidates():
        shared_memory.check_config(kernel)


def own(op, **changes):
    kernel = next(kernel for kernel in KERNELS if kernel.arch == 90 and kernel.op is op)
    return replace(kernel, **changes)


def test_a_config_of_more_shared_memory_than_a_cta_has_is_refused():
    kernel = own(Op.FORWARD, stages=20)
    with pytest.raises(ValueError, match=f"{kernel.name} needs .*; a CTA has 232448"):
        shared_memory.check_config(kernel)


def test_more_ctas_than_an_sm_holds_are_refused():
    kernel = own(Op.DECODE, ctas_per_sm=3)
    with pytest.raises(ValueError, match=f"3 CTAs of kernel {kernel.name} need .*; an SM has"):
        shared_memory.check_config(kernel)


@pytest.mark.parametrize("op", (Op.FORWARD, Op.DECODE, *TWO_PASS))
def test_other_shared_memory_than_computed_is_refused(op):
    kernel = own(op)
    size = shared_memory.computed(kernel)
    shared_memory.check(kernel, size)
    with pytest.raises(ValueError, match=f"shared_memory.py computes {size}"):
        shared_memory.check(kernel, size - 1024)


def test_upstream_s_kernels_have_the_limit_alone():
    kernel = next(k for k in KERNELS if k.op is Op.BACKWARD and k.arch == 100)
    assert shared_memory.computed(kernel) is None
    shared_memory.check(kernel, shared_memory.BYTES_PER_CTA)
    with pytest.raises(ValueError, match="a CTA has 232448"):
        shared_memory.check(kernel, shared_memory.BYTES_PER_CTA + 1)
