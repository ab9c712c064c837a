"""The statistics of queries, logsumexp and delta, in a backward whose warpgroups have keys for rows
and queries for columns. One warp brings those of a query tile to shared memory, where each thread
reads those of its columns."""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute.pipeline import PipelineAsync

from kernels.sm90.warpgroups import PAIR, ROW_LANES, ROWS, WARP

LSE, DELTA = 0, 1
# A thread reads the statistics of two of every eight queries. Those of one lane of a row are stored
# together, and padding puts the four lanes into different banks.
LANE_STATISTICS = ROWS // ROW_LANES
LANE_STRIDE = LANE_STATISTICS + 4


@dataclass(frozen=True)
class Statistics:
    """Each query's logsumexp and delta, as the pointwise parts take them."""

    lse: cute.Tensor  # [batch, heads, seqlen], varlen [heads, total]
    delta: cute.Tensor
    stages: cute.Tensor  # [queries, 2, stages]
    pipeline: PipelineAsync


def layout(stages: int) -> cute.Layout:
    """Returns the layout of Statistics.stages."""
    tile = ROW_LANES * LANE_STRIDE
    return cute.make_layout(
        ((PAIR, ROW_LANES, LANE_STATISTICS // PAIR), 2, stages),
        stride=((1, LANE_STRIDE, PAIR), tile, 2 * tile),
    )


@cute.jit
def bring(
    statistics: Statistics,
    lse: cute.Tensor,
    delta: cute.Tensor,
    row: Int32,
    rows: Int32,
    lane: Int32,
    state,
    missing: cutlass.Constexpr[float],
    taken: cutlass.Constexpr[Callable | None] = None,
):
    """Brings the statistics of a query tile, which begins at `row`. `lse` and `delta` are those of
    a head and sequence, which has `rows` queries. One that is none has a logsumexp of `missing`.
    `taken` makes of both what the pointwise parts take. One warp does it, and has looked up each
    thread's `lane` before its loop over query tiles."""
    stages = statistics.stages
    found = cute.make_rmem_tensor((ROWS // WARP, 2), Float32)
    for i in cutlass.range_constexpr(ROWS // WARP):
        query = row + lane + i * WARP
        found[i, LSE], found[i, DELTA] = Float32(missing), Float32(0.0)
        if query < rows:
            found[i, LSE], found[i, DELTA] = lse[query], delta[query]
    statistics.pipeline.producer_acquire(state)
    for i in cutlass.range_constexpr(ROWS // WARP):
        values = found[i, LSE], found[i, DELTA]
        if const_expr(taken is not None):
            values = taken(*values)
        query = lane + i * WARP
        for which in (LSE, DELTA):
            stages[query, which, state.index] = values[which]
    statistics.pipeline.producer_commit(state)


def read(statistics: Statistics, which: int, thread: Int32, state, found: cute.Tensor):
    """Reads a statistic of the queries of a thread's columns."""
    stage = statistics.stages[(None, thread % ROW_LANES, None), which, state.index]
    flat = cute.make_layout(LANE_STATISTICS)
    cute.autovec_copy(
        cute.make_tensor(stage.iterator, flat), cute.make_tensor(found.iterator, flat)
    )
