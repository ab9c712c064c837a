"""A short run of tests/gpu/fuzz: random calls against fp32 or against PyTorch's own kernel.
FA4_FUZZ_COUNT: how many."""

from __future__ import annotations

import os

from fuzz.engine import Engine
from fuzz.generate import cases
from fuzz.runner import run_cases

COUNT = int(os.environ.get("FA4_FUZZ_COUNT", 2000))


def test_random_calls(seed):
    """A failure prints its case: python tests/gpu/fuzz --case "Case(...)" runs it alone."""
    report = run_cases(seed, cases(seed, COUNT), Engine())
    print(report.text())
    assert not report.failures, report.text()
    assert report.total("ours") > COUNT / 3, report.text()
