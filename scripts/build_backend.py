"""setuptools' PEP 517 backend, with requirements/build.txt as the one list of what a wheel is built with."""

from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

REQUIREMENTS = Path(__file__).parent.parent / "requirements" / "build.txt"


def get_requires_for_build_wheel(config_settings=None):
    lines = (line.partition(" #")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    listed = [line for line in lines if line and not line.startswith(("#", "-"))]
    return [*build_meta.get_requires_for_build_wheel(config_settings), *listed]
