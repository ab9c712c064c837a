"""Says what a PTX instruction does, as lines of Python over a warp w, its registers R, and m, a
mask of active lanes or None for all."""

import re

from interpreter.memory import Fault

# Registers of 8 bits do not exist.
WIDTHS = {"pred": "bool", "8": "U16", "16": "U16", "32": "U32", "64": "U64"}
COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
SHIFTS = {"shl": "shifted_left", "shr": "shifted_right"}
FUNCTIONS = {"ex2": "np.exp2", "lg2": "np.log2", "rcp": "np.float32(1) / "}
ALIKE = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor"), "_binary"),
    **dict.fromkeys(("min", "max"), "_extreme"),
    **dict.fromkeys(SHIFTS, "_shift"), **dict.fromkeys(FUNCTIONS, "_function"),
}  # fmt: skip
NOTHING = ("prefetch", "setmaxnreg", "fence", "griddepcontrol", "membar")
DECLARED = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64", "%f": "f32"}


def dtype_of(kind: str) -> str:
    return WIDTHS[kind if kind == "pred" else re.sub(r"\D", "", kind)]


def separated(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class Instructions:
    def __init__(self, parameters: dict[str, int], labels: dict[str, int]):
        """Keeps where each of `parameters` begins, and in `labels` the number of the instruction
        after each."""
        self.parameters, self.labels = parameters, labels
        self.registers: dict[str, int] = {}
        self.dtypes: list[str] = []

    def register(self, name: str, kind: str | None = None) -> int:
        if name not in self.registers:
            self.registers[name] = len(self.dtypes)
            self.dtypes.append(dtype_of(kind or DECLARED[re.match(r"%[a-z]+", name)[0]]))
        return self.registers[name]

    def lines(self, text: str, number: int) -> list[str]:
        guard = re.match(r"@(!?)(\S+) (.*)", text)
        text = guard[3] if guard else text
        opcode, _, rest = text.partition(" ")
        name, *modifiers = opcode.split(".")
        operands = separated(rest)
        condition = f"{'~' if guard[1] else ''}R[{self.register(guard[2])}]" if guard else None
        if name == "bra":
            target = self.labels[operands[0]]
            return [
                f"return w.branch({condition}, m, {target}, {number + 1})"
                if guard
                else f"return {target}"
            ]
        if name in ("ret", "exit"):
            return ["return w.ends(m)"]
        if name in NOTHING:
            return ["pass"]
        try:
            if name in ALIKE:
                lines = getattr(self, ALIKE[name])(name, modifiers, operands)
            else:
                lines = getattr(self, f"_{name}")(modifiers, operands, number)
        except (AttributeError, KeyError, StopIteration, ValueError) as error:
            raise Fault(f"the interpreter does not know {text!r}") from error
        if guard:
            lines = [
                "n = m",
                f"m = {condition} if m is None else m & {condition}",
                "if m.any():",
                *(f"    {x}" for x in lines),
                "m = n",
            ]
        return lines

    # Operands

    def value(self, operand: str, kind: str) -> str:
        dtype = dtype_of(kind)
        if operand in self.registers:
            return f"R[{self.registers[operand]}]"
        if operand.startswith("0f"):
            return f"full({int(operand[2:], 16)}, U32)"
        if re.fullmatch(r"-?\d\w*", operand):
            bits = {"bool": 1, "U16": 16, "U32": 32, "U64": 64}[dtype]
            return f"full({int(operand, 0) % 2**bits}, {dtype})"
        if operand in self.parameters:
            return f"full(w.block.PARAMETERS + {self.parameters[operand]}, U64)"
        if operand.startswith("__dynamic_shmem"):
            return "full(w.block.shared_base, U32)"
        if operand.startswith("%") and (
            "." in operand or not re.fullmatch(r"%(p|rs|r|rd|f)\d+", operand)
        ):
            return f"w.special({operand!r})"
        return f"R[{self.register(operand)}]"

    def set(self, operand: str, expression: str) -> list[str]:
        if operand == "_":
            return [expression]
        index = self.register(operand)
        return [f"v = {expression}", f"R[{index}] = v if m is None else np.where(m, v, R[{index}])"]

    def address(self, operand: str, wide: bool) -> str:
        base, offset = re.fullmatch(r"\[([%$\w#]+)\s*(?:\+\s*(-?\w+))?\]", operand).groups()
        if wide:
            return f"({self.value(base, 'b64')} + U64({int(offset or '0', 0) % 2**64}))"
        return f"({self.value(base, 'b32')}.astype(np.int64) + {int(offset or '0', 0)})"

    def braced(self, operand: str) -> list[str]:
        return separated(operand.strip("{}"))

    def values(self, operand: str, kind: str) -> str:
        return f"[{', '.join(self.value(x, kind) for x in self.braced(operand))}]"

    # Arithmetic

    def _mov(self, modifiers, operands, _):
        kind = modifiers[-1]
        target, source = operands
        parts = self.braced(target if target.startswith("{") else source)
        size = int(re.sub(r"\D", "", kind) or 0) // max(len(parts), 1)
        if target.startswith("{"):
            lines = [f"q = {self.value(source, kind)}"]
            for i, part in enumerate(parts):
                lines += (
                    self.set(part, f"(q >> {size * i}).astype({dtype_of(f'b{size}')})")
                    if part != "_"
                    else []
                )
            return lines
        if source.startswith("{"):
            dtype = dtype_of(kind)
            terms = (
                f"{self.value(part, f'b{size}')}.astype({dtype}) << {size * i}"
                for i, part in enumerate(parts)
            )
            return self.set(target, " | ".join(terms))
        return self.set(target, self.value(source, kind))

    def _binary(self, name, modifiers, operands):
        kind = modifiers[-1]
        if kind == "f32x2":
            return self._pairs(name, modifiers, operands)
        a, b = (self.value(x, kind) for x in operands[1:])
        if kind == "f32":
            return self.set(operands[0], f"bits(floats({a}) {OPERATORS[name]} floats({b}))")
        return self.set(operands[0], f"{a} {OPERATORS[name]} {b}")

    def _pairs(self, name, modifiers, operands):
        return self.set(
            operands[0],
            f"pairs({name!r}, {modifiers[0]!r}, "
            f"{', '.join(self.value(x, 'b64') for x in operands[1:])})",
        )

    def _product(self, modifiers, a, b):
        kind = modifiers[-1]
        if modifiers[0] == "lo":
            return f"{a} * {b}"
        return f"{'high_half' if modifiers[0] == 'hi' else 'wide_product'}({a}, {b}, '{kind}')"

    def _mul(self, modifiers, operands, _):
        if modifiers[-1] in ("f32", "f32x2"):
            return self._binary("mul", modifiers, operands)
        return self.set(
            operands[0],
            self._product(modifiers, *(self.value(x, modifiers[-1]) for x in operands[1:])),
        )

    def _mad(self, modifiers, operands, _):
        kind = modifiers[-1]
        wide = f"{kind[0]}{2 * int(kind[1:])}" if modifiers[0] == "wide" else kind
        product = self._product(modifiers, *(self.value(x, kind) for x in operands[1:3]))
        return self.set(operands[0], f"{product} + {self.value(operands[3], wide)}")

    def _fma(self, modifiers, operands, _):
        if modifiers[-1] == "f32x2":
            return self._pairs("fma", modifiers, operands)
        a, b, c = (f"floats({self.value(x, 'f32')}).astype(np.float64)" for x in operands[1:])
        # The last modifier is the factors' type.
        if modifiers[-1] != "f32":
            a, b = (
                f"widened({self.value(x, modifiers[-1])}, {modifiers[-1]!r}).astype(np.float64)"
                for x in operands[1:3]
            )
        return self.set(operands[0], f"bits({a} * {b} + {c})")

    def _div(self, modifiers, operands, _):
        a, b = (self.value(x, modifiers[-1]) for x in operands[1:])
        return self.set(operands[0], f"divided({a}, {b}, '{modifiers[-1]}')")

    def _rem(self, modifiers, operands, _):
        a, b = (self.value(x, modifiers[-1]) for x in operands[1:])
        return self.set(operands[0], f"{a} - divided({a}, {b}, '{modifiers[-1]}') * {b}")

    def _neg(self, modifiers, operands, _):
        kind = modifiers[-1]
        a = self.value(operands[1], kind)
        return self.set(
            operands[0],
            f"{a} ^ U32(1 << 31)" if kind == "f32" else f"full(0, {dtype_of(kind)}) - {a}",
        )

    def _abs(self, modifiers, operands, _):
        kind, a = modifiers[-1], self.value(operands[1], modifiers[-1])
        absolute = f"np.abs(integers({a}, '{kind}')).view({dtype_of(kind)})"
        return self.set(operands[0], f"{a} & U32(2**31 - 1)" if kind == "f32" else absolute)

    def _not(self, modifiers, operands, _):
        return self.set(operands[0], f"~{self.value(operands[1], modifiers[-1])}")

    def _shift(self, name, modifiers, operands):
        by = self.value(operands[2], "u32")
        return self.set(
            operands[0],
            f"{SHIFTS[name]}({self.value(operands[1], modifiers[-1])}, {by}, '{modifiers[-1]}')",
        )

    def _shf(self, modifiers, operands, _):
        if modifiers[1] != "wrap":
            raise ValueError
        low, high, by = (f"{self.value(x, 'b32')}.astype(U64)" for x in operands[1:])
        both, by = f"({high} << U64(32) | {low})", f"({by} & U64(31))"
        shifted = f"({both} << {by}) >> U64(32)" if modifiers[0] == "l" else f"({both} >> {by})"
        return self.set(operands[0], f"({shifted}).astype(U32)")

    def _extreme(self, name, modifiers, operands):
        kind = modifiers[-1]
        values = [self.value(x, kind) for x in operands[1:]]
        # A NaN is left out.
        if kind == "f32":
            result = f"floats({values[0]})"
            for value in values[1:]:
                result = f"np.f{name}({result}, floats({value}))"
            return self.set(operands[0], f"bits({result})")
        result = f"np.{name}imum({', '.join(f'integers({value}, {kind!r})' for value in values)})"
        if "relu" in modifiers:
            result = f"np.maximum({result}, 0)"
        return self.set(operands[0], f"{result}.view({dtype_of(kind)})")

    def _setp(self, modifiers, operands, _):
        comparison, kind = modifiers
        a, b = (self.value(x, kind) for x in operands[1:])
        if kind == "f32":
            nan = f"(np.isnan(floats({a})) | np.isnan(floats({b})))"
            if comparison in ("nan", "num"):
                return self.set(operands[0], nan if comparison == "nan" else f"~{nan}")
            held = f"(floats({a}) {COMPARISONS[comparison[:2]]} floats({b}))"
            return self.set(
                operands[0], f"{held} | {nan}" if comparison.endswith("u") else f"{held} & ~{nan}"
            )
        if kind[0] == "s":
            a, b = (f"integers({x}, '{kind}')" for x in (a, b))
        return self.set(operands[0], f"{a} {COMPARISONS[comparison]} {b}")

    def _selp(self, modifiers, operands, _):
        a, b = (self.value(x, modifiers[-1]) for x in operands[1:3])
        return self.set(operands[0], f"np.where({self.value(operands[3], 'pred')}, {a}, {b})")

    def _cvt(self, modifiers, operands, _):
        target, source = modifiers[-2:]
        if target in ("bf16x2", "f16x2"):
            high, low = (self.value(x, "f32") for x in operands[1:])
            return self.set(operands[0], f"packed({high}, {low}, '{target[:-2]}')")
        return self.set(
            operands[0], f"converted({self.value(operands[1], source)}, '{source}', '{target}')"
        )

    def _cvta(self, modifiers, operands, _):
        return self.set(operands[0], self.value(operands[1], modifiers[-1]))

    def _function(self, name, _modifiers, operands):
        return self.set(
            operands[0], f"bits({FUNCTIONS[name]}(floats({self.value(operands[1], 'f32')})))"
        )

    def _popc(self, _modifiers, operands, _):
        counts = f"[int(x).bit_count() for x in {self.value(operands[1], 'b32')}]"
        return self.set(operands[0], f"np.array({counts}, U32)")

    # Between lanes

    def _shfl(self, modifiers, operands, _):
        target, _, inside = operands[0].partition("|")
        arguments = ", ".join(self.value(x, "b32") for x in operands[1:4])
        lines = [
            f"q, k, s = shuffled({arguments}, '{modifiers[1]}')",
            "w.check_active(s, m)",
            *self.set(target, "q"),
        ]
        return lines + (self.set(inside, "k") if inside else [])

    def _vote(self, modifiers, operands, _):
        held = self.value(operands[1], "pred")
        among = f"({held} if m is None else {held} & m)"
        if modifiers[1] == "ballot":
            return self.set(operands[0], f"full(mask_bits({among}), U32)")
        if modifiers[1] == "all":
            among = f"({held} if m is None else {held} | ~m)"
        return self.set(operands[0], f"full({among}.{modifiers[1]}(), bool)")

    def _redux(self, modifiers, operands, _):
        among = (
            f"integers({self.value(operands[1], 'b32')}, '{modifiers[-1]}')[slice(None) if m is "
            "None else m]"
        )
        reduction = {"or": "bitwise_or", "max": "maximum", "min": "minimum"}[modifiers[1]]
        return self.set(operands[0], f"full(int(np.{reduction}.reduce({among})) % 2**32, U32)")

    def _elect(self, _modifiers, operands, _):
        lane, elected = operands[0].split("|")
        lines = ["q = 0 if m is None else int(np.argmax(m))", *self.set(elected, "LANE == q")]
        return lines + (self.set(lane, "full(q, U32)") if lane != "_" else [])

    def _activemask(self, _modifiers, operands, _):
        return self.set(operands[0], "full(2**32 - 1 if m is None else mask_bits(m), U32)")

    def _mapa(self, _modifiers, operands, _):
        address, rank = (self.value(x, "u32") for x in operands[1:])
        return self.set(operands[0], f"w.block.in_cluster({address}, {rank})")

    # Memory

    def _vector(self, modifiers):
        count = next((int(x[1:]) for x in modifiers if re.fullmatch(r"v\d", x)), 1)
        return count, int(re.sub(r"\D", "", modifiers[-1])) // 8

    def _ld(self, modifiers, operands, _):
        count, size = self._vector(modifiers)
        if "param" in modifiers:
            name, offset = re.fullmatch(r"\[([$\w]+)(?:\+(\d+))?\]", operands[1]).groups()
            lines = [
                f"q = w.block.parameter({self.parameters[name] + int(offset or 0)}, {count * size})"
            ]
        else:
            space = next(x for x in modifiers if x.startswith(("global", "shared")))[:6]
            lines = [
                f"q = w.load_{space}({self.address(operands[1], space == 'global')}, "
                f"{count * size}, m)"
            ]
        for i, target in enumerate(self.braced(operands[0])):
            if target != "_":
                lines += self.set(target, f"w.register(q[:, {i * size}:{(i + 1) * size}])")
        return lines

    def _st(self, modifiers, operands, _):
        _, size = self._vector(modifiers)
        space = next(x for x in modifiers if x.startswith(("global", "shared")))[:6]
        parts = ", ".join(
            f"w.bytes_of({self.value(x, f'b{8 * size}')}, {size})" for x in self.braced(operands[1])
        )
        return [
            f"w.store_{space}({self.address(operands[0], space == 'global')}, "
            f"np.concatenate([{parts}], axis=1), m)"
        ]

    def _atom(self, modifiers, operands, _):
        return self.set(operands[0], *self._red(modifiers, operands[1:], _))

    def _red(self, modifiers, operands, _):
        if "add" not in modifiers or "global" not in modifiers:
            raise ValueError
        given = self.braced(operands[1]) if "v4" in modifiers else [operands[1]]
        kind = ".view(np.float32)" if modifiers[-1] == "f32" else ""
        return [
            f"w.atomic_add({self.address(operands[0], True)} + U64({4 * i}), "
            f"{self.value(each, modifiers[-1])}{kind}, m)"
            for i, each in enumerate(given)
        ]

    def _stmatrix(self, modifiers, operands, _):
        values = self.values(operands[1], "b32")
        return [
            f"w.store_matrices({self.address(operands[0], False)}, {values}, "
            f"{'trans' in modifiers})"
        ]

    def _ldmatrix(self, modifiers, operands, _):
        targets = self.braced(operands[0])
        if len(targets) != int(modifiers[3][1:]):
            raise ValueError
        lines = [
            f"q = w.load_matrices({self.address(operands[1], False)}, {len(targets)}, "
            f"{'trans' in modifiers})"
        ]
        for i, target in enumerate(targets):
            lines += self.set(target, f"q[{i}]")
        return lines

    # Barriers

    def _bar(self, modifiers, operands, number):
        if modifiers[0] == "warp":
            return ["pass"]
        if modifiers[0] == "red":
            return self._vote_at_barrier(modifiers, operands, number)
        which = f"int({self.value(operands[0], 'u32')}[0])"
        threads = (
            f"int({self.value(operands[1], 'u32')}[0])" if len(operands) > 1 else "w.block.threads"
        )
        if "arrive" in modifiers:
            return [f"w.arrive_at_named_barrier({which}, {threads}, m)"]
        return [f"if not w.wait_at_named_barrier({which}, {threads}, m): return {number}"]

    def _vote_at_barrier(self, modifiers, operands, number):
        if modifiers[1:] != ["or", "pred"]:
            raise ValueError
        which, threads = (f"int({self.value(x, 'u32')}[0])" for x in operands[1:3])
        held = self.value(operands[3], "pred")
        return [
            f"q = w.vote_at_named_barrier({which}, {threads}, {held}, m)",
            f"if q is None: return {number}",
            *self.set(operands[0], "full(q, bool)"),
        ]

    def _barrier(self, modifiers, operands, number):
        if modifiers[0] != "cluster":
            return self._bar(modifiers, operands, number)
        if modifiers[1] == "arrive":
            return ["w.arrive_at_cluster_barrier(m)"]
        return [f"if not w.wait_at_cluster_barrier(m): return {number}"]

    def _mbarrier(self, modifiers, operands, number):
        if modifiers[0] == "init":
            return [
                f"w.set_barrier({self.address(operands[0], False)}, "
                f"{self.value(operands[1], 'u32')}, m)"
            ]
        barrier = self.address(operands[1], False)
        given = self.value(operands[2], "u32") if len(operands) > 2 else "full(1, U32)"
        if modifiers[0] == "arrive":
            counts = (
                f"full(1, U32), {given}" if "expect_tx" in modifiers else f"{given}, full(0, U32)"
            )
            return [f"w.arrive_at_barrier({barrier}, {counts}, m)"]
        if modifiers[0] in ("try_wait", "test_wait"):
            return self.set(
                operands[0], f"full(w.has_passed({barrier}, {given}, m, {number}), bool)"
            )
        raise ValueError

    # Asynchronous copies

    def _cp(self, modifiers, operands, _):
        if "commit_group" in modifiers:
            return [f"w.commit_{'stores' if 'bulk' in modifiers else 'loads'}()"]
        if "wait_group" in modifiers:
            return [f"w.await_{'stores' if 'bulk' in modifiers else 'loads'}({operands[0]})"]
        if modifiers[1:4] == ["mbarrier", "arrive", "noinc"]:
            return [f"w.arrive_after_loads({self.address(operands[0], False)}, m)"]
        # The instruction is cp.reduce.async.bulk.
        if "reduce" in modifiers:
            size = self.value(operands[2], "u32")
            return [
                f"w.add_bulk({self.address(operands[0], True)}, "
                f"{self.address(operands[1], False)}, {size}, m)"
            ]
        if "tensor" in modifiers:
            to_shared = modifiers.index("global") > next(
                i for i, x in enumerate(modifiers) if x.startswith("shared")
            )
            shared, tensor = operands[:2] if to_shared else operands[1::-1]
            name, coordinates = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", tensor).groups()
            box = f"{self.value(name, 'u64')}, {self.values(coordinates, 'u32')}"
            if to_shared:
                return [
                    f"w.load_box({self.address(shared, False)}, {box}, "
                    f"{self.address(operands[2], False)}, m)"
                ]
            return [f"w.store_box({self.address(shared, False)}, {box}, m)"]
        if "bulk" in modifiers:
            from_shared = modifiers[3] == "shared::cta"
            target, source, barrier = (
                self.address(operands[0], False),
                self.address(operands[1], not from_shared),
                self.address(operands[3], False),
            )
            copy = "copy_to_peer" if from_shared else "load_bulk"
            return [f"w.{copy}({target}, {source}, {self.value(operands[2], 'u32')}, {barrier}, m)"]
        target, source = self.address(operands[0], False), self.address(operands[1], True)
        given = self.value(operands[3], "u32") if len(operands) > 3 else f"full({operands[2]}, U32)"
        return [f"w.load_later({target}, {source}, {operands[2]}, {given}, m)"]

    # Products

    def _mma(self, modifiers, operands, _):
        shape, dtype = ["sync", "aligned", "m16n8k16", "row", "col"], modifiers[6]
        if modifiers != [*shape, "f32", dtype, dtype, "f32"]:
            raise ValueError
        a, b, sums = (self.values(x, "b32") for x in operands[1:])
        lines = [f"q = w.multiply_in_warp({a}, {b}, {sums}, '{dtype}', m)"]
        for i, target in enumerate(self.braced(operands[0])):
            lines += self.set(target, f"q[{i}]")
        return lines

    def _wgmma(self, modifiers, operands, _):
        if modifiers[0] == "fence":
            return ["pass"]
        if modifiers[0] == "commit_group":
            return ["w.commit_products()"]
        if modifiers[0] == "wait_group":
            return [f"w.await_products({operands[0]})"]
        if modifiers[0] != "mma_async":
            raise ValueError
        columns = int(re.search(r"n(\d+)k16", ".".join(modifiers))[1])
        target = [self.register(x) for x in self.braced(operands[0])]
        if operands[1].startswith("{"):
            a, transposed = self.values(operands[1], "b32"), ["0", operands[6]]
        else:
            a, transposed = self.value(operands[1], "b64"), operands[6:8]
        if operands[4:6] != ["1", "1"]:
            raise ValueError  # negated operands
        arguments = (
            f"{target}, {a}, {self.value(operands[2], 'b64')}, {self.value(operands[3], 'pred')}"
        )
        return [
            f"w.multiply({arguments}, ({', '.join(transposed)}), {columns}, '{modifiers[-1]}', m)"
        ]

    def _tcgen05(self, modifiers, operands, number):
        name, pair = modifiers[0].partition("::")[0], "cta_group::2" in modifiers
        if modifiers[0] == "wait::st":
            return ["w.await_tensor_stores()"]
        if name in ("wait", "fence", "relinquish_alloc_permit"):
            return ["pass"]
        if name == "alloc":
            columns = f"int({self.value(operands[1], 'u32')}[0])"
            return [
                f"if not w.take_columns({self.address(operands[0], False)}, {columns}, {pair}, m): "
                f"return {number}"
            ]
        if name == "dealloc":
            return [
                f"if not w.return_columns(int({self.value(operands[1], 'u32')}[0]), {pair}, m): "
                f"return {number}"
            ]
        if name in ("ld", "st"):
            address, registers = operands if name == "st" else operands[::-1]
            where = f"int({self.address(address, False)}[0])"
            if modifiers[-2] != f"x{len(self.braced(registers))}" or "32x32b" not in modifiers:
                raise ValueError
            if name == "st":
                return [f"w.store_tensor_memory({where}, {self.values(registers, 'b32')}, m)"]
            lines = [f"q = w.load_tensor_memory({where}, {len(self.braced(registers))}, m)"]
            return lines + [
                line
                for i, x in enumerate(self.braced(registers))
                for line in self.set(x, f"q[:, {i}].copy()")
            ]
        if name == "commit":
            mask = self.value(operands[1], "u16") if len(operands) > 1 else "None"
            return [f"w.commit_tensor_products({self.address(operands[0], False)}, {mask}, m)"]
        if name != "mma" or "kind::f16" not in modifiers:
            raise ValueError
        left_out = self.values(operands.pop(4), "b32") if operands[4].startswith("{") else "[]"
        in_tensor_memory = operands[1].startswith("[")
        a = self.address(operands[1], False) if in_tensor_memory else self.value(operands[1], "b64")
        rest = (
            f"{self.value(operands[2], 'b64')}, {self.value(operands[3], 'b32')}, "
            f"{self.value(operands[4], 'pred')}, {left_out}"
        )
        return [
            f"w.multiply_tensors({self.address(operands[0], False)}, {a}, {in_tensor_memory}, "
            f"{rest}, {pair}, m)"
        ]
