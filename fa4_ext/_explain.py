"""This module says which kernel a call would run, or why none of ours does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_ext import _library, _register
from fa4_ext._sdpa_choice import CUDNN, EFFICIENT, FLASH, OTHER, op_of, why_other

# SMs to plan for without a device: H100 SXM and H200, B200, B300.
_SM_COUNT = {90: 132, 100: 148, 103: 160}
# Whose calls register(prefer=False) leaves alone.
_PREFERRED = {CUDNN: "cuDNN", EFFICIENT: "memory-efficient attention"}


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: what runs a call. `print` shows it as a sentence.

    Attributes:
        supported: whether one of these kernels runs the call, or no kernel is needed.
        kernel: the kernel's name, as in `kernels()`. None if the call is not supported, or has no
            queries or no keys.
        reason: why the call is not supported. For a supported call: which inputs are copied or
            padded first, why no kernel is needed, or "".
        tile: the kernel's tile, (queries, keys); None without a kernel.
        workspace_bytes: device memory that the call takes while it runs, besides its results.
        fallback: None if the call is supported. "flash", "cudnn" or "efficient": PyTorch's own
            flash attention, cuDNN or memory-efficient attention gets the call, and raises if it
            cannot run it either. "other": F.scaled_dot_product_attention takes such a call
            elsewhere, to its math backend, or of float32 to memory-efficient attention, or it
            raises.
    """

    supported: bool
    kernel: str | None
    reason: str
    tile: tuple[int, int] | None = None
    workspace_bytes: int = 0
    fallback: str | None = None

    def __str__(self) -> str:
        if not self.supported:
            return f"left to PyTorch's own kernels: {self.reason}"
        return f"runs {self.kernel or 'no kernel'}" + (f" ({self.reason})" if self.reason else "")


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    backward: bool = False,
    deterministic: bool | None = None,
    device_capability: tuple[int, int] | None = None,
    attn_mask: torch.Tensor | None = None,
) -> Explanation:
    """Says which kernel a call would run, in which tile and with how much workspace, or why none
    does and what gets the call instead. It launches nothing, and with meta tensors needs no GPU.

    Whether speed rules apply, which kernels are disabled, and whether the calls of cuDNN and of
    memory-efficient attention are taken, follows the registration in force. Without one, speed
    rules apply, no kernel is disabled, and these calls are taken. Switches of torch.backends.cuda
    and torch.nn.attention.sdpa_kernel are not looked at. A packed call is explained as a call of
    aten._flash_attention_forward, although since torch 2.14 torch.nn.attention.varlen prefers
    cuDNN.

    Args:
        query, key, value: tensors on any device; the kernels take float16 and bfloat16. A dense
            call has 4-D tensors, [batch, heads, seqlen, head_dim], as
            F.scaled_dot_product_attention takes them. A packed call has 3-D tensors, [total, heads,
            head_dim], whose sequences lie back to back, as torch.nn.attention.varlen takes them.
            Value's head_dim may differ from query's and key's.
        dropout_p: probability from 0 to 1; the kernels run 0 only.
        is_causal: a causal mask. It is aligned top-left for 4-D tensors, as in
            F.scaled_dot_product_attention, and bottom-right for 3-D tensors or with a window.
        scale: factor of the scores, 1 / sqrt(head_dim) if None; the kernels run positive numbers
            only.
        enable_gqa: for 4-D tensors: whether key and value may have fewer heads than query.
        cu_seqlens_q, cu_seqlens_k: for 3-D tensors: int32 [batch + 1], the first row of each
            sequence, and the end of the last. cu_seqlens_k is cu_seqlens_q by default.
        max_seqlen_q, max_seqlen_k: for 3-D tensors: tokens of the longest sequence. max_seqlen_k is
            max_seqlen_q by default.
        window_size: (left, right), the numbers of keys before and after its own that a query
            attends to, aligned bottom-right; -1 means no bound. A 4-D call with a window is
            explained as a call of aten._flash_attention_forward, because
            F.scaled_dot_product_attention has no window.
        seqused_k: for the forward of 3-D tensors: int32 [batch], the keys in use of each sequence.
        block_table: for the forward of 3-D tensors: int32 [batch, pages of a sequence]. Key and
            value are then [pages, page size, heads, head_dim], and without cu_seqlens_k their
            lengths are seqused_k's.
        num_splits: for the forward of 3-D tensors: into how many parts the keys are split. With 1 a
            sequence has the same bits in every batch.
        backward: whether the question is about the backward.
        deterministic: whether the backward gives the same bits in every run. None follows
            torch.use_deterministic_algorithms.
        device_capability: a compute capability such as (9, 0); the planner then assumes the number
            of SMs of a usual product: 132 for 9.0, 148 for 10.0, 160 for 10.3. None means the
            tensors' CUDA device.
        attn_mask: for 4-D tensors without a window: a mask as F.scaled_dot_product_attention takes
            it, bool or added to the scores, which broadcasts to [batch, heads, queries, keys].

    Returns:
        The kernel, tile and workspace, or the reason and the fallback.

    Raises:
        ValueError: the arguments name no device capability, 3-D tensors come without cu_seqlens_q
            and max_seqlen_q, window_size is not a pair, or attn_mask comes with 3-D tensors or a
            window, or is one of torch.nn.attention.bias.
        RuntimeError: torch is too old, or the native library could not be loaded.
    """
    _library.native()
    if len(window_size) != 2:
        raise ValueError(f"window_size must be two numbers, left and right, is {window_size!r}")
    varlen = query.dim() == 3
    if varlen and (cu_seqlens_q is None or max_seqlen_q is None):
        raise ValueError("3-D query, key and value need cu_seqlens_q and max_seqlen_q")
    if attn_mask is not None:
        _check_mask(attn_mask, varlen or tuple(window_size) != (-1, -1))
    capability, sm_count = _device(query, device_capability)
    # 0 asks query's own device, whose driver may be too old.
    simulated = (capability, sm_count) if device_capability is not None else (0, 0)
    if deterministic is None:
        deterministic = (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
    options = _register.options_in_force()
    given = query, key, value
    op = FLASH
    if not varlen and tuple(window_size) == (-1, -1):
        op = op_of(
            *given,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            deterministic=deterministic,
            capability=capability,
            attn_mask=attn_mask,
        )
        if op == OTHER and (
            reason := why_other(
                *given,
                is_causal,
                enable_gqa,
                attn_mask=attn_mask,
                deterministic=deterministic,
                capability=capability,
            )
        ):
            return Explanation(False, None, reason, fallback=OTHER)
        if op in _PREFERRED and options and not options.prefer:
            reason = f"prefer=False leaves it to {_PREFERRED[op]}"
            return Explanation(False, None, reason, fallback=op)
        if op == FLASH:
            query, key, value = (_padded(tensor) for tensor in given)
    if not varlen:
        query, key, value = (
            tensor.transpose(1, 2) if tensor.dim() == 4 else tensor
            for tensor in (query, key, value)
        )
        max_seqlen_q, max_seqlen_k = (
            tensor.size(1) if tensor.dim() > 1 else 0 for tensor in (query, key)
        )
    supported, kernel, reason, tile_q, tile_k, workspace_bytes = torch.ops.fa4_ext.explain(
        query,
        key,
        value,
        cu_seqlens_q if varlen else None,
        (cu_seqlens_q if cu_seqlens_k is None and block_table is None else cu_seqlens_k)
        if varlen
        else None,
        max_seqlen_q,
        max_seqlen_q if max_seqlen_k is None else max_seqlen_k,
        dropout_p,
        is_causal,
        False,
        scale=scale,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        seqused_k=seqused_k,
        alibi_slopes=None,
        block_table=block_table,
        num_splits=num_splits,
        deterministic=deterministic,
        backward=backward,
        speed_rules=options.speed_rules if options else True,
        peer=_peer(op, attn_mask),
        capability=simulated[0],
        sm_count=simulated[1],
        attn_mask=_added(attn_mask, *given[:2], expand=op == EFFICIENT),
    )
    if not supported:
        return Explanation(False, None, reason, fallback=op)
    if not kernel:
        return Explanation(
            True, None, "there are no queries, or no keys: results are zeros, or have no elements"
        )
    if query.size(-1) != given[0].size(-1):
        reason = (
            f"F.scaled_dot_product_attention pads head_dim {given[0].size(-1)} to {query.size(-1)} "
            "first"
        )
    return Explanation(True, kernel, reason, (tile_q, tile_k), workspace_bytes)


def explain_shapes(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dtype: torch.dtype,
    *,
    sequences: int | None = None,
    **options,
) -> Explanation:
    """Calls `explain` for tensors of these shapes, with GQA where their heads differ.

    Args:
        q, k, v: shapes, [batch, heads, seqlen, head_dim], or with `sequences` [total, heads,
            head_dim].
        dtype: of all three tensors.
        sequences: the number of packed sequences, of equal length, rounded up.
        options: further arguments of `explain`.
    """
    query, key, value = (torch.empty(shape, dtype=dtype, device="meta") for shape in (q, k, v))
    if sequences:
        starts = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        longest_q, longest_k = (-(-shape[0] // sequences) for shape in (q, k))
        options |= {"cu_seqlens_q": starts, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    return explain(query, key, value, enable_gqa=q[1] != k[1], **options)


def _device(query: torch.Tensor, device_capability: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the compute capability as one number, 90 for 9.0, and the number of SMs."""
    if device_capability is not None:
        try:
            major, minor = device_capability
            known = 0 < major < 100 and 0 <= minor < 10
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"device_capability must be two numbers such as (9, 0), is {device_capability!r}"
            )
        capability = 10 * major + minor
        return capability, _SM_COUNT.get(capability, _SM_COUNT[90])
    if query.device.type != "cuda":
        raise ValueError(
            f"device_capability is needed, such as (9, 0): query is on {query.device}, not on a "
            "CUDA device"
        )
    properties = torch.cuda.get_device_properties(query.device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _check_mask(mask: torch.Tensor, beside_others: bool) -> None:
    from torch.nn.attention.bias import CausalBias

    if beside_others:
        raise ValueError("attn_mask is for 4-D query, key and value without a window")
    if isinstance(mask, CausalBias):
        raise ValueError(
            "attn_mask is one of torch.nn.attention.bias, not a tensor of numbers: in place of "
            "causal_upper_left pass is_causal=True, of causal_lower_right window_size=(-1, 0)"
        )


def _peer(op: str, mask: torch.Tensor | None) -> str:
    """Returns the op to ask about. Of those that get no call of this kind it is one that takes the
    arguments, so that its reason is about the call."""
    if op != OTHER:
        return op
    return FLASH if mask is None else CUDNN


def _added(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, expand: bool
) -> torch.Tensor | None:
    """Returns what F.scaled_dot_product_attention passes on: in place of a bool mask, a mask of
    query's dtype, which is added to the scores; to memory-efficient attention one of all heads."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=query.dtype)
    return mask.expand(*query.shape[:3], key.size(2)) if expand else mask


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what F.scaled_dot_product_attention passes on: a tensor whose head_dim is padded to a
    multiple of 8."""
    if tensor.dim() != 4 or tensor.size(3) % 8 == 0:
        return tensor
    *sizes, head_dim = tensor.shape
    return tensor.new_empty((*sizes, head_dim + 8 - head_dim % 8), device="meta")
