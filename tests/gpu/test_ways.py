"""Who runs each way of calling attention, as the table in docs/support.md says."""

from __future__ import annotations

import pytest
import torch
from cases import BLACKWELL
from profiling import providers_of
from ways import CUDNN, EFFICIENT, MATH, NEVER, OURS, VERSIONS, WAYS

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
PROVIDERS = {OURS: "ours", CUDNN: "cudnn", EFFICIENT: "efficient"}


@pytest.mark.skipif(VERSION not in VERSIONS, reason="the table does not show this torch")
@pytest.mark.skipif(BLACKWELL, reason="the table is of Hopper")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_who_runs_it(way, lenient):
    expected = way.runs_in(VERSION)
    if expected == NEVER:
        pytest.skip("this torch has no such call")
    ran = providers_of(way.make()) - {"other"}
    assert ran == ({PROVIDERS[expected]} if expected != MATH else set()), ran
