"""python -m fa4_ext bench end to end on problems that take seconds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fresh_process import run_script

from fa4_ext.bench import masks, throughput
from fa4_ext.bench.contenders import contenders
from fa4_ext.bench.correctness import MAX_RELATIVE_ERROR
from fa4_ext.bench.session import session
from fa4_ext.bench.shapes import DIRECTIONS, square

TINY = """
    from fa4_ext.__main__ import main
    from fa4_ext.bench.grids import GRIDS, Grid
    from fa4_ext.bench.shapes import Shape, packed, square

    shapes = (
        square(2, 4, 256, 64, True, name="dense"),
        square(2, 4, 200, 128, False, heads_kv=1, name="grouped"),
        packed(4, 2, 128, True, (100, 28, 129), name="varlen"),
        Shape(2, 4, 2, 16, 300, 128, False, name="decode"),
    )
    GRIDS["gqa"] = Grid("tiny", shapes)
    options = ["--grid", "gqa", "--contenders", "ours,stock,cudnn", "--rounds", "3", "--host"]
    assert main(["bench", *options, "--dtype", "{dtype}", "--json", "{path}"]) == 0
"""


MASKS = """
    from dataclasses import replace
    from fa4_ext.__main__ import main
    from fa4_ext.bench import masks
    from fa4_ext.bench.grids import GRIDS
    from fa4_ext.bench.shapes import square

    shapes = tuple(square(3, 4, 1300, 64, False, name=mask, mask=mask) for mask in masks.KINDS)
    GRIDS["masks"] = replace(GRIDS["masks"], shapes=shapes)
    assert main(["bench", "--grid", "masks", "--rounds", "3", "--json", "{path}"]) == 0
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_tiny_grid_end_to_end(tmp_path, dtype):
    text = run_script(TINY.format(dtype=dtype, path=tmp_path / "out.json"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert "ours over stock: " in text and "CUDA graph nodes of a call" in text, text
    assert result["header"]["matmul_tflops"] > 0 and set(result["header"]["versions"]) == {
        "ours",
        "stock",
        "cudnn",
    }
    names = [
        f"{shape} {direction}"
        for shape in ("dense", "grouped", "varlen", "decode")
        for direction in DIRECTIONS
    ]
    assert [row["name"] for row in result["throughput"]] == names
    for row in result["throughput"]:
        for who in ("ours", "stock"):
            measured = row["results"][who]
            assert "error" not in measured, f"{who}, {row['name']}: {measured['error']}"
            assert measured["ms"] > 0 and measured["tflops"] > 0 and measured["captured"], (
                f"{who}, {row['name']}: {measured}"
            )
            assert 0 < measured["relative_error"] <= MAX_RELATIVE_ERROR[dtype], (
                f"{who}, {row['name']}: {measured}"
            )
        assert row["speed_of_ours"]["stock"] > 0
        assert ("cudnn" in row["results"]) == (row["layout"] == "dense"), (
            f"{row['name']}: {sorted(row['results'])}"
        )
    assert [row["name"].split(" ", 4)[4] for row in result["host"]] == [
        "forward",
        "forward+backward",
    ] * 2
    for row in result["host"]:
        nodes = row["graph_nodes"]["ours"]
        assert row["us"]["ours"] > 0 and (nodes > 1 if "backward" in row["name"] else nodes == 1), (
            row
        )


def test_a_wrong_contender_is_reported_and_the_others_are_timed(capsys):
    ours, stock = contenders(["ours", "stock"])
    wrong = replace(stock, name="wrong", dense=lambda *arguments: 1.05 * stock.dense(*arguments))
    shape = square(2, 4, 256, 64, True, name="small")
    with session():
        rows = throughput.measure([ours, wrong], [shape], DIRECTIONS, "bf16", 3)
    for row in rows:
        assert "ms" in row["results"]["ours"], row["results"]
        assert "wrong: relative error" in row["results"]["wrong"]["error"], row["results"]
    assert capsys.readouterr().err.count("wrong, small") == 2


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="kernels with a bias are Hopper's",
)
def test_masks_end_to_end(tmp_path):
    """Every contender is right, but perhaps cuDNN, and is given what it can run."""
    run_script(MASKS.format(path=tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["throughput"]
    assert {row["mask"] for row in rows} == set(masks.KINDS) and len(rows) == 2 * len(masks.KINDS)
    for row in rows:
        found = row["results"]
        assert {"ours", "cudnn", "efficient"} <= set(found), row
        assert ("unmasked" in found) == (row["mask"] not in (masks.PREFIX, masks.SLOPES)), row
        assert all("ms" in measured for who, measured in found.items() if who != "cudnn"), row
