"""This module is the command `python -m fa4_ext bench`."""

from __future__ import annotations

import argparse

from fa4_ext import _cli_values

_DESCRIPTION = """\
Measures fa4_ext beside PyTorch's flash attention, cuDNN and, where they are installed,
flash-attn-4 and FlashAttention-3, in one process and in turns: median device time of
calls in a CUDA graph, and the spread of the rounds. A contender whose results differ
from attention in fp32 by more than rounding is reported and not timed. Inputs rotate
among sets that together are larger than the L2 cache; a flush between calls would add a
kernel to each time."""

_EPILOG = """\
grids:
  paper     the FlashAttention-3 paper's: 16k tokens, hidden size 2048, head dims 64, 128
  paper-gqa the same with eight query heads on a head of keys and values
  dims      the paper's with head dims 96, 192 and 256
  llama     training steps and prompts of Llama models, causal, grouped heads
  vit       images: vision transformers and diffusion
  decode    few queries against many keys, forward only, in microseconds
  varlen    16k tokens of packed sequences, head dim 128
  short     packed sequences of up to 512 tokens, up to 4,096 of them, in microseconds
  gqa       32 query heads on 32, 8, 4 and 1 heads of keys and values, length 4096
  masks     masks that are tensors: padding, causal, windows, documents, prefixes, slopes

contenders:
  ours     fa4_ext without its speed rules: its kernels or an error, never stock's time
  stock    PyTorch's flash attention (FlashAttention-2)
  cudnn    PyTorch's cuDNN attention; no varlen
  fa4      flash-attn-4, compiled when first called; the first call is not timed
  fa3      FlashAttention-3, from a module fa3_fwd_interface: forward, bf16, no varlen
of the grid masks, with ours and cudnn:
  efficient  PyTorch's memory-efficient attention; no GQA
  unmasked   fa4_ext with the same as a causal mask, a window or packed sequences
  flex       flex_attention, compiled for each mask; only if it is named

examples:
  bench --quick
  bench --host --json h200.json --figure h200.png,h200.svg
  bench --grid decode --contenders ours,stock --compare old.json
  bench --from h200.json --csv h200.csv
"""


def add_to(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure against PyTorch's kernels and other packages on this GPU",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--grid",
        default="paper",
        metavar="NAME",
        help="what is measured, of the list below; paper by default",
    )
    parser.add_argument(
        "--op", choices=("forward", "backward", "both"), default="both", help="both by default"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="bf16 by default")
    parser.add_argument(
        "--contenders",
        metavar="NAME[,NAME]",
        help="of the list below; all of the grid's that are installed by default",
    )
    parser.add_argument(
        "--rounds",
        type=_cli_values.count,
        metavar="N",
        help="timed rounds, 7 by default, 5 with --quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="each fifth problem of the grid, fewer rounds"
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="also the host time of a call and its nodes in a CUDA graph",
    )
    parser.add_argument("--json", metavar="PATH", help="write the result, for --from and --compare")
    parser.add_argument(
        "--csv", metavar="PATH", help="write a line for each problem, direction and contender"
    )
    parser.add_argument(
        "--figure",
        metavar="PATH[,PATH]",
        help="draw it, with matplotlib, into .png, .svg or .pdf files",
    )
    parser.add_argument(
        "--compare",
        metavar="PATH",
        help="print the times of an older result over these, and a summary",
    )
    parser.add_argument(
        "--from",
        dest="result",
        metavar="PATH",
        help="show the result of a file of --json, measuring nothing",
    )
    parser.set_defaults(run=_run, needs_no_library=False)


def _run(arguments) -> int:
    from fa4_ext.bench import command  # only now: no other command needs these modules

    return command.run(arguments)
