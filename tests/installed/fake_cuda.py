"""Plays a CUDA that comes up when told, and torch's first choice of a backend, on a machine without
one."""

from __future__ import annotations

import torch

from fa4_ext import _sdpa_order

MATH, FLASH, EFFICIENT, CUDNN, OVERRIDEABLE = 0, 1, 2, 3, 4
CUDNN_FIRST = [CUDNN, FLASH, EFFICIENT, MATH, OVERRIDEABLE]


class Cuda:
    """A CUDA whose first choice overwrites the order once."""

    def __init__(self, monkeypatch):
        self.up = False
        self.queue = []
        self.chosen = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.up)
        monkeypatch.setattr(
            torch.cuda, "_lazy_call", lambda call: call() if self.up else self.queue.append(call)
        )
        monkeypatch.setattr(_sdpa_order, "_make_first_choice", self.choose)

    def choose(self):
        if not self.chosen:
            self.chosen = True
            torch._C._set_sdp_priority_order(CUDNN_FIRST)

    def start(self):
        for call in self.queue:
            call()
        self.up = True
