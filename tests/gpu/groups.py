"""Runs the kernel that works on groups of heads together where another would run, too. Of what is
small enough for a test the planner gives it short packed sequences alone."""

from __future__ import annotations

from contextlib import contextmanager

import fa4_ext

# Hopper's other kernels of grouped heads and full or causal masks.
OTHERS = ("sm90_backward_*_full_gqa_m*", "sm90_backward_*_causal_gqa_m*")


@contextmanager
def groups_alone():
    with fa4_ext.register(fallback="error", speed_rules=False, disable=OTHERS):
        yield
