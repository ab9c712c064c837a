"""python -m fa4_ext demo | doctor | status | kernels | explain"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict

import torch

import fa4_ext
from fa4_ext import _demo, _dispatcher, _doctor, _environment, _library

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fa4_ext", description="FlashAttention-4 for PyTorch, compiled ahead of time.")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("demo", help="run attention beside the stock kernel, or without a GPU show what would run").set_defaults(
        run=lambda arguments: _demo.run()
    )
    doctor = commands.add_parser(
        "doctor", help="check torch, the driver, the GPUs and this build; exit status 1 when something is wrong"
    )
    doctor.add_argument("--no-gpu", action="store_true", help="ask for no GPU and touch none, on a login node for example")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=_examine)
    commands.add_parser("status", help="what is registered, on which device, in which versions").set_defaults(run=_status)
    commands.add_parser("kernels", help="list the compiled kernels").set_defaults(run=_kernels)
    explain = commands.add_parser("explain", help="say which kernel a call of F.scaled_dot_product_attention would run")
    explain.add_argument("--q", required=True, type=_shape, metavar="BxHxSxD", help="query's shape, such as 2x16x4096x128")
    explain.add_argument("--kv-heads", type=int, help="heads of key and value; query's by default")
    explain.add_argument("--kv-len", type=int, help="length of key and value; query's by default")
    explain.add_argument("--causal", action="store_true")
    explain.add_argument("--dropout", type=float, default=0.0)
    explain.add_argument("--dtype", choices=_DTYPES, default="bf16")
    explain.add_argument("--deterministic", action="store_true")
    explain.add_argument("--device", type=_capability, metavar="sm90", help="sm90, sm100, sm103 ...; this machine's GPU by default")
    explain.set_defaults(run=_explain)
    arguments = parser.parse_args()
    if _library.problem and arguments.run not in (_examine, _status):
        parser.exit(1, f"{parser.prog}: {_library.problem}\n")
    try:
        return arguments.run(arguments) or 0
    except ValueError as error:
        parser.error(str(error))


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not batch x heads x seqlen x head_dim, such as 2x16x4096x128")
    return tuple(int(size) for size in text.split("x"))


def _capability(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"sm(\d+)(\d)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device such as sm90")
    return int(match[1]), int(match[2])


def _examine(arguments) -> int:
    report = _doctor.examine(gpu=not arguments.no_gpu)
    if arguments.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}, indent=1))
        return not report.ok
    for check in report.checks:
        print(f"{check.status:5}  {check.name:12}  {check.sentence}")
    capability = call = None
    for row in report.calls:
        if row.capability != capability:
            print("\nWhat would run on compute capability {}.{}, bf16 where a call does not say".format(*row.capability))
        if row.capability != capability or row.call != call:
            print(f"  {row.call}")
        print(f"    {row.direction:8}  {row.explanation}")
        capability, call = row.capability, row.call
    wrong = [check.name for check in report.checks if check.status == _doctor.WRONG]
    print(f"\nWrong: {', '.join(wrong)}" if wrong else "\nNothing is wrong")
    return not report.ok


def _status(arguments) -> None:
    handle, facts = fa4_ext.default_handle, _environment.gather(devices=True)
    rows = [("fa4_ext", fa4_ext.__version__), ("torch", torch.__version__)]
    rows += [
        ("device", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
        for index, (major, minor) in enumerate(facts.devices)
    ] or [("device", "no CUDA device is available")]
    if not _library.problem:
        rows += [(name, value if isinstance(value, str) else repr(value)) for name, value in fa4_ext.build_info().items()]
        rows.append(("kernels", str(len(fa4_ext.kernels()))))
        rows.append(("registration", "none, FA4_EXT_AUTOREGISTER is 0" if handle is None else repr(handle)))
    rows += [(f"aten::{op}", _dispatcher.entry(op)) for op in _dispatcher.OPS]
    problems = _environment.problems(facts)
    rows += [("problem", problem) for problem in dict.fromkeys(filter(None, [_library.problem, *problems]))]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _kernels(arguments) -> None:
    kernels = fa4_ext.kernels()
    width = max((len(kernel.name) for kernel in kernels), default=0)
    print(f"{'name':{width}}  arch  registers  spills  shared memory  object")
    for k in kernels:
        print(
            f"{k.name:{width}}  {k.arch:4}  {k.registers:9}  {k.spill_bytes:4} B  {k.shared_memory_bytes / 1024:9.1f} KiB  "
            f"{k.object_bytes / 1024:3.0f} KiB"
        )


def _explain(arguments) -> None:
    batch, heads, seqlen, head_dim = arguments.q
    heads_kv, seqlen_kv = arguments.kv_heads or heads, arguments.kv_len or seqlen
    query = torch.empty(arguments.q, dtype=_DTYPES[arguments.dtype], device="meta")
    key = query.new_empty(batch, heads_kv, seqlen_kv, head_dim)
    capability = arguments.device
    if capability is None:
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device is available: name one with --device, such as --device sm90")
        capability = torch.cuda.get_device_capability()
    for direction, backward in (("forward", False), ("backward", True)):
        answer = fa4_ext.explain(
            query,
            key,
            key,
            dropout_p=arguments.dropout,
            is_causal=arguments.causal,
            enable_gqa=heads_kv != heads,
            backward=backward,
            deterministic=arguments.deterministic,
            device_capability=capability,
        )
        print(f"{direction:8}  {answer}")


if __name__ == "__main__":
    sys.exit(main())
