"""Says which problems a kernel is tested on, and which other kernels are left out so that it is the
one that runs. A kernel is its row of the library's manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

Kernel = Mapping[str, Any]

# The ops that are called for. The other kernels are launched with one of them.
CALLED = ("forward", "decode", "backward", "backward_groups", "backward_keys", "clear")
_BACKWARDS = ("backward", "backward_groups", "backward_keys")

# Numbers of query heads and of key/value heads.
_HEADS = {"any": ((2, 2), (4, 2), (3, 1)), "mha": ((2, 2), (3, 3)), "gqa": ((4, 2), (3, 1))}
_MANY = 8  # times as many heads, so that there are more tiles than SMs

# The head dims, queries and keys of sequences that a speed rule of Hopper's leaves to PyTorch's
# backward. It writes no dK and dV where there are no queries, and nothing behind the last sequence.
_CLEARED = ((16, 0, 33, 1, 0, 20), (16, 40, 33, 7, 9, 20))
_CLEARED_HEAD_DIMS = (64, 128)

# The biases of a dense problem, for the lengths of _dense() in turn: random numbers, which hide
# nothing; padding, and a causal mask with holes, which hide what they do by minus infinity; slopes,
# which differ by head, grow with the distance and beyond a window hide by a finite number, from the
# last query every key.
_BIASES = ("random", "padding", "slopes", "padding", "causal", "slopes", "causal")


# Keys of a page, in turn: few, a key block or two, and what divides neither.
_PAGE_SIZES = (16, 128, 48)


@dataclass(frozen=True)
class Problem:
    """One attention call. The sequences of a dense problem are equally long.

    Attributes:
        heads, heads_kv: query heads, and key/value heads.
        is_causal: aligned bottom-right, like the window.
        window: the keys to the left and to the right that a query sees; -1 is no bound.
        rows_behind: varlen: rows of the tensors behind the last sequence.
        by_stock: PyTorch's own backward computes it, by a speed rule.
        bias: one of _BIASES, through cuDNN's op; none if empty.
        page_size: varlen: keys of a page, through this library's own op; 0 for no pages.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    heads: int
    heads_kv: int
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    varlen: bool = False
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    backward: bool = False
    deterministic: bool = False
    rows_behind: int = 0
    by_stock: bool = False
    bias: str = ""
    page_size: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """The window with the causal mask written as one."""
        return (self.window[0], 0) if self.is_causal else self.window

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """[batch, heads, queries, keys] of the bias, with 1 for what is broadcast, or [queries,
        keys]."""
        queries, keys = self.seqlens_q[0], self.seqlens_k[0]
        return {
            "random": (len(self.seqlens_q), self.heads, queries, keys),
            "padding": (len(self.seqlens_q), 1, 1, keys),
            "slopes": (1, self.heads, queries, keys),
            "causal": (queries, keys),
        }[self.bias]

    def __str__(self) -> str:
        def lengths(seqlens: tuple[int, ...]) -> str:
            return ",".join(map(str, seqlens)) if self.varlen else f"{len(seqlens)} x {seqlens[0]}"

        words = [
            "backward" if self.backward else "forward",
            "varlen" if self.varlen else "dense",
            f"queries {lengths(self.seqlens_q)}",
            f"keys {lengths(self.seqlens_k)}",
            f"heads {self.heads}/{self.heads_kv}",
            f"head dims {self.head_dim} and {self.head_dim_v}",
            "causal" if self.is_causal else "",
            f"window {self.window[0]},{self.window[1]}" if self.window != (-1, -1) else "",
            f"bias {self.bias}" if self.bias else "",
            f"pages of {self.page_size}" if self.page_size else "",
            f"{self.rows_behind} rows behind" if self.rows_behind else "",
            "deterministic" if self.deterministic else "",
        ]
        return ", ".join(filter(None, words))


def problems_for(kernel: Kernel) -> tuple[Problem, ...]:
    """Returns small and odd problems that this kernel runs where no other can: lengths around its
    tiles' ends, head dims of its bucket and below, rows without keys. There are none for a kernel
    that is not called for but launched with another."""
    make = {
        "forward": _attention,
        "backward": _attention,
        "backward_groups": _attention,
        "backward_keys": _attention,
        "decode": _decode,
        "clear": _clear,
    }.get(kernel["op"])
    return tuple(make(kernel)) if make else ()


def others(kernel: Kernel, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Returns the names of the kernels that could run a problem in this one's place. A forward
    keeps all backwards, and a backward all forwards, because some calls run on both or neither."""
    kinds = (("forward", "decode"), _BACKWARDS, ("clear",))
    rivals = next(ops for ops in kinds if kernel["op"] in ops)
    return tuple(
        other["name"]
        for other in kernels
        if other["op"] in rivals and other["name"] != kernel["name"]
    )


def _attention(kernel: Kernel) -> Iterator[Problem]:
    op = kernel["op"]
    kinds = {"backward": "gqa" if kernel["grouped"] else "mha", "backward_groups": "gqa"}
    paged = kernel["layout"] == "paged"
    varlen = paged or kernel["layout"] == "varlen"
    heads = cycle(_HEADS[kinds.get(op, "any")])
    shapes = (_packed if varlen else _dense)(kernel["block_m"], kernel["block_n"])
    for index, (seqlens_q, seqlens_k, times) in enumerate(shapes):
        heads_q, heads_kv = next(heads)
        head_dim, head_dim_v = _head_dims(kernel, below=index % 2 == 1)
        problem = Problem(
            kernel["dtype"], head_dim, head_dim_v, times * heads_q, times * heads_kv,
            seqlens_q, seqlens_k, varlen=varlen, backward=op in _BACKWARDS,
            deterministic=op == "backward_keys" or kernel["deterministic"],
            rows_behind=5 if varlen and index == 0 else 0,
            page_size=_PAGE_SIZES[index] if paged else 0,
        )  # fmt: skip
        yield _masked(problem, kernel["mask"], index)


def _dense(m: int, n: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Lengths of queries and of keys, and how many times as many heads, for a tile of m x n."""
    sizes = [
        (2, m, n, 1),
        (2, 2 * m + 1, 2 * n + 1, 1),
        (1, m - 1, 3 * n - 1, 1),
        (2, 1, n + 1, 1),
        (2, m + n + 5, n // 2 + 1, 1),  # rows without keys under a mask
        (1, m + 3, 9 * n + 5, 1),  # more key blocks than stages
        (6, 2 * m + 7, 2 * n + 9, _MANY),
    ]
    return [((q,) * batch, (k,) * batch, times) for batch, q, k, times in sizes]


def _packed(m: int, n: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    alike = (m - 1, m, m + 1, 3, 9 * n + 5)
    return [
        ((m, 1, 0, 2 * m + 1, m - 1, 7), (n, 3 * n - 1, 5, 0, 2 * n + 1, n + 1), 1),
        (alike, alike, 1),
        (
            tuple(37 * i % (m + 9) for i in range(24)),
            tuple(53 * i % (2 * n + 5) for i in range(24)),
            _MANY,
        ),
    ]


def _head_dims(kernel: Kernel, below: bool) -> tuple[int, int]:
    """The bucket's head dims, or the next smaller ones. On Blackwell a backward of MHA runs those
    only where it stores by TMA: elsewhere the kernel of GQA does."""
    whole_rows = kernel["op"] == "backward" and kernel["arch"] == 100 and not kernel["grouped"]
    if whole_rows and (kernel["layout"] == "varlen" or kernel["mask"] == "window"):
        below = False
    less = 8 if below else 0
    return kernel["head_dim"] - less, kernel["head_dim_v"] - less


def _masked(problem: Problem, mask: str, index: int) -> Problem:
    """A window is bounded on both sides, or the left bound of a causal mask, in turn. It is
    narrower than the keys, or it would be no window."""
    if mask == "full":
        return problem
    if mask == "causal":
        return replace(problem, is_causal=True)
    if mask == "bias":
        return replace(problem, bias=_BIASES[index])
    longest = max(problem.seqlens_k)
    if index % 2:
        return replace(problem, is_causal=True, window=(longest // 3, -1))
    return replace(problem, window=(min(37, longest - 2), min(21, longest - 2)))


def _decode(kernel: Kernel) -> Iterator[Problem]:
    n = kernel["block_n"]
    shapes = (
        ((1,), (9 * n + 5,), (8, 2)),
        ((3, 3), (n, n), (2, 2)),
        ((17,), (5 * n - 1,), (16, 2)),  # more rows than a tile
        ((40, 40), (7, 7), (4, 1)),  # rows without keys under a mask
        ((2,), (8195,), (4, 4)),  # as many splits as a cluster holds
        ((1, 3, 0, 17), (3 * n + 1, 0, 5, 2 * n), (8, 2)),
    )
    for mask in ("full", "causal", "window"):
        for index, (seqlens_q, seqlens_k, heads) in enumerate(shapes):
            head_dims = _head_dims(kernel, below=index % 2 == 1)
            ragged = len(set(seqlens_k)) > 1
            problem = Problem(
                kernel["dtype"], *head_dims, *heads, seqlens_q, seqlens_k, varlen=ragged
            )
            yield _masked(problem, mask, index)
        paged = replace(problem, varlen=True, page_size=16)
        yield _masked(paged, mask, index=0)


def _clear(kernel: Kernel) -> Iterator[Problem]:
    for head_dim in _CLEARED_HEAD_DIMS:
        yield Problem(
            kernel["dtype"], head_dim, head_dim, 4, 2, *_CLEARED,
            varlen=True, backward=True, rows_behind=7, by_stock=True,
        )  # fmt: skip
