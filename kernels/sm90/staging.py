"""Shared memory that TMA fills, and the barriers that say when: what the kernels of our own have in common."""

import cutlass.cute as cute
from cutlass import pipeline
from cutlass.utils import LayoutEnum
from flash_attn.cute.pipeline import PipelineTmaAsync
from quack import sm90_utils


def smem_layout(dtype, rows: int, columns: int, stages: int | None):
    return sm90_utils.make_smem_layout(dtype, LayoutEnum.ROW_MAJOR, (rows, columns), stages)


def elements(dtype, layout: cute.ComposedLayout):
    """Of a layout, aligned as its swizzle wants it: a field of a cute.struct."""
    return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]


def tma_pipeline(dtype, barriers, layout: cute.ComposedLayout, stages: int, consumer_warps: int, copies: int = 1):
    """`copies`: stages of the layout that are loaded together, as one of the pipeline's."""

    def group(count):
        return pipeline.CooperativeGroup(pipeline.Agent.Thread, count)

    size = copies * cute.size_in_bytes(dtype, cute.select(layout, mode=[0, 1]))
    return PipelineTmaAsync.create(
        barrier_storage=barriers.data_ptr(), num_stages=stages, producer_group=group(1), consumer_group=group(consumer_warps),
        tx_count=size, defer_sync=True,
    )  # fmt: skip
