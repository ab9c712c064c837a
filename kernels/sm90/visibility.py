"""Which keys a query sees, as the kernels take it: a window's bounds, or a bias and its lists. The
masks of a kernel know which."""

import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels.kernel import Kernel, Mask
from kernels.sm90.bias import Bias
from kernels.sm90.bias_masks import BiasBounds, BiasMasks
from kernels.sm90.key_lists import KeyLists, ListStep, Matrices
from kernels.sm90.key_masks import KeyMasks, QueryStep
from kernels.sm90.masks import KeyBounds, Masks
from kernels.sm90.window import Window

Visibility = Window | Bias
# what a thread knows of it for its rows, which in the second pass of a backward are keys
Bounds = KeyBounds | BiasBounds
BoundsOfKeys = KeyBounds | Matrices
# a query tile among those of a key block
Step = QueryStep | ListStep


def visibility_of(
    left: Int32, right: Int32, bias: cute.Tensor | None, lists: cute.Tensor | None, scale: Float32
) -> Visibility:
    """A bias where there is one, else a window."""
    return Window(left, right) if bias is None else Bias(bias, lists, 1.0 / scale)


def masks_of(kernel: Kernel, rows: int) -> Masks:
    """The masks of a kernel whose warpgroups have so many query rows."""
    return (BiasMasks if kernel.mask is Mask.BIAS else Masks)(kernel, rows)


def key_masks_of(kernel: Kernel) -> KeyMasks:
    """The masks of a kernel whose warpgroups have key rows."""
    return (KeyLists if kernel.mask is Mask.BIAS else KeyMasks)(kernel)
