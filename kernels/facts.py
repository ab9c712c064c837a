"""Checks the facts that kernels/worker.py states of an object. They come out of a file or a
process, and some of them go into C++."""

import re

from kernels.kernel import Kernel

# These are the endings of export_to_c's entry points (kernels/header.py). All of a kernel's begin
# with _mlir_ and its name.
SYMBOLS = {
    "load": "cuda_init",
    "load_to_device": "cuda_load_to_device",
    "launch": "_mlir_ciface_[A-Za-z0-9_]+",
}
NUMBERS = ("registers", "spill_bytes", "products", "waits", "shared_memory_bytes", "object_bytes")
FACTS = {*SYMBOLS, *NUMBERS, "arguments"}


def problem(kernel: Kernel, content: bytes, facts: object) -> str | None:
    """Says why these can't be the facts about a kernel's object. None means that they can."""
    if not isinstance(facts, dict) or set(facts) != FACTS:
        return f"the facts about its object must be {', '.join(sorted(FACTS))}, are {facts!r:.200}"
    for fact, ending in SYMBOLS.items():
        if not isinstance(facts[fact], str) or not re.fullmatch(
            f"_mlir_{kernel.name}_{ending}", facts[fact]
        ):
            return (
                f"the name of its {fact} must be _mlir_{kernel.name}_{ending}, is "
                f"{facts[fact]!r:.200}"
            )
    for fact in NUMBERS:
        if type(facts[fact]) is not int or facts[fact] < 0:
            return f"its {fact} must be a number from 0 on, is {facts[fact]!r:.200}"
    arguments = facts["arguments"]
    if not isinstance(arguments, (list, tuple)) or not all(
        isinstance(argument, str) for argument in arguments
    ):
        return f"its arguments must be a list of strings, are {arguments!r:.200}"
    if facts["object_bytes"] != len(content):
        return f"its object must have {facts['object_bytes']} bytes, has {len(content)}"
    return None
