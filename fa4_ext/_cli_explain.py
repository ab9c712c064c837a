"""This module is the command `python -m fa4_ext explain`."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass

import torch

from fa4_ext import _cli_text, _cli_values
from fa4_ext._explain import Explanation, explain_shapes
from fa4_ext._sdpa_choice import CUDNN, FLASH

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_DESCRIPTION = """\
Says for forward and backward which kernel a call would run, in which tile and with
how much workspace, or why none and what gets the call instead. Needs no GPU."""

_EPILOG = """\
examples:
  explain --q 2x16x4096x128 --kv-heads 4 --causal --device sm90
  explain --q 8192x16x128 --sequences 4 --window 1024,0
  explain --q 8192x16x192 --v-head-dim 128 --sequences 4 --causal

--json prints an object:
  call               q, k and v, their shapes; sequences, null when dense; dtype; causal;
                     window, [left, right], -1 where there is no bound; dropout;
                     deterministic; compute_capability, such as [9, 0]
  forward, backward  of each:
    supported          whether one of fa4_ext's kernels runs it
    kernel             its name; it and tile are null without a kernel
    tile               [rows of queries, rows of keys]
    workspace_bytes    device memory that the call takes while it runs, besides
                       its results
    reason             why not; when supported, which inputs are copied or padded
                       first, or ""
    fallback           null when supported; "flash" or "cudnn": PyTorch's own flash
                       attention or cuDNN gets the call; "other":
                       F.scaled_dot_product_attention takes such a call to neither:
                       another of its backends gets it, or it raises an error
"""


@dataclass(frozen=True)
class Call:
    # [batch, heads, length, head_dim], or with `sequences` [tokens, heads, head_dim]
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    sequences: int | None
    dtype: str
    causal: bool
    window: tuple[int, int]
    dropout: float
    deterministic: bool
    compute_capability: tuple[int, int]

    @property
    def function(self) -> str:
        if self.sequences:
            return "torch.nn.attention.varlen"
        return (
            "F.scaled_dot_product_attention"
            if self.window == (-1, -1)
            else "aten::_flash_attention_forward"
        )

    def explain(self, backward: bool) -> Explanation:
        return explain_shapes(
            self.q,
            self.k,
            self.v,
            _DTYPES[self.dtype],
            sequences=self.sequences,
            dropout_p=self.dropout,
            is_causal=self.causal,
            window_size=self.window,
            backward=backward,
            deterministic=self.deterministic,
            device_capability=self.compute_capability,
        )


def add_to(commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="say which kernel a call of attention would run, or what runs instead",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--q",
        required=True,
        type=_cli_values.shape,
        metavar="BxHxSxD",
        help="query's shape, such as 2x16x4096x128; with --sequences tokens x heads x head_dim, "
        "such as 8192x16x128",
    )
    parser.add_argument(
        "--k",
        type=_cli_values.shape,
        metavar="BxHxSxD",
        help="shape of key and value; query's by default",
    )
    parser.add_argument(
        "--kv-heads",
        type=_cli_values.count,
        metavar="H",
        help="heads of key and value; query's by default",
    )
    parser.add_argument(
        "--kv-len",
        type=_cli_values.count,
        metavar="S",
        help="length of key and value, or tokens of all sequences; query's by default",
    )
    parser.add_argument(
        "--v-head-dim",
        type=_cli_values.count,
        metavar="D",
        help="value's head_dim; key's by default",
    )
    parser.add_argument(
        "--sequences",
        type=_cli_values.count,
        metavar="N",
        help="--q holds that many sequences of equal length back to back (varlen)",
    )
    parser.add_argument(
        "--causal", action="store_true", help="each query sees the keys up to its own"
    )
    parser.add_argument(
        "--window",
        type=_cli_values.window,
        metavar="LEFT,RIGHT",
        default=(-1, -1),
        help="how many keys before and after its own a query sees, such as 1024,0; all or -1: no "
        "bound",
    )
    parser.add_argument(
        "--dropout",
        type=_cli_values.probability,
        metavar="P",
        default=0.0,
        help="probability, 0 by default",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="bf16 by default")
    parser.add_argument(
        "--deterministic", action="store_true", help="the backward gives the same bits in every run"
    )
    parser.add_argument(
        "--device",
        type=_cli_values.capability,
        metavar="sm90",
        help="sm90, sm100, sm103 ...; this machine's GPU by default",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, described below")
    parser.set_defaults(run=_run, needs_no_library=False)


def join_window(words: list[str]) -> list[str]:
    """Writes `--window -1,0` as `--window=-1,0`, because argparse would take the value for an
    option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--window" and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _run(arguments) -> None:
    call = call_of(arguments)
    answers = {"forward": call.explain(backward=False), "backward": call.explain(backward=True)}
    print(_cli_text.json_text(report(call, answers)) if arguments.json else text(call, answers))


def call_of(arguments) -> Call:
    """Returns the call that the options describe.

    Raises:
        ValueError: the options contradict each other, or there is no GPU and none is named.
    """
    k = _key_shape(arguments)
    v = (*k[:-1], arguments.v_head_dim or k[-1])
    for name, shape in (("key", k), ("value", v)):
        if _cli_values.too_large(shape):
            raise ValueError(
                f"{name} {written(shape)} has more elements than a tensor can: at most 2**60 are "
                "allowed"
            )
    return Call(
        q=arguments.q,
        k=k,
        v=v,
        sequences=arguments.sequences,
        dtype=arguments.dtype,
        causal=arguments.causal,
        window=arguments.window,
        dropout=arguments.dropout,
        deterministic=arguments.deterministic,
        compute_capability=arguments.device or _own_capability(),
    )


def _key_shape(arguments) -> tuple[int, ...]:
    q, k, sequences = arguments.q, arguments.k, arguments.sequences
    if sequences is None and len(q) == 3:
        raise ValueError(
            f"argument --q: {written(q)} is tokens x heads x head_dim of sequences back to back, "
            "and --sequences is missing, which "
            "says how many; without it batch x heads x length x head_dim is allowed, such as "
            "2x16x4096x128"
        )
    if sequences is not None and len(q) == 4:
        raise ValueError(
            f"argument --q: {written(q)} is batch x heads x length x head_dim: with --sequences "
            "tokens x heads x head_dim is "
            "allowed, such as 8192x16x128"
        )
    if k is None:
        length, heads = (0, 1) if len(q) == 3 else (2, 1)
        sizes = list(q)
        sizes[heads] = arguments.kv_heads or q[heads]
        sizes[length] = arguments.kv_len or q[length]
        return tuple(sizes)
    if arguments.kv_heads is not None or arguments.kv_len is not None:
        raise ValueError(
            f"argument --k: {written(k)} says what --kv-heads and --kv-len say: either it or they "
            "are allowed"
        )
    if len(k) != len(q):
        raise ValueError(
            f"argument --k: {written(k)} has {len(k)} sizes, --q {written(q)} has {len(q)}: as "
            "many are allowed"
        )
    return k


def _own_capability() -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is available: name one with --device, such as --device sm90"
        )
    return torch.cuda.get_device_capability()


def written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def report(call: Call, answers: dict[str, Explanation]) -> dict:
    return {
        "call": asdict(call),
        **{direction: asdict(answer) for direction, answer in answers.items()},
    }


def text(call: Call, answers: dict[str, Explanation]) -> str:
    keys = (
        f"key and value {written(call.k)}"
        if call.k == call.v
        else f"key {written(call.k)}, value {written(call.v)}"
    )
    lines = [_title(call), f"query {written(call.q)}, {keys}{_sequences(call)}"]
    for direction, answer in answers.items():
        lines += ["", direction, *_cli_text.labelled(_facts(call, answer), indent="  ")]
    return "\n".join(lines)


def _title(call: Call) -> str:
    bounds = ["all" if bound < 0 else str(bound) for bound in call.window]
    words = [
        call.function,
        call.dtype,
        "causal" if call.causal else "",
        f"window {bounds[0]},{bounds[1]}" if call.window != (-1, -1) else "",
        f"dropout {call.dropout}" if call.dropout else "",
        "deterministic" if call.deterministic else "",
        "compute capability {}.{}".format(*call.compute_capability),
    ]
    return ", ".join(filter(None, words))


def _sequences(call: Call) -> str:
    return f", {call.sequences} sequences back to back" if call.sequences else ""


def _facts(call: Call, answer: Explanation) -> list[tuple[str, str]]:
    if not answer.supported:
        return [
            ("kernel", "none of fa4_ext's"),
            ("because", answer.reason),
            ("instead", _instead(call, answer)),
        ]
    if not answer.kernel or not answer.tile:
        return [("kernel", "none is needed"), ("because", answer.reason)]
    rows_q, rows_k = answer.tile
    rows = [
        ("kernel", answer.kernel),
        ("tile", f"{rows_q} queries x {rows_k} keys"),
        (
            "workspace",
            _cli_text.readable_bytes(answer.workspace_bytes) if answer.workspace_bytes else "none",
        ),
    ]
    return [*rows, ("inputs", answer.reason)] if answer.reason else rows


def _instead(call: Call, answer: Explanation) -> str:
    if answer.fallback == FLASH:
        return "PyTorch's own flash attention gets the call"
    if answer.fallback == CUDNN:
        return "cuDNN gets the call"
    return (
        f"{call.function} takes this call neither to cuDNN nor to flash attention: another of its "
        "backends gets it, or it raises an error"
    )
