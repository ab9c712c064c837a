"""This module reads the arguments that the functions share."""

from __future__ import annotations

import torch

# What flash-attn's functions take beside what ours honour, with the values that ask for nothing.
_NEUTRAL = {
    "alibi_slopes": (None,), "attention_chunk": (None, 0), "aux_scalars": (None,),
    "aux_tensors": (None,), "block_sparse_tensors": (None,), "block_sparse_tensors_bwd": (None,),
    "cache_batch_idx": (None,), "cache_leftpad": (None,), "cu_seqlens_k_new": (None,),
    "cu_seqlens_q": (None,),
    "disable_scheduler_metadata": (False, True),  # of metadata that must be None
    "gather_bwd_recompute_p": (False,), "gather_bwd_token_chunk": (None,),
    "gather_kv_indices": (None,), "k_descale": (None,), "leftpad_k": (None,), "mask_mod": (None,),
    "max_seqlen_q": (None,),
    "pack_gqa": (None, False, True),  # a hint about speed
    "q_descale": (None,), "qv": (None,), "rotary_cos": (None,), "rotary_interleaved": (True, False),
    "rotary_seqlens": (None,), "rotary_sin": (None,), "scheduler_metadata": (None,),
    "score_mod": (None,), "score_mod_bwd": (None,), "seqlen_k_per_split": (None,),
    "seqused_q": (None,), "sm_margin": (None, 0), "v_descale": (None,), "zero_tensors": (False,),
}  # fmt: skip
_HINTS = {"min_seqlen_k"}  # about speed, with any value


def refuse_others(function: str, given: dict) -> None:
    """Raises the error for arguments that are not honoured.

    Raises:
        NotImplementedError: flash-attn has the argument, and its value asks for something.
        TypeError: no flash-attn up to 4.0.0b36 has such an argument.
    """
    for name, value in given.items():
        if name in _HINTS:
            continue
        if name not in _NEUTRAL:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        refuse_unless_neutral(name, value, _NEUTRAL[name])


def refuse_unless_neutral(name: str, value, neutral: tuple) -> None:
    if not any(value is one or (type(value) is type(one) and value == one) for one in neutral):
        shown = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise NotImplementedError(
            f"{name} is not supported by fa4_ext: it must be "
            f"{' or '.join(map(repr, neutral))}, is {shown}"
        )


def window_bounds(window_size: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """Returns the bounds as numbers, with -1 for none.

    Raises:
        ValueError: window_size is not a pair of bounds.
    """
    if window_size is None or len(window_size) != 2:
        raise ValueError(f"window_size must be two numbers, left and right, is {window_size!r}")
    left, right = (-1 if bound is None else bound for bound in window_size)
    if left < -1 or right < -1:
        raise ValueError(
            f"window_size must hold None, -1 or a number of keys from 0 on, is {window_size!r}"
        )
    return left, right


def split_count(num_splits: int | None) -> int:
    """Returns the number of parts into which the keys are split; 0 leaves it to the planner.

    Raises:
        ValueError: None was given.
    """
    if num_splits is None:
        raise ValueError("num_splits must be a number, 0 for the planner's choice, is None")
    return num_splits


def page_table(block_table: torch.Tensor | None, page_table: torch.Tensor | None):
    """Returns the one of the two that was given, if any.

    Raises:
        TypeError: both were given.
    """
    if block_table is not None and page_table is not None:
        raise TypeError("block_table and page_table are two names of one argument: give one")
    return page_table if block_table is None else block_table


def length(name: str, value: int | torch.Tensor | None, most: int) -> int:
    """Returns a length as a number; `most` where none is given. One in a tensor costs a
    synchronisation.

    Raises:
        ValueError: it is negative.
    """
    if value is None:
        return most
    if isinstance(value, torch.Tensor):
        number = value.item()
        torch._check(number >= 0)
        return int(number)
    if value < 0:
        raise ValueError(f"{name} must not be negative, is {value}")
    return value
