"""The enumeration of every compiled kernel.

The build, the table that the C++ planner reads, the manifest and the tests all derive from
`matrix()`; a test holds README to it. The defaults come from the tables of configs_sm90.py and
configs_sm100.py. Beside them are the `candidates()` that kernels/tile_rules.csv names, for problems
that they were measured to run faster.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from kernels import configs_sm90, configs_sm100, rules
from kernels.kernel import DTYPES, HEAD_DIM_BUCKETS, MAPS, ONE_PASS, Kernel, Layout, Mask, Op

CONFIGS = {90: configs_sm90, 100: configs_sm100}


def candidates(default: Kernel) -> tuple[Kernel, ...]:
    """The kernels that are measured beside a default, on Hopper."""
    return configs_sm90.candidates(default) if default.arch == 90 else ()


class Companions(NamedTuple):
    """The kernels that another is launched with, before and after it."""

    # In a backward in two passes this is the first pass.
    preprocess: Kernel | None = None
    # None where the backward writes that gradient itself: both passes always do, the kernel of
    # groups does with dK and dV, flash-attn-4's with those of MHA.
    postprocess_dq: Kernel | None = None
    postprocess_dk: Kernel | None = None
    postprocess_dv: Kernel | None = None
    # With a bias these come before all others, map_keys in a backward alone.
    map_queries: Kernel | None = None
    map_keys: Kernel | None = None

    @property
    def present(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self if kernel)


def companions(kernel: Kernel) -> Companions:
    """There are none but a backward's, and those of a kernel with a bias."""
    found = Companions()
    if kernel.op in ONE_PASS:
        found = _of_one_pass(kernel)
    if kernel.op is Op.BACKWARD_KEYS:
        found = Companions(preprocess=configs_sm90.backward_queries(kernel))
    if kernel.mask is Mask.BIAS and kernel.op in (Op.FORWARD, Op.BACKWARD_KEYS):
        found = found._replace(**{m.op.value: m for m in configs_sm90.maps(kernel)})
    return found


def _of_one_pass(backward: Kernel) -> Companions:
    sm90 = backward.arch == 90
    shared = Kernel(
        Op.PREPROCESS,
        backward.arch,
        backward.dtype,
        backward.head_dim,
        backward.head_dim_v,
        backward.layout,
        backward.block_m,
    )
    postprocess_dq = replace(
        shared,
        op=Op.POSTPROCESS,
        head_dim_v=backward.head_dim,
        threads=128 * backward.dq_warpgroups if sm90 else 128,
        two_cta=backward.two_cta,
        atom_layout_m=backward.atom_layout_m,
        swap_ab=backward.swap_ab,
    )
    if not backward.grouped:
        return Companions(shared, postprocess_dq)
    postprocess_dk = replace(
        shared,
        op=Op.POSTPROCESS,
        head_dim_v=backward.head_dim,
        block_m=backward.block_n,  # the tile's rows are keys
        threads=256 if sm90 else 128,
        cluster=2 if backward.two_cta else 1,
        atom_layout_m=backward.atom_layout_dkv if sm90 else 1,
        swap_ab=backward.swap_ab_dkv,
    )
    postprocess_dv = replace(
        postprocess_dk, head_dim=backward.head_dim_v, head_dim_v=backward.head_dim_v
    )
    return Companions(shared, postprocess_dq, postprocess_dk, postprocess_dv)


def _exists(arch: int, layout: Layout, mask: Mask) -> bool:
    """Whether there are kernels for a mask. Those with a bias are for dense tensors on Hopper."""
    return mask is not Mask.BIAS or (arch, layout) == (90, Layout.DENSE)


def _kernels(wanted: Callable[[Kernel], bool]) -> tuple[Kernel, ...]:
    """The defaults and the wanted candidates, each once, in an order that is stable between
    runs."""
    kernels: dict[Kernel, None] = {}
    for arch, configs in CONFIGS.items():
        for row in product(DTYPES, HEAD_DIM_BUCKETS[arch], (Layout.DENSE, Layout.VARLEN), Mask):
            if not _exists(arch, *row[2:]):
                continue
            defaults = [*configs.forward(*row)]
            for flags in product((False, True), repeat=2):  # grouped, deterministic
                defaults += configs.backward(*row, *flags)
            for default in defaults:
                for kernel in (default, *filter(wanted, candidates(default))):
                    kernels[kernel] = None
                    kernels |= dict.fromkeys(companions(kernel).present)
        for dtype, head_dims in product(DTYPES, HEAD_DIM_BUCKETS[arch]):
            kernels |= dict.fromkeys(configs.decode(dtype, head_dims))
            kernels |= dict.fromkeys(configs.paged_forward(dtype, head_dims))
    for dtype, head_dims in product(DTYPES, HEAD_DIM_BUCKETS[90]):
        for kernel in configs_sm90.backward_groups(dtype, head_dims):
            kernels |= dict.fromkeys((kernel, *companions(kernel).present))
    for dtype in DTYPES:  # speed rules were measured on Hopper alone
        head_dim, head_dim_v = max(HEAD_DIM_BUCKETS[90])
        clear = Kernel(Op.CLEAR, 90, dtype, head_dim, head_dim_v, Layout.VARLEN, block_m=0)
        kernels[clear] = None
    return tuple(kernels)


def matrix() -> tuple[Kernel, ...]:
    """Every kernel of a wheel: the defaults, and the candidates that a tile rule names."""
    named = {
        (rule.op, rule.layout, rule.head_dim, rule.mask, rule.block_m, rule.block_n)
        for rule in rules.tile_rules()
    }
    return _kernels(
        lambda k: (
            (k.op.value, k.layout.value, k.head_dim, k.mask.value, k.block_m, k.block_n) in named
        )
    )


def with_candidates() -> tuple[Kernel, ...]:
    """Every kernel that a build can hold."""
    return _kernels(lambda candidate: True)


def _causal_256(kernel: Kernel) -> bool:
    return (kernel.arch, kernel.head_dim, kernel.mask) == (90, 256, Mask.CAUSAL)


SUBSETS: dict[str, Callable[[Kernel], bool]] = {
    "full": lambda kernel: True,
    # A first look and the tests: the dtype and the head dims that most people train in, without the
    # deterministic backward, and a mask of the backward in two passes.
    "core": lambda kernel: (
        kernel.dtype == "bf16"
        and (kernel.head_dim in (64, 128) or kernel.op in (Op.CLEAR, *MAPS) or _causal_256(kernel))
        and not kernel.deterministic
        and kernel.mask is not Mask.WINDOW
    ),
    # For tuning/tiles.py: all candidates, and the defaults that they are compared with.
    "tuning": lambda kernel: (
        kernel.arch == 90 and not kernel.deterministic and kernel.mask is not Mask.WINDOW
    ),
}


def subset(name: str) -> tuple[Kernel, ...]:
    if name not in SUBSETS:
        raise ValueError(f"kernel subset {name!r} is unknown; allowed: {', '.join(SUBSETS)}")
    kernels = with_candidates() if name == "tuning" else matrix()
    return tuple(kernel for kernel in kernels if SUBSETS[name](kernel))
