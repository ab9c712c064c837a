"""This is setuptools' PEP 517 backend with our requirements: a wheel is built with what
requirements/torch.in and build.in list. The hashes of build.txt have no place in what a backend can
ask for."""

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
