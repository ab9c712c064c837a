"""Fixtures of the tests that need no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    """Returns tests/fake_device, compiled."""
    # It is not imported above, because the GPU suite passes here too, from wherever it lies.
    import fake_device

    return fake_device.compiled(tmp_path_factory.mktemp("fake_device"))
