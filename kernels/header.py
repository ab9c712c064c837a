"""Reads an object's entry points and the arguments of its launch from export_to_c's C header."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Exports:
    load: str  # void (void** arguments): the device code into a library handle
    load_to_device: str  # void (void** arguments): the kernel's attributes on one device
    launch: str  # void (void** arguments, int32_t num_arguments)
    arguments: tuple[str, ...]  # of launch, worded as in kernels/signature.py


def _only(pattern: str, header: str, name: str) -> str:
    found = re.findall(pattern, header, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"header of {name}: {len(found)} matches of {pattern!r}, expected 1")
    return found[0]


def _tensors(header: str, prefix: str) -> dict[str, str]:
    shapes, strides = (
        r"(?:int32_t dynamic_shapes\[(\d+)\];\s*)?",
        r"(?:int64_t dynamic_strides\[(\d+)\];\s*)?",
    )
    structs = re.findall(
        rf"typedef struct {{\s*void \*data;\s*{shapes}{strides}}} {prefix}_Tensor_(\w+)_t;", header
    )
    return {
        name: f"{name}: tensor of {shape or 0} shapes, {stride or 0} strides"
        for shape, stride, name in structs
    }


def parse(header: str, prefix: str) -> Exports:
    launch = _only(
        rf"void (_mlir_{prefix}__mlir_ciface_\w+)\(void \*\*args, int32_t num_args\);",
        header,
        prefix,
    )
    parameters = _only(rf"cute_dsl_{prefix}_wrapper\((.*?)\) {{", header, prefix).split(", ")
    order = _only(r"void \*args\[\d+\] = {(.*?)};", header, prefix)

    declared = _tensors(header, prefix) | {"ret": "ret: int32_t"}
    for parameter in parameters:
        kind, name = parameter.rsplit(" ", 1)
        if not name.startswith("*"):
            declared[name] = f"{name}: {kind}"
    arguments = tuple(declared[argument.strip().lstrip("&")] for argument in order.split(","))

    load, load_to_device = f"_mlir_{prefix}_cuda_init", f"_mlir_{prefix}_cuda_load_to_device"
    for symbol in (load, load_to_device):
        _only(rf"void {symbol}\(void \*\*\);", header, prefix)
    return Exports(load, load_to_device, launch, arguments)
