"""The workspace has as many columns for an accumulator as the kernels that fill and read it: the
bucket's head dims. flash-attn-4's classes pad theirs to a multiple that depends on the tile."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from kernels.kernel import Kernel, Op
from kernels.matrix import with_candidates

# The columns of each op's tiles, of query and value, as upstream's classes name them.
COLUMNS = {
    Op.PREPROCESS: ("head_dim_padded", "head_dim_v_padded"),
    Op.BACKWARD: ("tile_hdim", "tile_hdimv"),
    Op.POSTPROCESS: ("tile_hdim",),
}
# These do not change the shape of a tile.
ALIKE = dict(dtype="bf16", deterministic=False, tuned=False)


def distinct(op: Op) -> list[Kernel]:
    kernels = [kernel for kernel in with_candidates() if kernel.op is op]
    return list(dict.fromkeys(replace(kernel, **ALIKE) for kernel in kernels))


def columns(kernel: Kernel) -> tuple[int, ...]:
    module = importlib.import_module(f"kernels.{kernel.module.replace('/', '.')}")
    compiled = module.instantiate(kernel)
    return tuple(getattr(compiled, name) for name in COLUMNS[kernel.op])


@pytest.mark.parametrize("op", COLUMNS)
def test_kernels_have_as_many_columns_as_the_workspace(op):
    for kernel in distinct(op):
        bucket = (kernel.head_dim, kernel.head_dim_v)[: len(COLUMNS[op])]
        assert columns(kernel) == bucket, kernel.name


def test_a_bucket_that_a_transposed_tile_pads_is_found():
    transposed = next(k for k in distinct(Op.BACKWARD) if k.swap_ab_dkv)
    assert columns(replace(transposed, head_dim=160, head_dim_v=96)) == (192, 128)
