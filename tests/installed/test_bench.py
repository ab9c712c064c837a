"""python -m fa4_ext bench without a GPU: its options, its grids, and every output from a result
that no GPU made."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import bench_results
import pytest
import torch
import torch.nn.functional as F
from processes import python, run

from fa4_ext import __main__ as command_line
from fa4_ext.bench import compare, contenders, figure, results, table, throughput
from fa4_ext.bench.grids import GRIDS, MICROSECONDS
from fa4_ext.bench.shapes import DIRECTIONS, Shape, packed, square
from fa4_ext.bench.timing import Prepared, in_turns

NAMES = (
    "paper", "paper-gqa", "dims", "llama", "vit", "decode", "varlen", "short", "gqa", "masks",
)  # fmt: skip
SHAPES = [
    pytest.param(shape, id=f"{name}: {shape.name}")
    for name, grid in GRIDS.items()
    for shape in grid.shapes
]


@pytest.fixture
def bench(output):
    """Returns what the command prints."""
    return lambda *arguments: output("bench", *map(str, arguments))


@pytest.fixture
def refused(error):
    """Returns what the command says about wrong usage."""
    return lambda *arguments: error("bench", *map(str, arguments))


@pytest.fixture
def saved(tmp_path):
    """Returns the file of a result."""

    def saved(name: str = "result.json", **options) -> Path:
        results.save(bench_results.result(**options), str(tmp_path / name))
        return tmp_path / name

    return saved


def test_without_a_device_it_says_so_in_one_sentence_and_fails():
    done = python("-m", "fa4_ext", "bench")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "python -m fa4_ext bench: no CUDA device is available: measuring needs one"
    ]


def test_importing_fa4_ext_and_other_commands_leave_its_modules_alone():
    code = """
        import sys
        import fa4_ext, fa4_ext.__main__
        fa4_ext.__main__.main(["status"])
        print([name for name in sys.modules if name.startswith(("fa4_ext.bench", "matplotlib"))])
    """
    assert run(code).stdout.splitlines()[-1] == "[]"


def test_help_names_every_grid_and_contender(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["bench", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*GRIDS, *contenders.KNOWN):
        assert any(line.startswith(f"  {name} ") for line in lines), f"{name} is not in the help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--grid", "tall"],
            "argument --grid: 'tall' is none of paper, paper-gqa, dims, llama, vit, decode, "
            "varlen, short, gqa, masks",
        ),
        (
            ["--grid", "decode", "--op", "backward"],
            "argument --op: grid decode has the forward alone",
        ),
        (["--op", "sideways"], "argument --op: invalid choice: 'sideways'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--rounds", "0"], "argument --rounds: '0' is not a number from 1 on"),
        (
            ["--json", "nowhere/out.json"],
            "nowhere/out.json could not be written: there is no folder nowhere",
        ),
        (
            ["--csv", "nowhere/out.csv"],
            "nowhere/out.csv could not be written: there is no folder nowhere",
        ),
        (["--figure", "out.gif"], "argument --figure: out.gif must end in .png, .svg, .pdf"),
        (["--from", "nowhere.json"], "argument --from: nowhere.json could not be read: "),
        (["--compare", "nowhere.json"], "argument --compare: nowhere.json could not be read: "),
    ],
)
def test_wrong_usage_says_what_is_wrong_before_anything_is_measured(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no result of this command: it has no header, grid, contenders, throughput"),
        (
            '{"header": {}, "grid": "paper"}',
            "is no result of this command: it has no contenders, throughput",
        ),
        (
            '{"header": {}, "grid": "tall", "contenders": {}, "throughput": []}',
            "is of grid 'tall', which is none of paper,",
        ),
        ("{", "could not be read: "),
    ],
    ids=["list", "incomplete", "grid", "no_json"],
)
def test_a_file_that_is_no_result_is_refused(refused, tmp_path, content, message):
    (tmp_path / "other.json").write_text(content)
    assert message in refused("--from", tmp_path / "other.json")


def test_contenders_are_taken_by_name_and_in_that_order():
    assert [contender.name for contender in contenders.contenders(["stock", "ours"])] == [
        "stock",
        "ours",
    ]
    with pytest.raises(
        ValueError, match="argument --contenders: 'fa5' is none of ours, stock, cudnn, fa4, fa3, "
    ):
        contenders.contenders(["ours", "fa5"])


def test_a_contender_that_is_not_installed_is_left_out_or_named_as_missing(monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'flash_attn'")

    monkeypatch.setattr(contenders, "KNOWN", {"fa4": missing, "ours": contenders.KNOWN["ours"]})
    found = contenders.contenders(default=("fa4", "ours"))
    assert [contender.name for contender in found] == ["ours"]
    assert capsys.readouterr().err == "fa4 is left out: No module named 'flash_attn'\n"
    with pytest.raises(
        ValueError, match="argument --contenders: fa4 can't be had: No module named 'flash_attn'"
    ):
        contenders.contenders(["fa4"])


def test_the_grids_are_all_there_with_unique_names():
    assert tuple(GRIDS) == NAMES
    for name, grid in GRIDS.items():
        shapes = [shape.name for shape in grid.shapes]
        assert len(set(shapes)) == len(shapes) >= 8, f"{name}: {shapes}"
        assert 2 <= len(grid.part(quick=True)) < len(shapes) and set(grid.part(quick=True)) < set(
            grid.shapes
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_problem_is_one_that_the_kernels_can_run(shape):
    assert shape.head_dim % 8 == 0 and shape.head_dim <= 256
    assert shape.heads % shape.heads_kv == 0
    assert not shape.causal or shape.seqlen_q == shape.seqlen_k, (
        "F.scaled_dot_product_attention aligns such a mask top-left"
    )
    assert not shape.lengths or len(shape.lengths) == shape.batch
    assert shape.bytes <= 5 << 30, f"{shape.bytes} bytes of q, k and v"


@pytest.mark.parametrize("name", ["paper", "dims"])
def test_the_paper_s_grids_have_16k_tokens_and_every_length_with_and_without_mask(name):
    shapes = GRIDS[name].shapes
    assert {shape.batch * shape.seqlen_q for shape in shapes} == {16384}
    assert all(2048 - shape.head_dim < shape.heads * shape.head_dim <= 2048 for shape in shapes)
    every = {(shape.head_dim, shape.causal, shape.seqlen_q) for shape in shapes}
    dims, lengths = {dim for dim, _, _ in every}, {length for _, _, length in every}
    assert len(every) == len(shapes) == len(dims) * 2 * len(lengths)
    if name == "paper":
        assert (dims, lengths) == ({64, 128}, {512, 1024, 2048, 4096, 8192, 16384})


@pytest.mark.parametrize(
    ("shape", "forward"),
    [
        (square(2, 3, 8, 64, False), 4 * 2 * 3 * 64 * 64),
        (square(2, 3, 8, 64, True), 4 * 2 * 3 * 64 * 32),
        (square(2, 8, 8, 64, False, heads_kv=2), 4 * 2 * 8 * 64 * 64),
        (Shape(2, 3, 3, 2, 10, 64, False), 4 * 2 * 3 * 64 * 20),
        (packed(3, 3, 64, False, (2, 4)), 4 * 3 * 64 * (4 + 16)),
        (packed(3, 3, 64, True, (2, 4)), 4 * 3 * 64 * (2 + 8)),
    ],
    ids=["full", "causal", "grouped", "decode", "varlen", "varlen_causal"],
)
def test_operations_of_a_problem(shape, forward):
    assert [shape.flops(direction) for direction in DIRECTIONS] == [forward, 2.5 * forward]


def test_contenders_take_turns_in_every_round():
    calls = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def ms(self):
            calls.append(self.name)
            return float(len(calls))

    times = in_turns({name: Recorded(name) for name in ("a", "b", "c")}, 6)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds), rounds
    assert any(one != other for one, other in pairwise(rounds)), f"always in the order {rounds[0]}"
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}


SMALL = (
    square(2, 4, 32, 16, True, heads_kv=2, name="dense"),
    packed(4, 2, 16, True, (7, 30, 3), name="varlen"),
)


def by_math(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def by_math_varlen(q, k, v, cu_seqlens, longest, causal):
    assert cu_seqlens.diff().max() == longest
    pieces = zip(*(t.split(cu_seqlens.diff().tolist()) for t in (q, k, v)), strict=True)
    return torch.cat(
        [by_math(*(t.transpose(0, 1) for t in piece), causal).transpose(0, 1) for piece in pieces]
    )


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Puts inputs on the CPU, without graphs. A round is as many milliseconds as its contender's
    name has letters."""
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *sizes, **options: randn(*sizes, **options | {"device": "cpu"})
    )
    tensor = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda data, **options: tensor(data, **options | {"device": "cpu"})
    )
    monkeypatch.setattr(
        throughput, "prepare", lambda call, *_: Prepared(None, 1, False, call(0), call)
    )
    monkeypatch.setattr(
        throughput,
        "in_turns",
        lambda ready, rounds: {name: [float(len(name))] * rounds for name in ready},
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_rows_have_times_of_those_who_are_right_and_reasons_of_the_others(capsys):
    # The error of so few rows is mostly 3e-3, but not in every draw.
    torch.manual_seed(0)
    ours = contenders.Contender("ours", "a", "1", by_math, by_math_varlen)
    other = contenders.Contender("others", "b", "1", by_math, None, has_backward=False)
    wrong = contenders.Contender(
        "wrong", "c", "1", lambda *arguments: 1.05 * by_math(*arguments), None
    )
    rows = throughput.measure([ours, other, wrong], SMALL, DIRECTIONS, "bf16", 3)
    assert [row["name"] for row in rows] == [
        "dense forward",
        "dense backward",
        "varlen forward",
        "varlen backward",
    ]
    assert [sorted(row["results"]) for row in rows] == [
        ["others", "ours", "wrong"],
        ["ours", "wrong"],
        ["ours"],
        ["ours"],
    ]
    for row, shape in zip(rows, (SMALL[0], SMALL[0], SMALL[1], SMALL[1]), strict=True):
        found = row["results"]["ours"]
        assert (found["ms"], found["spread"], found["captured"]) == (4.0, 0.0, False)
        assert found["tflops"] == shape.flops(row["direction"]) / 4e-3 / 1e12
        assert 0 < found["relative_error"] < 1e-2
    assert all("wrong: relative error" in row["results"]["wrong"]["error"] for row in rows[:2])
    assert [row["speed_of_ours"] for row in rows] == [{"others": 1.5}, {}, {}, {}]
    assert capsys.readouterr().err.count("not timed: wrong") == 2


def test_the_table_has_header_rows_and_summary(bench, saved):
    lines = bench("--from", saved()).splitlines()
    assert lines[:9] == [
        "device      NVIDIA H200, driver 580.159.04",
        "clocks      SM 1905 MHz of 1980 MHz, memory 3201 MHz, power limit 700.00 W",
        "torch       2.11.0+cu130, CUDA 13.0, cuDNN 9.19",
        "fa4_ext     version 0.1.0, commit 0123456789abcdef",
        "contenders  ours 0.1.0, stock 2.11.0+cu130, cudnn 9.19",
        "ceiling     780.7 TFLOP/s, an 8192^3 bf16 matrix product in this process",
        "rounds      7, contenders in random order in each; inputs rotate, so that none is found "
        "in L2",
        "date        2026-11-22",
        "",
    ]
    assert lines[9].split() == [
        "TFLOP/s",
        "(spread",
        "of",
        "the",
        "rounds)",
        "ours",
        "stock",
        "cudnn",
    ]
    assert lines[10].split() == [
        "hd64",
        "s512",
        "full",
        "forward",
        "500",
        "(1.2%)",
        "250",
        "(1.2%)",
        "failed",
    ]
    assert lines[11].split() == [
        "hd64",
        "s512",
        "full",
        "backward",
        "500",
        "(1.2%)",
        "250",
        "(1.2%)",
        "400",
        "(1.2%)",
    ]
    assert len({len(line) for line in lines[9:58]}) == 1 and lines[58] == ""
    assert lines[59:61] == [
        "ours over stock: 2.000 in geometric mean, 2.000 at worst (hd64 s512 full forward)",
        "ours over cudnn: 1.250 in geometric mean, 1.250 at worst (hd64 s512 full backward)",
    ]
    assert (
        lines[61] == "cudnn failed at 1 of 48 rows, first hd64 s512 full forward: "
        f"{bench_results.FAILED['error']}"
    )
    assert len(lines) == 62


def test_the_table_of_host_times_and_graph_nodes(bench, saved):
    *_, us, first, _, nodes, second = bench("--from", saved(host=True)).splitlines()
    assert us.split()[-3:] == nodes.split()[-3:] == ["ours", "stock", "cudnn"]
    assert us.startswith("host microseconds a call ") and first.split()[-3:] == [
        "10.9",
        "12.8",
        "-",
    ]
    assert nodes.startswith("CUDA graph nodes of a call ") and second.split()[-3:] == [
        "1",
        "2",
        "3",
    ]


def test_a_grid_of_few_operations_is_shown_in_microseconds(bench, saved):
    lines = bench("--from", saved(grid="decode")).splitlines()
    found = bench_results.result("decode")["throughput"][1]
    assert GRIDS["decode"].unit == MICROSECONDS and any(
        line.startswith("us (spread of the rounds) ") for line in lines
    )
    (row,) = (line for line in lines if line.startswith(found["name"]))
    assert (
        row.removeprefix(found["name"]).split()[0] == f"{1e3 * found['results']['ours']['ms']:.1f}"
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_json_comes_back_as_it_was(bench, saved, tmp_path, grid):
    bench("--from", saved(grid=grid, host=True), "--json", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(
        json.dumps(bench_results.result(grid, host=True))
    )


@pytest.mark.parametrize("grid", ["paper", "varlen"])
def test_csv_has_a_line_for_each_row_and_contender(bench, saved, tmp_path, grid):
    bench("--from", saved(grid=grid), "--csv", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = bench_results.result(grid)["throughput"]
    assert [(line["name"], line["contender"]) for line in lines] == [
        (row["name"], who) for row in rows for who in row["results"]
    ]
    first, row = lines[0], rows[0]
    assert (first["grid"], first["dtype"], first["layout"]) == (grid, "bf16", row["layout"])
    assert [int(first[key]) for key in ("batch", "heads", "heads_kv", "seqlen_q", "head_dim")] == [
        row[key] for key in ("batch", "heads", "heads_kv", "seqlen_q", "head_dim")
    ]
    assert float(first["ms"]) == row["results"]["ours"]["ms"] and first["error"] == ""
    failed = [line for line in lines if line["error"]]
    assert [(line["contender"], line["ms"]) for line in failed] == (
        [("cudnn", "")] if grid == "paper" else []
    )


def test_compare_prints_the_old_time_over_the_new_one_and_a_summary(bench, saved):
    text = bench("--from", saved("new.json"), "--compare", saved("old.json", speed=400e12))
    lines = text[text.index("old time over new time") :].splitlines()
    assert lines[1].split() == ["hd64", "s512", "full", "forward", "1.250", "1.250", "-"]
    assert lines[2].split() == ["hd64", "s512", "full", "backward", "1.250", "1.250", "1.250"]
    assert "ours: 1.250 in geometric mean over 48 rows, 1.250 at worst (" in lines[-3]
    assert "cudnn: 1.250 in geometric mean over 47 rows" in lines[-1]


def test_compare_counts_common_rows_and_names_what_else_differs():
    old, new = bench_results.result("paper"), bench_results.result("paper", speed=600e12)
    old["throughput"] = old["throughput"][1:3]
    old["header"] = old["header"] | {"torch": "2.12.0"}
    assert {row: round(of_row["ours"], 6) for row, of_row in compare.ratios(old, new).items()} == {
        "hd64 s512 full backward": 1.2, "hd64 s1024 full forward": 1.2,
    }  # fmt: skip
    assert (
        compare.text(old, new).splitlines()[-1]
        == "not the same torch: old 2.12.0, new 2.11.0+cu130"
    )


def test_compare_with_another_grid_says_that_nothing_is_common(bench, saved):
    text = bench("--from", saved("new.json"), "--compare", saved("old.json", grid="gqa"))
    assert text.splitlines()[-1] == "The two results have no row in common."


def test_a_figure_without_matplotlib_is_refused_with_what_to_install(refused, monkeypatch):
    monkeypatch.setattr(figure, "find_spec", lambda name: None)
    message = (
        "argument --figure: matplotlib is not installed; it is with: python -m pip install "
        "matplotlib"
    )
    assert message in refused("--figure", "out.png")


@pytest.mark.parametrize("grid", GRIDS)
def test_figures_are_written_in_every_format_that_is_asked_for(bench, saved, tmp_path, grid):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{grid}.png", tmp_path / f"{grid}.svg"]
    bench("--from", saved(grid=grid), "--figure", ",".join(map(str, paths)))
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[0].stat().st_size > 10_000
    text = paths[1].read_text()
    assert "<svg" in text and "</svg>" in text


def test_no_cell_of_a_table_is_glued_to_the_next():
    assert table.columns(
        "title", ["a", "long name"], [("row", ["1", "2"]), ("longer row", ["333", "4"])]
    ) == [
        "title         a  long name",
        "row           1          2",
        "longer row  333          4",
    ]
