"""Fixtures of the GPU suite. It runs against whatever `fa4_ext` is installed and imports nothing
else of the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# The helpers next to this file are found so under every import mode of pytest.
sys.path.insert(0, str(HERE))


def _missing() -> str | None:
    """Returns why the suite can't run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability[0] not in (9, 10):
        return (
            f"compute capability {capability[0]}.{capability[1]}: the kernels are for 9.0 and 10.x"
        )
    return None


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: needs a Hopper or Blackwell GPU and an installed fa4_ext"
    )


def pytest_collection_modifyitems(items):
    ours = [item for item in items if HERE in item.path.parents]
    reason = _missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header():
    if _missing():
        return None
    import fa4_ext

    device = torch.cuda.get_device_properties(0)
    return [
        f"device: {device.name}, {device.major}.{device.minor}, torch {torch.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}",
        f"fa4_ext: {fa4_ext.__file__}, {fa4_ext.build_info()}",
    ]


@pytest.fixture(autouse=True)
def seed():
    """Draws fresh random inputs in every run. A failure shows the seed, and FA4_TEST_SEED repeats
    it."""
    value = int(os.environ.get("FA4_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FA4_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def plain_settings():
    """Switches the settings that change results off before a test and after it. Only what a test
    registers is registered."""
    import fa4_ext

    if fa4_ext.default_handle:
        fa4_ext.default_handle.remove()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def strict():
    """Runs our kernels or raises an error: a silent fallback to stock can't pass a test, however
    short its problem is."""
    import fa4_ext

    with fa4_ext.register(fallback="error", speed_rules=False) as handle:
        yield handle


@pytest.fixture
def lenient():
    """Registers as users do: what our kernels don't cover goes to stock."""
    import fa4_ext

    with fa4_ext.register(fallback="stock") as handle:
        yield handle


@pytest.fixture(autouse=True)
def memory_for_others():
    """Gives memory back that a large test leaves in the cache: several processes may share a
    GPU."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2 << 30:
        torch.cuda.empty_cache()
