"""Computes the shared memory that a kernel of our own takes from its tile and stages.

The build checks it against an SM's limit before anything is compiled, and against what was
compiled.
"""

from kernels.configs_sm90 import WARPGROUP_ROWS
from kernels.kernel import Kernel, Layout, Op
from kernels.sm90.tiles import RING

BYTES_PER_CTA = 227 * 1024  # SM90 and SM100: the most that a CTA can ask for
BYTES_PER_SM = 228 * 1024
RESERVED_BYTES = 1024  # a CTA: the system's own
ELEMENT = 2  # bytes: bf16 and fp16
BARRIERS = 2 * 8  # bytes a stage: one barrier says that it is full, the other that it is empty
ALIGNMENT = 1024  # of a swizzled tile, and so of the whole
WEIGHTS_STAGES = 2  # Op.DECODE: tiles of P
# int32 of a tile in the ring of kernels/sm90/schedule.py
RING_WORDS = {Layout.DENSE: 8, Layout.VARLEN: 12, Layout.PAGED: 12}
TILE_WORDS = 12  # the same of the one tile in kernels/sm90/backward_queries.py
STATISTICS = 80  # fp32 of a query tile and padding (backward_statistics.py)
DS_STAGES = 2  # tiles of dS in kernels/sm90/backward_groups.py


def computed(kernel: Kernel) -> int | None:
    """The bytes of a CTA. None means that the kernel is upstream's, whose classes lay out their
    own."""
    if kernel.op is Op.DECODE:
        queries = kernel.block_m * kernel.head_dim * ELEMENT
        weights = WEIGHTS_STAGES * kernel.block_m * kernel.block_n * ELEMENT
        # For each row, four warps' numbers in fp32, and the first and last of its keys in int32.
        numbers = kernel.block_m * (4 + 2) * 4
        return _aligned(queries + weights + numbers + _keys_and_values(kernel))
    if kernel.op is Op.FORWARD and kernel.arch == 90:
        warpgroups = kernel.block_m // WARPGROUP_ROWS
        queries = kernel.q_stages * kernel.block_m * kernel.head_dim * ELEMENT
        # Where the next tile's queries come early, O has a place of its own to leave from.
        output = kernel.block_m * kernel.head_dim_v * ELEMENT if kernel.q_stages > 1 else 0
        barriers = (kernel.q_stages * warpgroups + RING) * BARRIERS
        ring = RING * RING_WORDS[kernel.layout] * 4
        return _aligned(queries + output + barriers + ring + _keys_and_values(kernel))
    if kernel.op is Op.BACKWARD_QUERIES:
        warpgroups = kernel.block_m // WARPGROUP_ROWS
        queries = warpgroups * (
            _stage(WARPGROUP_ROWS, kernel.head_dim) + _stage(WARPGROUP_ROWS, kernel.head_dim_v)
        )
        keys = kernel.stages * _stage(kernel.block_n, kernel.head_dim)
        values = kernel.v_stages * _stage(kernel.block_n, kernel.head_dim_v)
        return _aligned(queries + keys + values + TILE_WORDS * 4)
    if kernel.op is Op.BACKWARD_GROUPS:
        keys = 2 * _stage(kernel.block_n, kernel.head_dim)  # and values
        queries = 2 * _stage(kernel.block_m, kernel.head_dim)  # and dO
        statistics = 2 * STATISTICS * 4 + BARRIERS  # logsumexp and delta
        scores = DS_STAGES * (kernel.block_m * kernel.block_n * ELEMENT + BARRIERS)
        return _aligned(keys + kernel.q_stages * (queries + statistics) + scores)
    if kernel.op is Op.BACKWARD_KEYS:
        keys = _stage(kernel.block_n, kernel.head_dim) + _stage(kernel.block_n, kernel.head_dim_v)
        queries = _stage(kernel.block_m, kernel.head_dim) + _stage(
            kernel.block_m, kernel.head_dim_v
        )
        probabilities = kernel.block_m * kernel.block_n * ELEMENT + BARRIERS
        statistics = 2 * STATISTICS * 4 + BARRIERS  # logsumexp and delta
        bias = kernel.stages * (kernel.block_m * kernel.block_n * ELEMENT + BARRIERS)
        return _aligned(keys + kernel.q_stages * (queries + probabilities + statistics) + bias)
    return None


def _stage(rows: int, head_dim: int) -> int:
    return rows * head_dim * ELEMENT + BARRIERS


def _keys_and_values(kernel: Kernel) -> int:
    stage = kernel.block_n * (kernel.head_dim + kernel.head_dim_v) * ELEMENT
    return kernel.stages * (stage + 2 * BARRIERS)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def check_config(kernel: Kernel) -> None:
    """Fails where a kernel's config asks for more than an SM has, before it is compiled."""
    size = computed(kernel) or 0
    if size > BYTES_PER_CTA:
        raise ValueError(
            f"kernel {kernel.name} needs {size} bytes of shared memory; a CTA has {BYTES_PER_CTA}"
        )
    if kernel.ctas_per_sm * (size + RESERVED_BYTES) > BYTES_PER_SM:
        raise ValueError(
            f"{kernel.ctas_per_sm} CTAs of kernel {kernel.name} need {size} bytes of shared memory "
            f"each; an SM has {BYTES_PER_SM}"
        )


def check(kernel: Kernel, compiled: int) -> None:
    """Fails where a compiled kernel takes more than a CTA has, or something else than computed."""
    if compiled > BYTES_PER_CTA:
        raise ValueError(
            f"kernel {kernel.name} takes {compiled} bytes of shared memory; a CTA has "
            f"{BYTES_PER_CTA}"
        )
    size = computed(kernel)
    if size is not None and size != compiled:
        raise ValueError(
            f"kernel {kernel.name} takes {compiled} bytes of shared memory; "
            f"kernels/shared_memory.py computes {size}"
        )
