"""python -m fa4_ext on a machine without a GPU."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from processes import QUIET, python, run

import fa4_ext
from fa4_ext import __main__ as command_line
from fa4_ext import _cli_kernels, _cli_status, _cli_text, _dispatcher

ARCHS = fa4_ext.build_info()["archs"]
DEVICE = f"sm{ARCHS[0]}"
CAPABILITY = {90: (9, 0), 100: (10, 0)}[ARCHS[0]]
EXPLANATION = ["supported", "kernel", "reason", "tile", "workspace_bytes", "fallback"]
KERNEL = [
    "name",
    "arch",
    "op",
    "dtype",
    "head_dim",
    "head_dim_v",
    "registers",
    "spill_bytes",
    "shared_memory_bytes",
    "object_bytes",
]
STATUS = [
    "version",
    "torch",
    "devices",
    "build",
    "kernels",
    "registration",
    "dispatcher",
    "problems",
]


def command(*arguments: str, **environment: str) -> str:
    """Runs the command in a process of its own."""
    result = python("-m", "fa4_ext", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def explained(output):
    """Returns explain's JSON."""

    def explained(*arguments: str) -> dict:
        return json.loads(output("explain", "--device", DEVICE, "--json", *arguments))

    return explained


def explain(
    query: tuple, key: tuple | None = None, dtype: torch.dtype = torch.bfloat16, **options
) -> fa4_ext.Explanation:
    query, key = (torch.empty(shape, dtype=dtype, device="meta") for shape in (query, key or query))
    return fa4_ext.explain(
        query,
        key,
        key,
        **{"deterministic": False, "device_capability": CAPABILITY, "enable_gqa": True} | options,
    )


def as_json(answer: fa4_ext.Explanation) -> dict:
    return json.loads(json.dumps(asdict(answer)))


@pytest.mark.parametrize("autoregister", ["", "0"])
def test_demo_shows_the_registration_and_the_plans_and_says_what_did_not_run(autoregister):
    text = command("demo", FA4_EXT_AUTOREGISTER=autoregister)
    during = [line for line in text.splitlines() if "during" in line]
    outside = [
        line.split(None, 1)
        for line in text.splitlines()
        if line.split(None, 1)[:1] in (["before"], ["after"])
    ]
    assert len(during) == len(_dispatcher.OPS) and all("fa4_ext" in line for line in during)
    assert [entry for when, entry in outside if when == "before"] == [
        entry for when, entry in outside if when == "after"
    ]
    for arch in ARCHS:
        assert f"runs sm{arch}_forward_" in text and f"runs sm{arch}_backward_" in text
    assert "left to PyTorch's own kernels: dropout_p must be 0" in text
    assert "Attention itself was NOT run" in text and "no CUDA device is available" in text


def test_status_names_versions_device_and_registration():
    text = command("status")
    assert "no CUDA device is available" in text and "active fallback='stock'" in text
    for value in ("0", "off"):
        assert f"none, FA4_EXT_AUTOREGISTER is {value}" in command(
            "status", FA4_EXT_AUTOREGISTER=value
        )
    assert max(map(len, text.splitlines())) <= 100


def test_status_as_json():
    status = json.loads(command("status", "--json"))
    assert list(status) == STATUS
    assert (status["version"], status["torch"], status["devices"]) == (
        fa4_ext.__version__,
        str(torch.__version__),
        [],
    )
    assert (status["build"], status["kernels"]) == (fa4_ext.build_info(), len(fa4_ext.kernels()))
    options = inspect.signature(fa4_ext.register).parameters.values()
    defaults = json.loads(json.dumps({option.name: option.default for option in options}))
    defaults["disable"] = []  # None stands for what FA4_EXT_DISABLE says
    assert status["registration"] == {"active": True} | defaults
    assert status["dispatcher"] == {f"aten::{op}": "fa4_ext:0" for op in _dispatcher.OPS}
    assert status["problems"] and all(isinstance(problem, str) for problem in status["problems"])
    assert json.loads(command("status", "--json", FA4_EXT_AUTOREGISTER="0"))["registration"] is None


def test_status_of_devices_and_without_a_library():
    found = json.loads(command("status", "--json")) | {
        "devices": [{"name": "NVIDIA H200", "compute_capability": [9, 0]}]
    }
    assert (
        "device        NVIDIA H200, compute capability 9.0" in _cli_status.text(found).splitlines()
    )
    bare = _cli_status.text(
        found
        | {"build": None, "kernels": None, "registration": None, "problems": ["it does not load"]}
    )
    assert "registration" not in bare and bare.splitlines()[-1] == "problem     it does not load"


def test_kernels_lists_every_kernel_and_the_totals(output):
    lines = output("kernels").splitlines()
    kernels = fa4_ext.kernels()
    assert [line.split()[0] for line in lines[1:-1]] == [kernel.name for kernel in kernels]
    size = _cli_text.readable_bytes(sum(kernel.object_bytes for kernel in kernels))
    assert lines[-1].startswith(f"{len(kernels)} kernels, {size} of objects")
    # The full matrix has names of 74 characters.
    assert max(map(len, lines)) <= 104 and len({len(line) for line in lines[:-1]}) == 1


def test_kernels_as_json(output):
    listed = json.loads(output("kernels", "--json"))
    assert listed["kernels"] == [asdict(kernel) for kernel in fa4_ext.kernels()]
    assert listed["count"] == len(fa4_ext.kernels())
    assert listed["object_bytes"] == sum(kernel.object_bytes for kernel in fa4_ext.kernels())
    assert list(listed["kernels"][0]) == KERNEL


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--arch", ARCHS[0], "arch"),
        ("--op", "backward", "op"),
        ("--dtype", "bf16", "dtype"),
        ("--head-dim", 128, "head_dim"),
    ],
)
def test_kernels_keeps_those_that_an_option_names(output, option, value, field):
    listed = json.loads(output("kernels", "--json", option, str(value)))["kernels"]
    assert listed == [
        asdict(kernel) for kernel in fa4_ext.kernels() if getattr(kernel, field) == value
    ]
    assert listed


def test_kernels_combines_options_and_takes_devices_for_arch(output):
    lines = output("kernels", "--arch", DEVICE, "--op", "forward", "--head-dim", "64").splitlines()
    assert (
        all(line.startswith(f"{DEVICE}_forward_") and "_d64_" in line for line in lines[1:-1])
        and len(lines) > 2
    )
    if 100 in ARCHS:
        assert output("kernels", "--arch", "sm103") == output("kernels", "--arch", "100")


def test_no_kernel_is_a_table_too():
    assert _cli_kernels.text([]).splitlines()[1].startswith("0 kernels, 0 B of objects")


def test_explain_prints_kernel_tile_and_workspace():
    text = command(
        "explain",
        "--q",
        "2x16x4096x128",
        "--kv-heads",
        "4",
        "--causal",
        "--dtype",
        "bf16",
        "--device",
        DEVICE,
    )
    forward, backward = (
        explain((2, 16, 4096, 128), (2, 4, 4096, 128), is_causal=True, backward=direction)
        for direction in (False, True)
    )
    assert text.splitlines() == [
        "F.scaled_dot_product_attention, bf16, causal, compute capability "
        f"{CAPABILITY[0]}.{CAPABILITY[1]}",
        "query 2x16x4096x128, key and value 2x4x4096x128",
        "",
        "forward",
        f"  kernel     {forward.kernel}",
        f"  tile       {forward.tile[0]} queries x {forward.tile[1]} keys",
        "  workspace  none",
        "",
        "backward",
        f"  kernel     {backward.kernel}",
        f"  tile       {backward.tile[0]} queries x {backward.tile[1]} keys",
        f"  workspace  {_cli_text.readable_bytes(backward.workspace_bytes)}",
    ]
    assert "_causal_gqa_" in backward.kernel


def test_explain_says_why_not_and_what_gets_the_call_instead(output):
    text = output("explain", "--q", "2x16x4096x128", "--dropout", "0.1", "--device", DEVICE)
    because = "  because  dropout_p must be 0\n  instead  cuDNN gets the call\n"
    assert text.count(because) == 2, text
    text = output("explain", "--q", "2x16x512x264", "--device", DEVICE)
    assert text.count("F.scaled_dot_product_attention takes this call neither to cuDNN nor") == 2
    assert max(map(len, text.splitlines())) <= 100


def test_explain_takes_a_value_head_dim_of_its_own(output):
    lines = output(
        "explain",
        "--q",
        "8192x16x128",
        "--v-head-dim",
        "64",
        "--sequences",
        "4",
        "--device",
        DEVICE,
    ).splitlines()
    assert (
        lines[1] == "query 8192x16x128, key 8192x16x128, value 8192x16x64, 4 sequences back to back"
    )
    assert "_d128_" in lines[4] and "_varlen_" in lines[4]
    text = output("explain", "--q", "2x16x512x128", "--v-head-dim", "64", "--device", DEVICE)
    assert text.count("_d128_dense_full") == 2, text


def test_explain_says_what_is_padded_first(output):
    text = output("explain", "--q", "2x16x4096x100", "--device", DEVICE)
    assert (
        text.count("  inputs     F.scaled_dot_product_attention pads head_dim 100 to 104 first\n")
        == 2
    )


def test_explain_as_json(explained):
    found = explained("--q", "2x16x4096x128", "--kv-heads", "4", "--causal")
    assert found["call"] == {
        "q": [2, 16, 4096, 128],
        "k": [2, 4, 4096, 128],
        "v": [2, 4, 4096, 128],
        "sequences": None,
        "dtype": "bf16",
        "causal": True,
        "window": [-1, -1],
        "dropout": 0.0,
        "deterministic": False,
        "compute_capability": list(CAPABILITY),
    }
    assert list(found) == ["call", "forward", "backward"] and list(found["forward"]) == EXPLANATION
    shapes = (2, 16, 4096, 128), (2, 4, 4096, 128)
    assert found["forward"] == as_json(explain(*shapes, is_causal=True))
    assert found["backward"] == as_json(explain(*shapes, is_causal=True, backward=True))


def test_names_of_the_json_are_in_the_help(capsys):
    for name, keys in (
        ("explain", [*EXPLANATION, "call", "forward", "backward"]),
        ("kernels", [*KERNEL, "kernels", "count"]),
        ("status", STATUS),
    ):
        with pytest.raises(SystemExit):
            command_line.main([name, "--help"])
        text = capsys.readouterr().out
        assert all(key in text for key in keys)


LONG, SHORT = (2, 16, 4096, 128), (2, 16, 512, 128)


@pytest.mark.parametrize(
    ("arguments", "q", "k", "options"),
    [
        (["--kv-len", "512"], LONG, SHORT, {}),
        (["--k", "2x16x512x128"], LONG, SHORT, {}),
        (["--k", "2x16x4096x64"], LONG, (2, 16, 4096, 64), {}),
        (["--causal"], LONG, LONG, {"is_causal": True}),
        (["--window", "256,0"], LONG, LONG, {"window_size": (256, 0)}),
        (["--window", "-1,0"], LONG, LONG, {"window_size": (-1, 0)}),
        (["--window", "all,0"], LONG, LONG, {"window_size": (-1, 0)}),
        (["--window=-1,-1"], LONG, LONG, {}),
        (["--dropout", "0.5"], LONG, LONG, {"dropout_p": 0.5}),
        (["--dtype", "fp32"], LONG, LONG, {"dtype": torch.float32}),
        (["--dtype", "fp16"], LONG, LONG, {"dtype": torch.float16}),
        (["--deterministic"], LONG, LONG, {"deterministic": True}),
        (["--device", "sm80"], LONG, LONG, {"device_capability": (8, 0)}),
        (["--device", "12.0"], LONG, LONG, {"device_capability": (12, 0)}),
        (["--q", "2,16,4096,128"], LONG, LONG, {}),
        (["--q", "[2, 16, 512, 128]"], SHORT, SHORT, {}),
    ],
)
def test_explain_reads_each_option(explained, arguments, q, k, options):
    found = explained("--q", "2x16x4096x128", *arguments)
    assert found["forward"] == as_json(explain(q, k, **options))
    assert found["backward"] == as_json(explain(q, k, backward=True, **options))


@pytest.mark.parametrize(
    ("arguments", "tokens_k", "heads_k"),
    [
        ([], 8192, 16),
        (["--kv-heads", "2"], 8192, 2),
        (["--kv-len", "65536"], 65536, 16),
        (["--k", "65536x2x128"], 65536, 2),
    ],
)
def test_explain_of_sequences_back_to_back(explained, arguments, tokens_k, heads_k):
    found = explained("--q", "8192x16x128", "--sequences", "4", "--causal", *arguments)
    starts = torch.empty(5, dtype=torch.int32, device="meta")
    lengths = {"cu_seqlens_q": starts, "max_seqlen_q": 2048, "max_seqlen_k": tokens_k // 4}
    answer = explain(
        (8192, 16, 128), (tokens_k, heads_k, 128), is_causal=True, backward=True, **lengths
    )
    assert found["backward"] == as_json(answer) and "_varlen_" in answer.kernel
    assert found["call"]["sequences"] == 4


@pytest.mark.parametrize(
    ("arguments", "title", "shapes"),
    [
        (
            ["--q", "8192x16x128", "--sequences", "4"],
            "torch.nn.attention.varlen, ",
            ", 4 sequences back to back",
        ),
        (
            ["--q", "2x16x4096x128", "--window", "all,0"],
            "aten::_flash_attention_forward, bf16, window all,0, ",
            "2x16x4096x128",
        ),
    ],
)
def test_explain_names_the_function_that_makes_such_a_call(output, arguments, title, shapes):
    first, second, *_ = output("explain", "--device", DEVICE, *arguments).splitlines()
    assert first.startswith(title) and second.endswith(shapes)


SHAPES = (
    "is not batch x heads x length x head_dim, such as 2x16x4096x128, or tokens x heads x "
    "head_dim, such as 8192x16x128"
)
Q = ("--q", "2x16x4096x128")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: command"),
        (("explain", "--q", "2x16", "--device", "sm90"), f"argument --q: '2x16' {SHAPES}"),
        (
            ("explain", *Q, "--k", "2x16x4096xD", "--device", "sm90"),
            f"argument --k: '2x16x4096xD' {SHAPES}",
        ),
        (
            ("explain", "--q", "9999999999x9999999999x9x9"),
            "more elements than a tensor can: at most 2**60 are",
        ),
        (
            ("explain", "--q", "8192x16x128"),
            "argument --q: 8192x16x128 is tokens x heads x head_dim of sequences back to back, and",
        ),
        (
            ("explain", *Q, "--sequences", "4"),
            "argument --q: 2x16x4096x128 is batch x heads x length x head_dim: with --sequences",
        ),
        (
            ("explain", *Q, "--k", "2x4x512x128", "--kv-len", "9"),
            "argument --k: 2x4x512x128 says what --kv-heads and --kv-len say",
        ),
        (
            ("explain", *Q, "--k", "512x4x128"),
            "argument --k: 512x4x128 has 3 sizes, --q 2x16x4096x128 has 4",
        ),
        (("explain", *Q, "--kv-heads", "0"), "argument --kv-heads: '0' is not a number from 1 on"),
        (
            ("explain", *Q, "--sequences", "-3"),
            "argument --sequences: '-3' is not a number from 1 on",
        ),
        (
            ("explain", *Q, "--window", "128"),
            "argument --window: '128' is not LEFT,RIGHT, such as 1024,0",
        ),
        (("explain", *Q, "--window", "-2,0"), "argument --window: '-2,0' is not LEFT,RIGHT"),
        (
            ("explain", *Q, "--dropout", "2"),
            "argument --dropout: '2' is not a probability from 0 to 1",
        ),
        (
            ("explain", *Q, "--dropout", "a"),
            "argument --dropout: 'a' is not a probability from 0 to 1",
        ),
        (
            ("explain", *Q, "--device", "hopper"),
            "argument --device: 'hopper' is not a device such as sm90",
        ),
        (("kernels", "--arch", "hopper"), "argument --arch: 'hopper' is not a device such as sm90"),
        (
            ("kernels", "--arch", "sm80"),
            f"argument --arch: 80 is in no kernel of this build, which has {ARCHS[0]}",
        ),
        (
            ("kernels", "--op", "sideways"),
            "argument --op: 'sideways' is in no kernel of this build, which has backward, ",
        ),
        (
            ("kernels", "--head-dim", "100"),
            "argument --head-dim: 100 is in no kernel of this build, which has 64, ",
        ),
        (("kernels", "--head-dim", "100"), "128's serve 100"),
        (
            ("explain", *Q, "--device", "sm00"),
            "argument --device: 'sm00' is not a device such as sm90",
        ),
        (
            ("explain", *Q, "--kv-len", "9" * 12, "--kv-heads", "9" * 12),
            "more elements than a tensor can: at most 2**60 are",
        ),
        (
            ("bench", "--from", "x.json", "--grid", "vit", "--quick"),
            "measures nothing, so --grid, --quick would have no effect",
        ),
        (
            ("bench", "--from", "benchmarks", "--json", "."),
            ". could not be written: it is a folder",
        ),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_what_is_allowed(error, arguments, message):
    assert message in error(*arguments)


def test_without_a_device_explain_asks_for_one():
    result = python("-m", "fa4_ext", "explain", *Q)
    assert (
        result.returncode == 2
        and "name one with --device" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert result.stderr.startswith("usage: python -m fa4_ext explain ")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (101_711_872, "97.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**53, "8192.0 TiB"),
    ],
)
def test_readable_bytes(count, text):
    assert _cli_text.readable_bytes(count) == text


def test_output_that_nobody_reads_ends_the_command_silently():
    code = (
        "import runpy, sys; sys.stdin.read(); sys.argv = ['fa4_ext', 'kernels']; "
        "runpy.run_module('fa4_ext', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", QUIET, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=120) == -signal.SIGPIPE, process.stderr.read()
    assert process.stderr.read() == ""
    process.stderr.close()


def test_the_import_brings_in_no_command():
    run(
        "import fa4_ext, sys\nassert not [name for name in sys.modules if "
        "name.startswith(('fa4_ext._cli', 'fa4_ext.__main__'))]"
    )
