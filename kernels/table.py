"""Generates the manifest and the C++ table of kernels, which the planner's kernel_table.h
declares."""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels import rules
from kernels.arguments import declared
from kernels.kernel import Kernel, Layout, Mask, Op
from kernels.matrix import companions, with_candidates

OPS = {op: "k" + op.value.title().replace("_", "") for op in Op}
PEERS = {"flash": "kFlash", "cudnn": "kCudnn"}
MASKS = {
    Mask.FULL: "kFull",
    Mask.CAUSAL: "kCausalBottomRight",
    Mask.WINDOW: "kWindow",
    Mask.BIAS: "kBias",
}


@dataclass(frozen=True)
class Built:
    kernel: Kernel
    facts: dict  # of kernels/worker.py


def manifest(built: Sequence[Built]) -> list[dict]:
    return [
        {
            "name": row.kernel.name,
            "op": row.kernel.op.value,
            "arch": row.kernel.arch,
            "dtype": row.kernel.dtype,
            "head_dim": row.kernel.head_dim,
            "head_dim_v": row.kernel.head_dim_v,
            "layout": row.kernel.layout.value,
            "mask": row.kernel.mask.value,
            "grouped": row.kernel.grouped,
            "deterministic": row.kernel.deterministic,
            "two_cta": row.kernel.two_cta,
            "persistent": row.kernel.persistent,
            "tuned": row.kernel.tuned,
            "block_m": row.kernel.block_m,
            "block_n": row.kernel.block_n,
            # The kernels that this one is launched with.
            "companions": [kernel.name for kernel in companions(row.kernel).present],
            **{
                fact: row.facts[fact]
                for fact in ("registers", "spill_bytes", "shared_memory_bytes", "object_bytes")
            },
        }
        for row in built
    ]


def build_info(
    subset: str,
    archs: Sequence[int],
    versions: dict[str, str],
    manifest_json: str,
    version: str,
    commit: str,
) -> dict:
    digest = hashlib.sha256(manifest_json.encode()).hexdigest()
    info = {"version": version, "commit": commit, "subset": subset, "archs": list(archs)}
    return info | {"versions": versions, "manifest_sha256": digest}


def _identifier(text: str) -> str:
    """Returns a text as it stands, if it is an identifier of C++."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"{text!r} can't go into the table of kernels: it is no identifier of C++")
    return text


def _raw(json_text: str) -> str:
    """A JSON text as a C++ literal. Without a closing parenthesis, which JSON has in strings only,
    nothing in it can end the literal."""
    return 'R"json(' + json_text.replace(")", r"\u0029") + ')json"'


def _row(built: Built, index: dict[Kernel, int]) -> str:
    kernel, facts = built.kernel, built.facts
    load, load_to_device, launch = _entry_points(facts)
    num_arguments = sum(argument.given for argument in declared(kernel))
    rows = ", ".join(str(index[companion] if companion else -1) for companion in companions(kernel))
    flags = ", ".join(
        str(flag).lower()
        for flag in (
            kernel.grouped,
            kernel.deterministic,
            kernel.two_cta,
            kernel.persistent,
            kernel.tuned,
        )
    )
    dtype, layout = (field.title() for field in (_identifier(kernel.dtype), kernel.layout.value))
    return (
        f'    {{"{_identifier(kernel.name)}",\n'
        f"     Op::{OPS[kernel.op]}, {kernel.arch}, Dtype::k{dtype}, "
        f"{kernel.head_dim}, {kernel.head_dim_v}, Layout::k{layout}, "
        f"Mask::{MASKS[kernel.mask]},\n"
        f"     {flags}, {kernel.block_m}, {kernel.block_n}, {kernel.ctas_per_sm}, {rows},\n"
        f"     {load},\n     {load_to_device},\n     {launch}, {num_arguments}}},\n"
    )


def _entry_points(facts: dict) -> tuple[str, str, str]:
    load, load_to_device, launch = (
        _identifier(facts[fact]) for fact in ("load", "load_to_device", "launch")
    )
    return load, load_to_device, launch


def _declaration(facts: dict) -> str:
    load, load_to_device, launch = _entry_points(facts)
    return (
        f"void {load}(void**);\nvoid {load_to_device}(void**);\nvoid {launch}(void**, int32_t);\n"
    )


def _rule(rule: rules.Rule) -> str:
    """The initializer of a Rule of csrc/core/plan/problem_features.h; `{}` stands for any."""

    def bounds(low: float, high: float) -> str:
        return f"{{{low}, {'kMax' if high == math.inf else high}}}"

    mask = "{}" if rule.mask is None else f"Mask::{MASKS[Mask(rule.mask)]}"
    grouped = "{}" if rule.grouped is None else str(rule.grouped).lower()
    ranges = ", ".join(bounds(*getattr(rule, name)) for name in rules.FEATURES)
    head_dim_v = "{}" if rule.head_dim_v is None else str(rule.head_dim_v)
    peer = "{}" if rule.peer is None else f"Peer::{PEERS[rule.peer]}"
    op, layout = OPS[Op(rule.op)], Layout(rule.layout).value.title()
    selectors = f"Op::{op}, Layout::k{layout}, {rule.head_dim}, {mask}, {grouped}"
    return f"{{{selectors}, {head_dim_v}, {peer}, {ranges}}}"


def _tile_rule(rule: rules.TileRule) -> str:
    tile, beats_stock = f"{{{rule.block_m}, {rule.block_n}}}", str(rule.beats_stock).lower()
    return f"{{{_rule(rule)}, {tile}, {beats_stock}}}"


def _vector(kind: str, name: str, rows: Iterable[str]) -> str:
    """The definition of a vector. It is never destroyed, because a call may read it while the
    process exits."""
    body = "".join(f"    {row},\n" for row in rows)
    return f"const std::vector<{kind}>& {name} = *new std::vector<{kind}>{{\n{body}}};\n\n"


def planner_cpp() -> str:
    """The tests' table: every kernel that a build can hold, without entry points. It is enough to
    plan with, and there is nothing to compile."""
    nothing = dict.fromkeys(("load", "load_to_device", "launch"), "nullptr")
    built = [Built(kernel, nothing) for kernel in with_candidates()]
    return _definitions(built, "{}", "[]")


def cpp(built: Sequence[Built], info_json: str, manifest_json: str) -> str:
    declarations = "".join(_declaration(row.facts) for row in built)
    return f'#include <cstdint>\n\nextern "C" {{\n{declarations}}}\n\n' + _definitions(
        built, info_json, manifest_json
    )


def _definitions(built: Sequence[Built], info_json: str, manifest_json: str) -> str:
    index = {row.kernel: i for i, row in enumerate(built)}
    return (
        "// Generated by kernels/build.py from kernels/matrix.py and kernels/*_rules.csv.\n"
        '#include "plan/kernel_table.h"\n'
        '#include "plan/speed_rules.h"\n'
        '#include "plan/tile_rules.h"\n\n'
        "namespace fa4 {\n\n"
        f"const Kernel kKernels[] = {{\n{''.join(_row(row, index) for row in built)}}};\n"
        f"const int32_t kNumKernels = {len(built)};\n\n"
        f"{_vector('TileRule', 'kTileRules', map(_tile_rule, rules.tile_rules()))}"
        f"{_vector('Rule', 'kSpeedRules', map(_rule, rules.speed_rules()))}"
        f"const char* const kBuildInfo = {_raw(info_json)};\n\n"
        f"const char* const kManifest = {_raw(manifest_json)};\n\n"
        "}  // namespace fa4\n"
    )


def write_if_different(path: Path, content: str | bytes) -> None:
    """Writes a file, but keeps the time stamp of one that did not change, so that nothing is
    compiled or linked for it again."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
