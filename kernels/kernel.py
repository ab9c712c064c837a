"""What a compiled kernel is: the attributes that tell one from another, and its name.

Entries under kernels/ read a `Kernel` and nothing else of the tables, so that the cache recompiles
what a changed row describes and leaves the rest alone.
"""

from dataclasses import dataclass
from enum import Enum


class Op(str, Enum):
    FORWARD = "forward"
    DECODE = "decode"  # a forward of few queries
    BACKWARD = "backward"
    BACKWARD_GROUPS = "backward_groups"  # the same where a CTA works on all query heads of its keys
    # a backward in two passes: dQ and delta, by query tiles; then dK and dV, by key blocks
    BACKWARD_QUERIES = "backward_queries"
    BACKWARD_KEYS = "backward_keys"
    # before a kernel with a bias: which tiles the bias leaves to it, in lists for each query tile;
    # then the same for each key block
    MAP_QUERIES = "map_queries"
    MAP_KEYS = "map_keys"
    # before a backward: delta = rowsum(dO * O), lse in base 2, and the dQ accumulator cleared
    PREPROCESS = "preprocess"
    POSTPROCESS = "postprocess"  # after a backward: an fp32 accumulator becomes dQ, dK or dV
    # after PyTorch's own backward, where a speed rule chooses it: the gradients it leaves unwritten
    CLEAR = "clear"


ONE_PASS = (Op.BACKWARD, Op.BACKWARD_GROUPS)
TWO_PASS = (Op.BACKWARD_QUERIES, Op.BACKWARD_KEYS)
MAPS = (Op.MAP_QUERIES, Op.MAP_KEYS)


class Mask(str, Enum):
    FULL = "full"
    CAUSAL = "causal"  # bottom-right aligned
    WINDOW = "window"  # both bounds at run time, bottom-right aligned
    BIAS = "bias"  # a tensor that is added to the scores; what it hides is left out


class Layout(str, Enum):
    DENSE = "dense"  # [batch, seqlen, heads, head_dim]
    VARLEN = "varlen"  # [total, heads, head_dim] with cu_seqlens
    # queries as in VARLEN, keys and values in [pages, page_size, heads, head_dim], a block table
    PAGED = "paged"
    ANY = "any"  # either, or keys and values in pages: known at run time


ARCHS = (90, 100)  # 100 stands for the family: compute capability 10.0 and 10.3
DTYPES = ("bf16", "fp16")
# An architecture's buckets of (head_dim, head_dim_v). A bucket serves every multiple of 8 up to it,
# in either.
HEAD_DIM_BUCKETS = {
    90: ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    100: ((64, 64), (128, 128), (192, 128), (256, 256)),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled object. Fields that do not concern an op keep their defaults."""

    op: Op
    arch: int
    dtype: str
    head_dim: int  # bucket of the query's and the key's; Op.POSTPROCESS: of the gradient's
    head_dim_v: int  # bucket of the value's and the output's; Op.POSTPROCESS: same as head_dim
    layout: Layout
    block_m: int  # rows of a query tile; Op.POSTPROCESS: rows of the accumulator's tile
    block_n: int = 0  # keys of a key block
    mask: Mask = Mask.FULL
    grouped: bool = False  # Op.BACKWARD: of GQA or MQA, which adds up dK and dV in accumulators
    deterministic: bool = False
    two_cta: bool = False  # SM100: a pair of CTAs shares an MMA
    cluster: int = 1  # Op.POSTPROCESS, varlen: tiles that a sequence's accumulator is padded to
    threads: int = 0  # Op.POSTPROCESS
    # SM90 backward: warpgroups along the rows of dQ's tile; Op.POSTPROCESS: of the accumulator's
    atom_layout_m: int = 1
    swap_ab: bool = False  # the same tile's product is computed transposed
    atom_layout_dkv: int = 2  # SM90 backward: warpgroups along the rows of dK's and dV's tiles
    swap_ab_dkv: bool = False
    swap_ab_sdp: bool = False  # SM90 backward: S and dP are computed transposed
    dq_warpgroups: int = 2  # SM90 backward: how many compute dQ
    # Op.DECODE, SM90 forward, Op.BACKWARD_QUERIES: key blocks (and value blocks) in shared memory;
    # Op.BACKWARD_KEYS with a bias: tiles of it
    stages: int = 0
    v_stages: int = 0  # Op.BACKWARD_QUERIES: value blocks in shared memory
    ctas_per_sm: int = 0  # Op.DECODE: CTAs that an SM holds
    q_stages: int = 0  # SM90 forward and backward (not by queries): query tiles in shared memory
    do_stages: int = 0  # SM90 backward (not by queries): tiles of dO in shared memory
    pds_stages: int = 0  # SM90 backward: tiles of P and of dS in shared memory
    # SM90 forward, Op.BACKWARD_QUERIES: the warpgroups take turns to issue products
    pingpong: bool = True
    # SM90 kernels of our own, but for Op.DECODE: of a thread that computes
    consumer_registers: int = 0
    producer_registers: int = 0  # the same: of a thread that loads or schedules
    tuned: bool = False  # a candidate: runs only where a tile rule says so

    @property
    def packed(self) -> bool:
        """Whether the queries of all sequences are rows of one tensor."""
        return self.layout in (Layout.VARLEN, Layout.PAGED)

    @property
    def persistent(self) -> bool:
        """Whether it is launched as at most one CTA an SM, each of which works on one tile after
        the other. (SM100's forward sizes its grid itself.)"""
        return self.op is Op.FORWARD and self.arch == 90

    @property
    def module(self) -> str:
        """The path of its entry below kernels/, without a suffix."""
        shared = self.op in (Op.PREPROCESS, Op.POSTPROCESS, Op.CLEAR)
        return f"{'common' if shared else f'sm{self.arch}'}/{self.op.value}"

    @property
    def name(self) -> str:
        if self.op is Op.CLEAR:
            return f"sm{self.arch}_clear_{self.dtype}_{self.layout.value}"
        if self.op in MAPS:
            tile = f"m{self.block_m}n{self.block_n}"
            return f"sm{self.arch}_{self.op.value}_{self.dtype}_{tile}"
        head_dims = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            head_dims += f"v{self.head_dim_v}"
        parts = [f"sm{self.arch}", self.op.value, self.dtype, head_dims, self.layout.value]
        if self.op in (Op.FORWARD, *ONE_PASS, *TWO_PASS):
            parts.append(self.mask.value)
        if self.op is Op.BACKWARD:
            parts.append("gqa" if self.grouped else "mha")
        if self.deterministic:
            parts.append("deterministic")
        parts.append(f"m{self.block_m}" + (f"n{self.block_n}" if self.block_n else ""))
        if self.op is Op.POSTPROCESS:
            swapped = "s" if self.swap_ab else ""
            parts.append(f"t{self.threads}a{self.atom_layout_m}c{self.cluster}{swapped}")
        if self.two_cta:
            parts.append("2cta")
        return "_".join(parts)
