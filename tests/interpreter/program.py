"""Turns PTX text into Python functions, one for a run of instructions without a jump."""

import re
from collections.abc import Callable

import numpy as np

from interpreter import lanes
from interpreter.instructions import Instructions

SIZES = {"b8": 1, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
PARAMETER_ALIGN = 128
POISON = 0x7FC12345  # a NaN, in 32-bit registers that nobody wrote
# After these another warp may go on, and at these a warp may come back.
JUMPS = ("bra", "ret", "exit", "mbarrier.try_wait", "mbarrier.test_wait")
STOPS = (
    "bar.sync", "bar.red", "barrier.sync", "barrier.cluster.wait", "tcgen05.alloc",
    "tcgen05.dealloc",
)  # fmt: skip


def _declared(names: str) -> list[str]:
    """Returns the names in `a, b` or `a<3>`. Those of the compiler, with %, are known by their
    names."""
    found = []
    for name in (part.strip() for part in names.split(",")):
        many = re.fullmatch(r"(\w+)<(\d+)>", name)
        found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
    return [name for name in found if not name.startswith("%")]


class Program:
    """The program of one entry. `blocks` are by the number of their first instruction."""

    def __init__(self, text: str):
        head, body = text[text.index(".visible .entry") :].split("\n{", 1)
        # Each parameter has the place where it begins, and its bytes.
        self.parameters: list[tuple[int, int]] = []
        names, end = {}, 0
        for kind, name, count in re.findall(
            r"\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?", head
        ):
            size = SIZES[kind] * int(count or 1)
            names[name] = end
            self.parameters.append((end, size))
            end = -(-(end + size) // PARAMETER_ALIGN) * PARAMETER_ALIGN
        self.parameter_bytes = end
        self.instructions, labels, declared = self._statements(body)
        known = Instructions(names, labels)
        for name, kind in declared.items():
            known.register(name, kind)
        self.blocks = self._blocks(known, labels)
        values = {
            "bool": lanes.full(False, bool),
            "U16": lanes.full(0, lanes.U16),
            "U64": lanes.full(0, lanes.U64),
        }
        values["U32"] = lanes.full(POISON, lanes.U32)
        # Registers are replaced and never changed in place.
        self.unwritten = [values[name] for name in known.dtypes]

    @staticmethod
    def _statements(body: str) -> tuple[list[str], dict[str, int], dict[str, str]]:
        """Returns instructions; labels, each with the number of the next instruction; and registers
        declared in braces, with their types. Names in braces are their own."""
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"^\s*\{\s*$", "@@open;", body, flags=re.MULTILINE)
        body = re.sub(r"^\s*\}\s*$", "@@close;", body, flags=re.MULTILINE)
        body = re.sub(r"(\$?\w+):\s", r"@@label \1;", body)
        instructions, labels, declared = [], {}, {}
        scope, scopes, own = None, 0, set()
        for statement in (" ".join(part.split()) for part in body.split(";")):
            if statement == "@@open":
                scopes, own = scopes + 1, set()
                scope = scopes
            elif statement == "@@close":
                scope, own = None, set()
            elif statement.startswith("@@label"):
                name = statement.split()[1]
                labels[name if name.startswith("$") else f"{name}#{scope}"] = len(instructions)
            elif statement.startswith(".reg"):
                _, kind, names = statement.split(None, 2)
                for name in _declared(names):
                    own |= {name} if scope is not None else set()
                    declared[name if scope is None else f"{name}#{scope}"] = kind[1:]
            elif statement and not statement.startswith("."):
                for name in own:
                    statement = re.sub(
                        rf"(?<![\w%$.]){re.escape(name)}(?![\w#.])", f"{name}#{scope}", statement
                    )
                instructions.append(
                    re.sub(r"(\bbra(?:\.uni)? )(?!\$)(\w+)$", rf"\1\2#{scope}", statement)
                )
        return instructions, labels, declared

    def _blocks(self, known: Instructions, labels: dict[str, int]) -> dict[int, Callable]:
        begins = {0, *labels.values()}
        for number, text in enumerate(self.instructions):
            opcode = re.sub(r"^@!?\S+ ", "", text)
            if opcode.startswith(JUMPS):
                begins.add(number + 1)
            if opcode.startswith(STOPS):
                begins.add(number)
        order = sorted(begin for begin in begins if begin < len(self.instructions))
        source = []
        for begin, end in zip(order, [*order[1:], len(self.instructions)], strict=True):
            lines = [
                line
                for number in range(begin, end)
                for line in known.lines(self.instructions[number], number)
            ]
            source.append("\n    ".join([f"def block_{begin}(w, R, m):", *lines, f"return {end}"]))
        names = {name: getattr(lanes, name) for name in dir(lanes)} | {"np": np}
        exec("\n".join(source), names)
        return {begin: names[f"block_{begin}"] for begin in order}
