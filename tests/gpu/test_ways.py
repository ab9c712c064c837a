"""Who runs each way of calling attention, as the table in docs/support.md says."""

from __future__ import annotations

import pytest
import torch
from cases import BLACKWELL
from profiling import providers_of
from ways import MIXED, NEVER, NOT_RUN, OURS, VERSIONS, WAYS

import fa4_ext

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(VERSION not in VERSIONS, reason="the table does not show this torch")
@pytest.mark.skipif(BLACKWELL, reason="the table is of Hopper")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_who_runs_it(way):
    """Speed rules may leave a way's example to PyTorch; the table is about who can run it."""
    expected = way.runs_in(VERSION)
    if expected in (NEVER, NOT_RUN):
        pytest.skip(f"the table says {expected}")
    with fa4_ext.register(speed_rules=False):
        ran = providers_of(way.make()) - {"other"}
    assert ("ours" in ran) == (expected in (OURS, MIXED)), ran
    if "ours" in ran:
        assert bool(ran - {"ours"}) == (expected == MIXED), ran
