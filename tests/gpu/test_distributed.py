"""PyTorch's ways to spread a model over GPUs, on two of them, against one device; attention runs on
our kernels or fails."""

from __future__ import annotations

import distributed_steps
import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_data_parallel(seed):
    """DistributedDataParallel under autocast: gradients and updated parameters are those of the
    whole batch."""
    run_ranks(distributed_steps.data_parallel, seed=seed)


def test_fully_sharded(seed):
    """FSDP2 in mixed precision: the same."""
    run_ranks(distributed_steps.fully_sharded, seed=seed)


@pytest.mark.parametrize("attention_on", ("tensors", "dtensors"))
def test_tensor_parallel(attention_on, seed):
    """Each rank has half of the heads, those of keys and values too."""
    run_ranks(distributed_steps.tensor_parallel, attention_on, seed=seed)


@pytest.mark.parametrize("rotate_method", ("allgather", "alltoall"))
@pytest.mark.parametrize(
    ("is_causal", "load_balance"),
    [(False, False), (True, False), (True, True)],
    ids=["full", "causal", "causal_balanced"],
)
def test_context_parallel(is_causal, load_balance, rotate_method, seed):
    """Ring attention, forward and backward: results are merged by our log-sum-exp."""
    run_ranks(distributed_steps.ring_attention, is_causal, load_balance, rotate_method, seed=seed)
