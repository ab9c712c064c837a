"""Blackwell's tiles: the pinned flash-attn-4's own choices (tile_size functions of its
interface.py); a test holds the two side by side. Stages and registers are up to its kernel classes.
"""

from collections.abc import Iterator

from kernels import configs_sm90
from kernels.kernel import Kernel, Layout, Mask, Op

HeadDims = tuple[int, int]

# Query rows and keys. Two 128-row query tiles are in flight. D 256 leaves tensor memory for one.
FORWARD: dict[HeadDims, tuple[int, int]] = {
    (64, 64): (256, 128),
    (128, 128): (256, 128),
    (192, 128): (256, 128),
    (256, 256): (128, 128),
}
# This tile is for up to 128 queries: of two query tiles the second would be empty.
SHORT_FORWARD = (128, 128)
# D 256: tensor memory holds the accumulators of 64 keys a CTA. Upstream has two more kernels for
# it, which it takes by default and which one object can't launch; this is the one behind its
# FLASH_ATTENTION_HD256_GENERIC_BWD.
BACKWARD: dict[HeadDims, tuple[int, int]] = {
    (64, 64): (128, 128),
    (128, 128): (128, 128),
    (192, 128): (128, 128),
    (256, 256): (128, 64),
}


# Hopper's, but for rows: operands of a warp's products pass through registers, and with 64 rows
# there were spills at D 128 and 256. The numbers were measured on Hopper alone.
DECODE = {
    head_dims: tuple(row | {"block_m": min(row["block_m"], 32)} for row in rows)
    for head_dims, rows in configs_sm90.DECODE.items()
}


def forward_two_cta(head_dims: HeadDims, layout: Layout, mask: Mask) -> bool:
    """A pair of CTAs needs full tiles of value's D 128 and no mask (upstream's use_2cta_instrs). At
    D 256 longer queries always go to a pair, which halves what each CTA loads of K and V."""
    unmasked = layout is Layout.DENSE and mask is Mask.FULL and head_dims[1] == 128
    return unmasked or head_dims == (256, 256)


def backward_two_cta(head_dims: HeadDims) -> bool:
    return head_dims[0] >= 128


def forward(dtype: str, head_dims: HeadDims, layout: Layout, mask: Mask) -> Iterator[Kernel]:
    pair = forward_two_cta(head_dims, layout, mask)
    for tile, two_cta in ((FORWARD[head_dims], pair), (SHORT_FORWARD, False)):
        yield Kernel(Op.FORWARD, 100, dtype, *head_dims, layout, *tile, mask, two_cta=two_cta)


def paged_forward(dtype: str, head_dims: HeadDims) -> Iterator[Kernel]:
    """The forwards of keys and values in pages, one for each mask. They have the large tile alone,
    because few queries run the decode kernel. Each CTA loads whole key blocks: of a pair, each
    would load half of one."""
    for mask in (Mask.FULL, Mask.CAUSAL, Mask.WINDOW):
        yield Kernel(Op.FORWARD, 100, dtype, *head_dims, Layout.PAGED, *FORWARD[head_dims], mask)


def decode(dtype: str, head_dims: HeadDims) -> Iterator[Kernel]:
    for row in DECODE[head_dims]:
        yield Kernel(Op.DECODE, 100, dtype, *head_dims, Layout.ANY, **row)


def backward(
    dtype: str,
    head_dims: HeadDims,
    layout: Layout,
    mask: Mask,
    grouped: bool,
    deterministic: bool,
) -> Iterator[Kernel]:
    yield Kernel(
        Op.BACKWARD,
        100,
        dtype,
        *head_dims,
        layout,
        *BACKWARD[head_dims],
        mask,
        grouped,
        deterministic,
        two_cta=backward_two_cta(head_dims),
    )
