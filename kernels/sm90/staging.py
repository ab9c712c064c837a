"""What our own kernels share: shared memory that is filled, and the barriers that say when."""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, pipeline
from cutlass.cute.nvgpu import cpasync
from cutlass.utils import LayoutEnum
from flash_attn.cute.pipeline import PipelineAsync, PipelineStateSimple, PipelineTmaAsync
from quack import copy_utils, layout_utils, sm90_utils

from kernels.common import packed
from kernels.sm90.warpgroups import WARP, WARPGROUP

VECTOR = 8  # elements of 2 bytes in 16 bytes


@dataclass(frozen=True)
class Load:
    """A tensor on its way to shared memory: q, k, v or dO."""

    atom: cute.CopyAtom
    source: cute.Tensor  # [seqlen, head_dim, heads, batch or pages], as TMA takes coordinates
    stages: cute.Tensor
    pipeline: PipelineTmaAsync


def smem_layout(dtype, rows: int, columns: int, stages: int | None):
    return sm90_utils.make_smem_layout(dtype, LayoutEnum.ROW_MAJOR, (rows, columns), stages)


def elements(dtype, layout: cute.ComposedLayout | None):
    """A field of a cute.struct: the elements of a layout, aligned as its swizzle wants it. There
    are none where there is no layout."""
    if layout is None:
        return cute.struct.MemRange[dtype, 0]
    return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]


def _group(count: int) -> pipeline.CooperativeGroup:
    return pipeline.CooperativeGroup(pipeline.Agent.Thread, count)


def tma_pipeline(dtype, barriers, layout: cute.ComposedLayout, stages: int, consumer_warps: int):
    size = cute.size_in_bytes(dtype, cute.select(layout, mode=[0, 1]))
    return PipelineTmaAsync.create(
        barrier_storage=barriers.data_ptr(), num_stages=stages, producer_group=_group(1),
        consumer_group=_group(consumer_warps),
        tx_count=size, defer_sync=True,
    )  # fmt: skip


def warp_pipeline(barriers, stages: int, producer_warps: int, consumer_warps: int) -> PipelineAsync:
    """Stages that warps fill by stores. A lane arrives for each warp."""
    return PipelineAsync.create(
        barrier_storage=barriers.data_ptr(), num_stages=stages,
        producer_group=_group(producer_warps), consumer_group=_group(consumer_warps),
        elect_one_commit=True, elect_one_release=True, defer_sync=True,
    )  # fmt: skip


def copy_pipeline(barriers, stages: int, producer_warps: int, consumer_warps: int) -> PipelineAsync:
    """Stages that warps fill by cp.async. Every lane arrives once its copies are done, and to
    release a stage a lane for each warp."""
    return PipelineAsync.create(
        barrier_storage=barriers.data_ptr(), num_stages=stages,
        producer_group=_group(producer_warps * WARP), consumer_group=_group(consumer_warps),
        elect_one_release=True, defer_sync=True,
    )  # fmt: skip


def producer_state(stages: int, number) -> PipelineStateSimple:
    """Where the producer of a ring is that fills a stage for the time of this number. At first a
    stage is empty, so the producer is a round ahead of a consumer."""
    return PipelineStateSimple(stages, number + stages)


def by_head(tensor: cute.Tensor) -> cute.Tensor:
    """[seqlen, head_dim, heads, batch] or [total, head_dim, heads]"""
    return layout_utils.select(tensor, [1, 3, 2, 0] if cute.rank(tensor) == 4 else [0, 2, 1])


def tma(op, tensor: cute.Tensor, layout: cute.ComposedLayout, rows: int, columns: int):
    """A TMA atom that copies [rows, columns], one stage of the layout, and the tensor in TMA
    coordinates."""
    return cpasync.make_tiled_tma_atom(
        op, tensor, cute.select(layout, mode=[0, 1]), (rows, columns), 1
    )


def rows_of(tensor: cute.Tensor, head, batch, rows, end, varlen: bool) -> cute.Tensor:
    """The rows of one head and sequence, [seqlen, head_dim], as TMA takes them. Those of packed
    sequences are the last ones before `end`."""
    if varlen:
        return packed.rows_of(tensor, 0, end, rows)[None, None, head]
    return tensor[None, None, head, batch]


def plain_rows(tensor: cute.Tensor, head, batch, first, varlen: bool) -> cute.Tensor:
    """The same of a tensor that is not TMA's, [seqlen, head_dim, heads, batch] or [total, head_dim,
    heads]. Those of packed sequences begin at `first`."""
    if varlen:
        return cute.domain_offset((first, 0), tensor[None, None, head])
    return tensor[None, None, head, batch]


def row_numbers(tensor: cute.Tensor, head, batch, first, varlen: bool) -> cute.Tensor:
    """The same of numbers, one a row, of a tensor [batch, heads, seqlen] or [heads, total]."""
    if varlen:
        return cute.domain_offset((first,), tensor[head, None])
    return tensor[batch, head, None]


def load_rows(load: Load, source: cute.Tensor, row, state):
    """Loads as many rows of `source` as a stage holds, from `row` on."""
    load.pipeline.producer_acquire(state)
    stage = load.stages[None, None, state.index]
    barrier = load.pipeline.producer_get_barrier(state)
    source = cute.local_tile(
        cute.domain_offset((row, 0), source), cute.product_each(stage.shape), (0, 0)
    )
    copy, _, _ = copy_utils.tma_get_copy_fn(
        load.atom, 0, cute.make_layout(1), source, stage, single_stage=True
    )
    copy(tma_bar_ptr=barrier)
    load.pipeline.producer_commit(state)


def vector_copy(dtype, rows: int, columns: int) -> cute.TiledCopy:
    """A copy of [rows, columns] in vectors, by as many threads of a warpgroup as have one."""
    a_row = math.gcd(columns // VECTOR, VECTOR)
    return copy_utils.tiled_copy_2d(dtype, a_row, min(WARPGROUP, rows * a_row), VECTOR)


@cute.jit
def clear_rows(stage: cute.Tensor, shape: cutlass.Constexpr, first: Int32, thread: Int32):
    """Clears the rows of a stage, [rows, columns], from `first` on, with all threads of a
    warpgroup. They are no values of the sequence, so that they may hold anything, and 0 * NaN is
    NaN."""
    copy = vector_copy(stage.element_type, *shape).get_slice(thread)
    to_shared = copy.partition_D(stage)
    where = copy.partition_S(cute.make_identity_tensor(shape))
    zeros = cute.make_rmem_tensor_like(to_shared[None, 0, None])
    zeros.fill(0.0)
    for i in cutlass.range_constexpr(cute.size(to_shared, mode=[1])):
        if where[0, i, 0][0] >= first:
            cute.copy(copy, zeros, to_shared[None, i, None])
