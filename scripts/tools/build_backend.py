"""Wraps setuptools' PEP 517 backend, so that a wheel is built with the packages of
requirements/torch.in and build.in. A backend can only ask for requirements, so the hashes of
build.txt are not checked."""

from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

REQUIREMENTS = Path(__file__).parents[2] / "requirements"


def get_requires_for_build_wheel(config_settings=None):
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *listed("torch"),
        *listed("build"),
    ]


def listed(name):
    lines = (
        line.partition("#")[0].strip()
        for line in (REQUIREMENTS / f"{name}.in").read_text().splitlines()
    )
    return [line for line in lines if line]
