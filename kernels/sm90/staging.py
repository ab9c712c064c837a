"""What our own kernels share: shared memory that TMA fills, and the barriers that say when."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import pipeline
from cutlass.cute.nvgpu import cpasync
from cutlass.utils import LayoutEnum
from flash_attn.cute.pipeline import PipelineTmaAsync
from quack import sm90_utils

from kernels.common import packed


@dataclass(frozen=True)
class Load:
    """One of q, k and v on its way to shared memory."""

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


def tma_pipeline(dtype, barriers, layout: cute.ComposedLayout, stages: int, consumer_warps: int):
    def group(count):
        return pipeline.CooperativeGroup(pipeline.Agent.Thread, count)

    size = cute.size_in_bytes(dtype, cute.select(layout, mode=[0, 1]))
    return PipelineTmaAsync.create(
        barrier_storage=barriers.data_ptr(), num_stages=stages, producer_group=group(1),
        consumer_group=group(consumer_warps),
        tx_count=size, defer_sync=True,
    )  # fmt: skip


def tma(op, tensor: cute.Tensor, layout: cute.ComposedLayout, rows: int, columns: int):
    """A TMA atom that copies [rows, columns], one stage of the layout, and the tensor in TMA
    coordinates."""
    return cpasync.make_tiled_tma_atom(
        op, tensor, cute.select(layout, mode=[0, 1]), (rows, columns), 1
    )


def rows_of(tensor: cute.Tensor, head, batch, rows, end, varlen: bool) -> cute.Tensor:
    """The rows of one head and sequence, [seqlen, head_dim]. Those of packed sequences are the last
    ones before `end`."""
    if varlen:
        return packed.rows_of(tensor, 0, end, rows)[None, None, head]
    return tensor[None, None, head, batch]
