"""The overrides on a torch whose ops have other arguments or results than any that is known: an
error, and nothing is read as something else. C++ programs call the library without the check of
schemas that `import fa4_ext` makes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import python
from test_schemas import (
    ARGUMENTS_AND_RESULTS,
    CUDNN_FORWARD,
    CUDNN_FORWARD_2_14,
    FORWARD,
    FORWARD_2_12,
)

import fa4_ext

LIBRARY = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
EXPLAIN = "explain"


def known(op: str) -> tuple[tuple[int, ...], int]:
    """Returns the numbers of arguments, in any torch, and of results."""
    arguments, results = ARGUMENTS_AND_RESULTS[op]
    in_any_torch = {
        "_flash_attention_forward": (FORWARD, FORWARD_2_12),
        "_cudnn_attention_forward": (CUDNN_FORWARD, CUDNN_FORWARD_2_14),
    }.get(op, (arguments,))
    return tuple(text.count(", ") + 1 for text in in_any_torch), len(results)


KNOWN = {op: known(op) for op in ARGUMENTS_AND_RESULTS} | {EXPLAIN: ((25,), 6)}
MOST = 26

CODE = """
import ctypes, json, sys, torch

library, ours = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
assert ours.fa4_ext_register() == 0
# What gets past the check raises a reason, too.
assert ours.fa4_ext_set_option(b"strict", 1) == 0
ops = torch.library.Library("lookalike", "DEF")
major, minor = map(int, torch.__version__.split(".")[:2])
version = ctypes.c_uint64(major << 56 | minor << 48)
x = torch.zeros(1, 16, 8, 64, dtype=torch.bfloat16)
VALUES = {"Tensor": x, "int": 16, "SymInt": 16, "float": 0.0, "bool": False,
          "List[bool]": 4 * [False]}
# The seed of our own forward begins behind its memory's first two numbers.
BACKWARD = {"philox_seed": torch.zeros(3)[2], "cum_seq_q": None, "cum_seq_k": None}


def error(op, name, schema):
    ops.define(name + schema)
    assert library.look_alike(op.encode(), name.encode(), version) == 0
    other = getattr(torch.ops.lookalike, name).default
    try:
        wanted = [a for a in other._schema.arguments if not a.kwarg_only]
        named = BACKWARD if "backward" in op else {}
        values = (named[a.name] if a.name in named else VALUES.get(str(a.type)) for a in wanted)
        return "returned " + str(other(*values))
    except RuntimeError as error:
        return str(error).splitlines()[0]


for op, name, schema in json.loads(sys.stdin.readline()):
    print(json.dumps([name, error(op, name, schema)]))
"""


@pytest.fixture(scope="module")
def lookalikes(tmp_path_factory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("lookalikes") / "liblookalikes.so"
    source = Path(__file__).with_name("lookalikes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def name(op: str, inputs: int, outputs: int) -> str:
    return f"{op}_{inputs}_{outputs}"


@pytest.fixture(scope="module")
def errors(lookalikes) -> dict[str, str]:
    """Returns what the overrides raise behind ops with every number of arguments, one result more,
    and this torch's own schema."""
    cases = []
    for op, (known, outputs) in KNOWN.items():
        # The first of them brings the call to the override.
        for count in range(1, MOST):
            for results in (outputs, outputs + 1) if count in known else (outputs,):
                arguments = ", ".join(
                    f"Tensor x{i}" if i < 3 else f"int x{i}" for i in range(count)
                )
                if (count, results) not in [(number, outputs) for number in known]:
                    cases.append(
                        (
                            op,
                            name(op, count, results),
                            f"({arguments}) -> ({', '.join(['Tensor'] * results)})",
                        )
                    )
        if op != EXPLAIN:
            schema = str(getattr(torch.ops.aten, op).default._schema)
            cases.append((op, op, schema[schema.index("(") :]))
    code = ["-c", CODE, str(lookalikes), str(LIBRARY)]
    done = python(*code, LD_PRELOAD=str(lookalikes), asked=json.dumps(cases) + "\n")
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr}"
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("op", KNOWN)
def test_other_numbers_of_arguments_are_an_error(errors, op):
    known, outputs = KNOWN[op]
    for count in set(range(1, MOST)) - set(known):
        assert errors[name(op, count, outputs)] == message(op, count, outputs)


@pytest.mark.parametrize("op", KNOWN)
def test_other_numbers_of_results_are_an_error(errors, op):
    known, outputs = KNOWN[op]
    for count in known:
        assert errors[name(op, count, outputs + 1)] == message(op, count, outputs + 1)


def message(op: str, inputs: int, outputs: int) -> str:
    known, results = KNOWN[op]
    return (
        f"this torch has {inputs} arguments and {outputs} results for {op}, fa4_ext knows "
        f"{' or '.join(map(str, known))} arguments "
        f"and {results} results: it needs a newer fa4_ext"
    )


@pytest.mark.parametrize("op", [op for op in KNOWN if op != EXPLAIN])
def test_this_torch_s_own_schema_gets_to_the_override(errors, op):
    """This call takes the same detour, so the errors above come from the numbers alone."""
    assert errors[op].startswith(f"FA4 {op} unsupported: "), errors[op]
